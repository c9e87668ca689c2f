"""New outputs for an old head: digital rows beside what is there, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import nearest
from aihwkit_lora.tiles.freeze import plain_name

ROWS = "grown_rows"
"""Attribute of a head under which its new rows are."""


class GrownRows(nn.ModuleDict):
    """Rows that a head has got since, as ordinary digital linear layers, in order of growth.

    They are a part of the head, and their outputs follow the head's own. Whoever observes the model
    counts their multiply–accumulates as those of any digital layer.

    Example:
        >>> rows = GrownRows()
        >>> rows.append(nn.Linear(3, 1)), rows.append(nn.Linear(3, 2))
        (None, None)
        >>> rows(torch.ones(5, 3)).shape, rows.out_features
        (torch.Size([5, 3]), 3)
    """

    def append(self, rows: nn.Module) -> None:
        """Put more rows behind those that are there.

        Args:
            rows: A linear layer.
        """
        # No bare number: PEFT would take it for a target layer of that name.
        self[f"rows_{len(self)}"] = rows

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return sum(rows.out_features for rows in self._layers())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the new outputs.

        Args:
            x: What the head gets, shape ``(…, in_features)``.
        Returns:
            Shape ``(…, out_features)``.
        """
        return torch.cat([rows(x) for rows in self._layers()], dim=-1)

    def _layers(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.values()))


def grow_head_[Model: nn.Module](
    model: Model,
    outputs: int,
    *,
    head: str | None = None,
    freeze_old: bool = True,
    generator: torch.Generator | None = None,
) -> Model:
    """Give a classifier more outputs: digital rows, drawn like the old ones; no pulse is applied.

    Weights of new rows are normal with mean and standard deviation of all weights of the old head
    (the speaker task of arXiv:2601.10037), biases 0. Old outputs come from the very layer that
    computed them before, bit for bit, and all names stay as they are, so that seals hold. Only the
    new rows ask for gradients: call it after
    :func:`~aihwkit_lora.continual.composition.add_adapter_`, which fixes everything but the new
    adapter, and before the optimiser is made.

    Args:
        model: Any model, also one wrapped by PEFT, sealed, or on a digital unit.
        outputs: How many to add, at least 1.
        head: Full name of the head without what PEFT puts around it; the last linear layer by
            default.
        freeze_old: Fix weights, rows and biases that the head has already; adapters of the head are
            left alone. False leaves them as they are.
        generator: Draws the rows; torch's own by default.
    Returns:
        The model itself.
    Raises:
        ConfigurationError: ``outputs`` is below 1, or there is no such linear layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> grow_head_(model, 1)(torch.ones(5, 4)).shape
        torch.Size([5, 3])
        >>> [name for name, p in model[2].named_parameters() if p.requires_grad]
        ['grown_rows.rows_0.weight', 'grown_rows.rows_0.bias']
    """
    if outputs < 1:
        raise ConfigurationError(
            f"grow_head_: expected outputs of at least 1, got {outputs}. It is how many to add."
        )
    heads = dict(_linear_layers(model))
    name = next(reversed(heads), None) if head is None else head
    if name is None or name not in heads:
        raise ConfigurationError(
            f"grow_head_: expected head to name a linear layer of {type(model).__name__}, got "
            f"{head!r}. {nearest(str(head), heads)}"
        )
    layer = heads[name]
    if freeze_old:
        _fix(layer)
    rows = _rows_like(_base(layer), outputs, generator)
    _append(layer, rows.train(layer.training))
    return model


def lift_rows_(model: nn.Module) -> None:
    """Move new rows of heads that PEFT has wrapped since from the layer to what is around it.

    The rows stand beside the head with all of its branches; below them, branches would find more
    outputs than they have.

    Args:
        model: Any model; nothing happens to one without such heads.
    """
    for module in list(model.modules()):
        base = _base(module)
        if base is not module and ROWS in base._modules:
            rows = base._modules.pop(ROWS)
            for hooks in (base._forward_hooks, base._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                    del hooks[key]
            _append(module, *cast(GrownRows, rows).values())


class _Hook:
    """A hook of this module; copies and pickles keep it, since it holds nothing."""


class _AddOutputs(_Hook):
    """Puts the outputs of the new rows behind those of the head."""

    def __call__(self, head: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = cast(GrownRows, head.get_submodule(ROWS))
        return torch.cat([output, rows(inputs[0])], dim=-1)


class _RunLast(_Hook):
    """Lets the other one run last: who counts a pass of the head shall see the head's own."""

    def __call__(self, head: nn.Module, inputs: tuple[Any, ...]) -> None:
        hooks = head._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _AddOutputs)]:
            hooks[key] = hooks.pop(key)


def _append(layer: nn.Module, *new: nn.Module) -> None:
    if ROWS not in layer._modules:
        layer.add_module(ROWS, GrownRows())
        layer.register_forward_pre_hook(_RunLast())
        layer.register_forward_hook(_AddOutputs())
    for rows in new:
        cast(GrownRows, layer.get_submodule(ROWS)).append(rows)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find linear layers, what PEFT has put around them included, by plain name."""
    inside: list[str] = []
    for path, module in model.named_modules():
        within = any(path.startswith(f"{outer}.") or not outer for outer in inside)
        if not within and isinstance(_base(module), nn.Linear):
            inside.append(path)
            yield plain_name(path), module


def _base(module: Any) -> Any:
    # PeftModel has the method too, and it is not meant.
    wrapped = hasattr(module, "adapter_layer_names") and hasattr(module, "get_base_layer")
    return module.get_base_layer() if wrapped else module


def _fix(layer: nn.Module) -> None:
    for kept in (_base(layer), layer._modules.get(ROWS)):
        if kept is not None:
            kept.requires_grad_(False)


def _rows_like(base: Any, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    old = base.weight.detach()
    weight = torch.empty(outputs, base.in_features, dtype=old.dtype)
    weight.normal_(float(old.mean()), float(old.std(correction=0)), generator=generator)
    # skip_init: the usual initialisation would draw random numbers for nothing.
    rows: nn.Linear = nn.utils.skip_init(
        nn.Linear, base.in_features, outputs, bias=base.bias is not None, dtype=old.dtype
    )
    with torch.no_grad():
        rows.weight.copy_(weight)
        if base.bias is not None:
            rows.bias.zero_()
    return rows.to(old.device)
