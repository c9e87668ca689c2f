"""From a torch model to an analogue one, laid out for a chip."""

from __future__ import annotations

from aihwkit.nn.conversion import convert_to_analog
from torch import nn

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.errors import StageError
from aihwkit_lora.tiles.grid import analog_layers


def convert(net: nn.Module, chip: Chip, *, exclude_modules: list[str] | None = None) -> nn.Module:
    """Copy a model with its linear layers on the tiles of a chip.

    This is aihwkit's ``convert_to_analog`` under ``chip.rpu_config()``; call that yourself for
    other configurations. The class of the model stays as it is, so it still pickles.

    Args:
        net: A torch model; it is not changed.
        chip: Array size and converters.
        exclude_modules: Full names of layers that stay digital.
    Returns:
        The converted copy.
    Raises:
        StageError: The model holds no layer to convert, or holds analogue layers already.

    Example:
        >>> import aihwkit_lora as al
        >>> model = al.convert(nn.Sequential(nn.Linear(300, 2)), al.chips.get("rm-180nm"))
        >>> len(list(model.analog_tiles()))
        3
    """
    present = next(analog_layers(net), None)
    if present is not None:
        raise StageError(
            f"layer '{present[0]}': expected a digital layer, got {type(present[1]).__name__}. "
            "Convert a model once, from its torch layers."
        )
    model: nn.Module = convert_to_analog(
        net, chip.rpu_config(), ensure_analog_root=False, exclude_modules=exclude_modules
    )
    if next(analog_layers(model), None) is None:
        raise StageError(
            f"{type(net).__name__}: expected layers that can be analogue, such as nn.Linear, got "
            "none. Check exclude_modules."
        )
    return model
