"""A LightningModule around another one: its hooks, its checkpoints, its logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from aihwkit_lora.errors import StageError
from aihwkit_lora.tiles import frozen_layers


class Around(pl.LightningModule):
    """Hands on whatever it does not do itself to the module inside.

    Checkpoints hold the module inside under its own names and with its own hyperparameters, so they
    load into it, with ``load_from_checkpoint`` too, as well as into the one around it. The hooks of
    single training batches are not handed on: those batches are no batches of that module.

    Args:
        module: Any LightningModule.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module
        self.strict_loading = module.strict_loading
        for name in OF_BATCHES:
            # Only if it has them: those of a data module come second, with a warning.
            if is_overridden(name, module):
                setattr(self, name, partial(_by_part, self, getattr(module, name)))

    @property
    def model(self) -> nn.Module:
        """What inputs are given to: the module inside, or of one without a ``forward`` its model.

        Raises:
            StageError: It has no ``forward``, and not exactly one part with frozen layers.
        """
        if type(self.module).forward is not pl.LightningModule.forward:
            return self.module
        found = [part for part in self.module.children() if any(True for _ in frozen_layers(part))]
        if len(found) != 1:
            raise StageError(
                f"{type(self.module).__name__}: expected a forward(inputs), or one part with "
                f"frozen layers to call instead, got {len(found)} of them. Give the module a "
                "forward."
            )
        return found[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)

    def test_step(self, *args: Any) -> Any:
        """Test as the module inside does."""
        return self._step("test_step", *args)

    def predict_step(self, *args: Any) -> Any:
        """Predict as the module inside does."""
        return self._step("predict_step", *args)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the module inside would."""
        if "state_dict" in checkpoint:
            state = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {key.removeprefix("module."): value for key, value in state}
        if self.module.hparams:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = dict(self.module.hparams)
            name = getattr(self.module, "_hparams_name", None)
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = name
        self.module.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what the module inside would."""
        self.module.on_load_checkpoint(checkpoint)
        if "state_dict" in checkpoint:
            state = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {f"module.{key}": value for key, value in state}

    def _step(self, name: str, *args: Any) -> Any:
        """Call a step of the module inside with as many arguments as it takes."""
        step = getattr(self.module, name)
        takes = {
            "batch_idx": is_param_in_hook_signature(step, "batch_idx", min_args=2),
            "dataloader_idx": is_param_in_hook_signature(step, "dataloader_idx", min_args=3),
        }
        wanted = [arg for arg, taken in zip(args[1:], takes.values(), strict=False) if taken]
        with self._speaking():
            return step(args[0], *wanted)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Let the module inside log; Lightning lets only the outermost module do so."""
        own = vars(self.module)
        before = own.get("log")
        own["log"] = self.log
        try:
            yield
        finally:
            del own["log"]
            if before is not None:
                own["log"] = before


HANDED_ON = (
    "setup",
    "teardown",
    "prepare_data",
    "configure_model",
    "configure_callbacks",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "on_before_zero_grad",
    "backward",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_fit_start",
    "on_fit_end",
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    *(
        f"on_{kind}_{when}"
        for kind in ("validation", "test", "predict")
        for when in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
    ),
)
"""Hooks of Lightning that the module inside gets as they are."""

OF_BATCHES = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Hooks that the module inside gets for each part of a batch, if it has them."""


def _handed_on(name: str) -> Callable[..., Any]:
    def hook(self: Around, *args: Any, **kwargs: Any) -> Any:
        with self._speaking():
            return getattr(self.module, name)(*args, **kwargs)

    return hook


def _by_part(
    around: Around, change: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(batch, Mapping) and batch.keys() <= {*around.parts}:
        return {part: change(own, *args, **kwargs) for part, own in batch.items()}
    return change(batch, *args, **kwargs)


for _name in HANDED_ON:
    setattr(Around, _name, _handed_on(_name))
