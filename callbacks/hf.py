"""The meters of training steps in the ``Trainer`` of transformers.

Not imported by ``aihwkit_lora.callbacks``, so that nobody needs transformers who does not use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from aihwkit_lora.callbacks.ranks import Ranks
from aihwkit_lora.chips import Chip
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Ledger
from aihwkit_lora.metering.step_meter import EnergyPerStep, PulsesPerStep


class MeterCallback(TrainerCallback, ExportableState):
    """Count what each optimiser step costs, and log it with the loss.

    While transformers' ``Trainer`` trains, reads of frozen tiles, digital MACs, optimiser updates
    and pulses go to the ledger; evaluation goes under a phase of its own and belongs to no step.
    Each row of ``state.log_history`` that has a loss gets the values of its step, under the keys of
    ``docs/callbacks.md``; so do reporters that come after this callback, all of them after
    :meth:`add_to`. Checkpoints hold the ledger, and a resumed run goes on with it, whatever
    ``restore_callback_states_from_checkpoint`` says.

    transformers tells callbacks nothing of an exception. As a context manager the callback ends
    counting after one as well; otherwise call :meth:`stop`, or train again.

    Args:
        chip: Whose prices to use.
        ledger: Where counts are added.
        phase: Name of the phase of training steps.
        evaluation_phase: Name of the phase of evaluation in between.

    Example:
        >>> import aihwkit_lora as al
        >>> meter = MeterCallback(al.chips.get("rm-180nm"), al.Ledger(), phase="unlearn")
        >>> meter.ledger.phases()  # until Trainer(..., callbacks=[meter]) trains
        ()
    """

    def __init__(
        self,
        chip: Chip,
        ledger: Ledger,
        *,
        phase: str = "train",
        evaluation_phase: str = "evaluate",
    ) -> None:
        self._meters = _Meters(chip, ledger, phase, evaluation_phase)
        self._row: dict[str, float] = {}

    @property
    def ledger(self) -> Ledger:
        """Where counts are added."""
        return self._meters.ledger

    def add_to(self, trainer: Trainer) -> None:
        """Join a trainer ahead of its reporters, so that they get the values of steps too.

        Args:
            trainer: May have this callback already.
        """
        handler = trainer.callback_handler
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks = [self, *others]
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def stop(self) -> None:
        """End counting; harmless if it is not running. What was counted stays in the ledger."""
        self._meters.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember which model the meters are for."""
        if kwargs.get("model") is not None:
            _MADE_FOR[kwargs["model"]] = self._meters

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count; go on with the ledger of the checkpoint if there is one.

        Raises:
            StageError: A layer is analogue and not frozen, the model is observed with this ledger
                already, the trainer has two callbacks of this kind, or transformers has copied a
                callback that joined the trainer late.
        """
        model = kwargs["model"]
        if self._meters.chip is None:
            self._meters = _meters_for(model)
        # transformers 5.23 asks for this entry when it saves, and a checkpoint may have none.
        states: Any = state.stateful_callbacks
        stored = states.setdefault(type(self).__name__, {})
        if isinstance(stored, list):
            raise StageError(
                "MeterCallback: expected to be the only one of a trainer, got several, whose "
                "states transformers mixes up. To price a run for several chips, use one and "
                "price(ledger.total(), chip)."
            )
        resumed = stored.get("attributes", {}).get("stored") if state.global_step else None
        self._row = {}
        self._meters.start(model, _ranks(args), resumed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count under the phase of training."""
        self._meters.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Price the step. What follows until the next one is evaluation."""
        self._row = self._meters.end_step()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring together what all processes have counted, before a checkpoint is saved."""
        self._meters.share()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the values of the last step to a row that has a loss."""
        logs = kwargs["logs"]
        if "loss" in logs:
            logs.update(self._row)
            state.log_history[-1].update(self._row)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End counting."""
        self._meters.finish()

    def state(self) -> dict[str, Any]:
        """The ledger and the open step, as plain strings and whole numbers."""
        # transformers makes a copy of the callback from this, if it is asked to restore callbacks.
        # Chip and ledger are no JSON: the copy finds them by the model.
        return {
            "args": {"chip": None, "ledger": None},
            "attributes": {"stored": self._meters.state_dict()},
        }


class _Meters:
    """The meters of a run, shared by a callback and the copies that transformers makes of it."""

    def __init__(self, chip: Chip, ledger: Ledger, phase: str, evaluation_phase: str) -> None:
        self.chip, self.ledger = chip, ledger
        self._phase, self._evaluation_phase = phase, evaluation_phase
        # Made for each run and dropped after it, because they hold the model.
        self._pulses: PulsesPerStep | None = None
        self._energy: EnergyPerStep | None = None

    def start(
        self, model: nn.Module, ranks: Ranks | None, resumed: Mapping[str, Any] | None
    ) -> None:
        self.stop()
        pulses = PulsesPerStep(self.ledger, phase=self._phase)
        energy = EnergyPerStep(
            self.chip, self.ledger, phase=self._phase, validation_phase=self._evaluation_phase
        )
        if resumed is not None:
            pulses.load_state_dict(resumed["pulses"])
            energy.load_state_dict(resumed["energy"])
        self._pulses, self._energy = pulses, energy
        try:
            pulses.start(model, ranks)
            energy.start(model, ranks)
        except BaseException:
            self.stop()
            raise
        energy.begin_validation()  # which may come before the first step

    def begin_step(self) -> None:
        if self._energy is not None:
            self._energy.end_validation()

    def end_step(self) -> dict[str, float]:
        if self._pulses is None or self._energy is None:
            return {}
        row = (self._pulses.end_batch() or {}) | (self._energy.end_batch() or {})
        self._energy.begin_validation()
        return row

    def share(self) -> None:
        if self._energy is not None:
            self._energy.end_validation()
            self._energy.begin_validation()

    def finish(self) -> None:
        if self._pulses is not None and self._energy is not None:
            self._pulses.finish()
            self._energy.finish()
        self._pulses = self._energy = None

    def stop(self) -> None:
        for meter in (self._pulses, self._energy):
            if meter is not None:
                meter.stop()
        self._pulses = self._energy = None

    def state_dict(self) -> dict[str, Any] | None:
        if self._pulses is None or self._energy is None:
            return None
        return {"pulses": self._pulses.state_dict(), "energy": self._energy.state_dict()}


_MADE_FOR: WeakKeyDictionary[nn.Module, _Meters] = WeakKeyDictionary()
"""Meters by model, which is all that transformers' copy of a callback knows."""


def _meters_for(model: nn.Module) -> _Meters:
    found = _MADE_FOR.get(model)
    if found is None:
        raise StageError(
            "MeterCallback: expected to know chip and ledger, got a copy that transformers made to "
            "restore a callback which joined the trainer late. Pass it as Trainer(callbacks=[...]) "
            "or with add_to(trainer), or leave out restore_callback_states_from_checkpoint: this "
            "callback restores itself."
        )
    return found


def _ranks(args: TrainingArguments) -> Ranks | None:
    if args.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    return Ranks(sharded=bool(args.fsdp))
