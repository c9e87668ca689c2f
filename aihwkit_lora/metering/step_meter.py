"""Meters that know no trainer: tell them of batches, and they say what each step cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from aihwkit_lora.chips import Chip
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.insitu import watch_pulses
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.observe import Observer
from aihwkit_lora.metering.step_values import Wear, energy_values, of_phase, pulse_values, writes


class OptimizerSteps:
    """Counts optimiser steps that update a model, whoever takes them.

    Example:
        >>> import torch
        >>> model, steps = nn.Linear(2, 1), OptimizerSteps()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> steps.start(model)
        >>> optimizer.step()
        >>> steps.take(), steps.take()
        (1, 0)
        >>> steps.stop()
    """

    def __init__(self) -> None:
        self._model: nn.Module = nn.Identity()
        self._own: dict[int, nn.Parameter] = {}
        self._undo: list[Callable[[], None]] = []
        self._depth = self._taken = 0

    def start(self, model: nn.Module) -> None:
        """Begin to count, from zero.

        Args:
            model: Whose optimisers count.
        """
        self.stop()
        self._model, self._depth, self._taken = model, 0, 0
        self._undo = [
            register_optimizer_step_pre_hook(self._before).remove,
            register_optimizer_step_post_hook(self._after).remove,
        ]

    @property
    def running(self) -> bool:
        """Whether it counts."""
        return bool(self._undo)

    def stop(self) -> None:
        """End counting; harmless if it is not running."""
        while self._undo:
            self._undo.pop()()
        self._own = {}

    def take(self) -> int:
        """Steps since the last call, or since the start."""
        taken, self._taken = self._taken, 0
        self._depth = 0  # an optimiser that raised has not come back
        return taken

    # torch 2.15 calls these again for a step within a step: of a parent class, as in aihwkit's
    # optimisers, or of an optimiser that another one wraps. Only the outermost counts.

    def _before(self, *_: Any) -> None:
        self._depth += 1

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth and self._updates(optimizer):
            self._taken += 1

    def _updates(self, optimizer: Optimizer) -> bool:
        """Whether an optimiser has a parameter of the model."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(p) in self._own for p in parameters):
            return True
        self._own = {id(p): p for p in self._model.parameters()}
        return any(id(p) in self._own for p in parameters)


class StepCounts:
    """Cut a growing ledger into training steps.

    Args:
        ledger: The ledger that grows.
        without: Phases that belong to no step, such as validation.
        step: Optimiser steps taken so far.
        select: What of the ledger belongs to steps, if not everything but ``without``.

    Example:
        >>> ledger = Ledger()
        >>> steps = StepCounts(ledger)
        >>> ledger.add(Counts({"set_pulses": 3}), phase="train", layer="head")
        >>> steps.next()["set_pulses"], steps.next()["set_pulses"]
        (3, 0)
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        without: tuple[str, ...] = (),
        step: int = 0,
        select: Callable[[Ledger], Counts] | None = None,
    ) -> None:
        self._ledger, self._without, self._step = ledger, without, step
        self._select = select or self._all_phases
        self.restart()

    def restart(self) -> None:
        """Begin a new step, without what was counted before."""
        self.open = Counts()
        self.skip()

    def skip(self) -> None:
        """Leave out what was added since the last look."""
        self._seen = self._select(self._ledger)

    def collect(self) -> Counts:
        """Add to the open step what was added since the last look; return that."""
        total = self._select(self._ledger)
        new, self._seen = total.minus(self._seen), total
        self.open = self.open + new if self.open else new
        return new

    def close(self) -> Counts:
        """End the open step with what was collected, return it, and begin a new one."""
        step, self.open = self.open, Counts()
        return step

    def next(self) -> Counts:
        """Return what was added since the last call, or since the start."""
        self.collect()
        return self.close()

    def after(self, step: int) -> Counts | None:
        """Return what was added up to an optimiser step.

        Args:
            step: Optimiser steps taken by now, such as ``trainer.global_step``.
        Returns:
            None if there was no step since the last call: gradients accumulate over batches.
        """
        if step == self._step:
            return None
        self._step = step
        return self.next()

    def _all_phases(self, ledger: Ledger) -> Counts:
        total = ledger.total()
        for phase in self._without:
            total = total.minus(ledger.total(phase=phase))
        return total


class Ranks(Protocol):
    """The processes of a distributed run; see ``aihwkit_lora.callbacks.ranks``."""

    def agree(self, counts: Counts) -> None:
        """Raise on every rank unless all have the same counts."""

    def add_up(self, own: Ledger, total: Ledger) -> None:
        """Add to ``total`` what all ranks together have in ``own``."""


def pour(source: Ledger, into: Ledger) -> None:
    """Add all entries of a ledger to another one.

    Args:
        source: Stays as it is.
        into: Where they are added.

    Example:
        >>> source, into = Ledger(), Ledger()
        >>> source.add(Counts({"tile_reads": 3}), phase="train", layer="head")
        >>> pour(source, into)
        >>> into.total(phase="train")["tile_reads"]
        3
    """
    for entry in source.state_dict()["entries"]:
        into.add(Counts.from_dict(entry["counts"]), phase=entry["phase"], layer=entry["layer"])


class StepMeter(ABC):
    """What the meters of this module have in common: steps, ranks, state.

    A trainer calls :meth:`start`, then :meth:`end_batch` after every batch, and in the end
    :meth:`finish`, or :meth:`stop` if something was raised.

    Args:
        ledger: Where counts are added.
        phase: Name of the phase of training.
    """

    def __init__(self, ledger: Ledger, *, phase: str = "train") -> None:
        self.ledger = ledger
        self._phase = phase
        self._total = Counts()
        self._counts = StepCounts(ledger, select=self._select)
        self._optimizers = OptimizerSteps()
        self._ranks: Ranks | None = None
        self._resumed = False

    @property
    def phase(self) -> str:
        """Name of the phase of training; may be changed while it runs, between two batches."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._counts.collect()
        self._phase = name
        self._rename()
        self._counts.skip()

    def start(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        """Begin to count, without what the ledger holds already.

        After :meth:`load_state_dict`, the step that was open goes on.

        Args:
            model: What is trained.
            ranks: The processes that train together; None if this one is alone.
        Raises:
            StageError: See the meter.
        """
        self.stop()
        self._ranks = ranks
        self._watch(model)
        self._optimizers.start(model)
        if self._resumed:
            self._counts.skip()
        else:
            self._counts.restart()
        self._resumed = False

    def end_batch(self) -> dict[str, float] | None:
        """Say what the step cost.

        Returns:
            Values by key of ``LOGGED``; None if no optimiser has stepped in this batch. What it
            cost belongs to the next step then.
        Raises:
            StageError: Ranks have written different things; raised on every rank.
        """
        self._collect()
        steps = self._optimizers.take()
        return self._values(self._counts.close(), steps) if steps else None

    def finish(self) -> None:
        """End counting after the last batch."""
        if self._optimizers.running:
            self._collect()
        self.stop()

    def stop(self) -> None:
        """End counting at once, whatever other ranks do; what was counted stays in the ledger."""
        self._unwatch()
        self._optimizers.stop()

    def state_dict(self) -> dict[str, Any]:
        """The ledger and the open step, as plain strings and whole numbers."""
        self._counts.collect()
        return {"ledger": self.ledger.state_dict(), "open": self._counts.open.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the ledger and the open step of a checkpoint.

        Args:
            state: What :meth:`state_dict` gave.
        """
        self.ledger.load_state_dict(state["ledger"])
        self._counts.open = Counts.from_dict(state["open"])
        self._counts.skip()
        self._resumed = True

    def _collect(self) -> None:
        self._share()
        new = self._counts.collect()
        if self._ranks is not None:
            self._ranks.agree(writes(new))

    def _share(self) -> None:  # noqa: B027 - only meters that watch something of their own share it
        """Add to the ledger what all ranks have seen."""

    def _select(self, ledger: Ledger) -> Counts:
        """What of the ledger belongs to steps."""
        self._total = ledger.total()
        return self._of_steps(self._total)

    @abstractmethod
    def _of_steps(self, total: Counts) -> Counts: ...

    @abstractmethod
    def _watch(self, model: nn.Module) -> None: ...

    @abstractmethod
    def _unwatch(self) -> None: ...

    @abstractmethod
    def _rename(self) -> None: ...

    @abstractmethod
    def _values(self, step: Counts, optimizer_steps: int) -> dict[str, float]: ...


class PulsesPerStep(StepMeter):
    """Programming pulses and verify reads of each optimiser step.

    They come from whatever writes to the ledger, ``program_`` and ``reprogram_``, under any phase,
    and from training in place, which is watched.

    Args:
        ledger: The record that ``program_`` and ``reprogram_`` add to.
        phase: Under which name pulses of training in place are counted.
        seed: Of draws where aihwkit does not count pulses; see ``watch_pulses``.

    Example:
        >>> import torch
        >>> model, meter = nn.Linear(2, 1), PulsesPerStep(Ledger())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> meter.start(model)
        >>> optimizer.step()
        >>> meter.ledger.add(Counts({"set_pulses": 3}), phase="reprogram", layer="")
        >>> values = meter.end_batch()
        >>> values["pulses"], values["optimizer_steps"]
        (3.0, 1.0)
        >>> meter.finish()
    """

    def __init__(self, ledger: Ledger, *, phase: str = "train", seed: int = 0) -> None:
        super().__init__(ledger, phase=phase)
        self._pulses = watch_pulses(nn.Identity(), ledger, phase=phase, seed=seed)
        self._wear: Wear | None = None

    def state_dict(self) -> dict[str, Any]:
        """The ledger, the open step and the draws, as plain strings and whole numbers."""
        return super().state_dict() | {"pulses": self._pulses.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the ledger, the open step and the draws of a checkpoint.

        Args:
            state: What :meth:`state_dict` gave.
        """
        super().load_state_dict(state)
        self._pulses.load_state_dict(state["pulses"])

    def _of_steps(self, total: Counts) -> Counts:
        return writes(total)

    def _watch(self, model: nn.Module) -> None:
        self._pulses.model = model
        self._pulses.start()
        self._wear = Wear(model)

    def _unwatch(self) -> None:
        self._pulses.stop()
        self._pulses.model, self._wear = nn.Identity(), None  # holds on to no model

    def _rename(self) -> None:
        self._pulses.phase = self._phase

    def _values(self, step: Counts, optimizer_steps: int) -> dict[str, float]:
        worn = self._wear.most() if self._wear is not None else None
        return pulse_values(step, self._total, optimizer_steps=optimizer_steps, most_worn=worn)


class EnergyPerStep(StepMeter):
    """Energy and time of each optimiser step.

    What the model does is observed: it goes to the ledger under the phase of training, or of
    validation while that runs. A step is what was counted in the phase of training, and whatever
    was written to arrays, under any phase.

    Args:
        chip: Whose prices to use.
        ledger: Where counts are added. Programming counted there is part of the total.
        phase: Name of the phase of training.
        validation_phase: Name of the phase of validation.

    Example:
        >>> import torch
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.freeze_(al.convert(nn.Sequential(nn.Linear(4, 2)), chip), programmed_by="me")
        >>> model = nn.Sequential(model, nn.Linear(2, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> meter = EnergyPerStep(chip, al.Ledger(), phase="unlearn")
        >>> meter.start(model)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> meter.end_batch() is None  # gradients accumulate
        True
        >>> optimizer.step()
        >>> values = meter.end_batch()
        >>> values["energy_j"] == values["energy_total_j"] > values["energy_j/forward"] > 0
        True
        >>> meter.finish()
    """

    def __init__(
        self,
        chip: Chip,
        ledger: Ledger,
        *,
        phase: str = "train",
        validation_phase: str = "validate",
    ) -> None:
        self.chip, self.validation_phase = chip, validation_phase
        self._observer: Observer | None = None
        self._validating = False
        super().__init__(ledger, phase=phase)

    def begin_validation(self) -> None:
        """Count under the phase of validation, which belongs to no step."""
        self._validating = True
        self._rename()

    def end_validation(self) -> None:
        """Count under the phase of training again."""
        self._share()
        self._validating = False
        self._rename()

    def stop(self) -> None:
        """End counting at once, whatever other ranks do; what was counted stays in the ledger."""
        super().stop()
        self._validating = False

    def _of_steps(self, total: Counts) -> Counts:
        return of_phase(self.ledger, self._phase, total)

    def _watch(self, model: nn.Module) -> None:
        # Ranks see different samples: what each counts is no entry of the ledger they share.
        seen = self.ledger if self._ranks is None else Ledger()
        mapping = self.chip.mapping
        self._observer = Observer(model, seen, phase=self._phase, mapping=mapping).start()

    def _unwatch(self) -> None:
        if self._observer is None:
            return
        self._observer.stop()
        if self._ranks is not None:
            pour(self._observer.ledger, self.ledger)
        self._observer = None

    def _share(self) -> None:
        if self._observer is not None and self._ranks is not None:
            self._ranks.add_up(self._observer.ledger, self.ledger)
            self._observer.ledger.load_state_dict(Ledger().state_dict())

    def _rename(self) -> None:
        if self._observer is not None:
            self._observer.phase = self.validation_phase if self._validating else self._phase

    def _values(self, step: Counts, optimizer_steps: int) -> dict[str, float]:
        return energy_values(step, self._total, self.chip, optimizer_steps=optimizer_steps)
