"""PEFT's model, tuner and LoRA layers, with sealed adapters that nothing goes around.

As on the digital unit, modules stay what and where they are and only their classes change, to
subclasses of what they were. So parameters, hooks, optimisers and the names in a ``state_dict``
are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from aihwkit_lora.adapters import branches
from aihwkit_lora.tiles.layers import FrozenLayer
from aihwkit_lora.unlearning.adapter_digest import (
    layer_digest,
    layer_tensors,
    lora_layers,
    tuner_of,
)
from aihwkit_lora.unlearning.seal_book import MEASURE, STAYS, SealBook

Stamp = tuple[tuple[int, int, int], ...]
ANEW = "Load the sealed model again, for example with load_sealed(base, folder)."


@dataclass
class Held:
    """What a sealed adapter is in one layer.

    Args:
        scale: What its output is multiplied with.
        sha256: Hash of its tensors and the scale.
        array: Digests of the arrays beside it; None for a digital layer.
    """

    scale: float
    sha256: str
    array: Tensor | None


class _Sealed(nn.Module):
    """A module of a sealed model, whose class is made from its own when it is sealed."""

    original: type[Any]
    seal_book: SealBook

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        # The class exists at run time only, so copies and pickles name what it was made from.
        return _instance, (self.original,), self.state()

    def state(self) -> dict[str, Any]:
        """What a copy takes over."""
        return dict(self.__dict__)

    def refuse_rewriting(self, action: str) -> None:
        """Refuse to write the arrays that sealed adapters were made for.

        Args:
            action: What somebody tried.
        Raises:
            SealError: Always.
        """
        raise self.seal_book.refusal(self.seal_book.seals, action, STAYS)


class SealedLayer(_Sealed, LoraLayer):
    """A LoRA layer of a model with sealed adapters, some of which may be here."""

    held: dict[str, Held]
    stamps: dict[str, Stamp]
    seal_layer: str

    def state(self) -> dict[str, Any]:
        """Without the stamps, which hold for these tensors only."""
        return {**self.__dict__, "stamps": {}}

    def forward(self, *args: Any, **options: Any) -> Any:
        """Look whether every sealed adapter takes part, then run as before."""
        if self.held and self.seal_book.in_force:
            self.require_composed(options.get("adapter_names"))
        return super().forward(*args, **options)

    def require_composed(self, adapter_names: Sequence[str] | None = None) -> None:
        """Refuse a pass that goes around a sealed adapter.

        Args:
            adapter_names: One name for each sample, as PEFT has it.
        Raises:
            SealError: A sealed adapter of this layer was altered or would be left out.
        """
        for adapter, held in self.held.items():
            left_out = self._left_out(adapter) or (adapter_names is not None and "adapter_names")
            if left_out:
                raise self._refusal(adapter, left_out, MEASURE)
            if altered := self._altered(adapter, held):
                raise self._refusal(adapter, altered, ANEW)

    def _refusal(self, adapter: str, found: str, way_out: str) -> Exception:
        return self.seal_book.refusal([adapter], found, way_out, self.seal_layer)

    def _left_out(self, adapter: str) -> str:
        if self.disable_adapters:
            return "adapters that are switched off"
        if list(self.active_adapters).count(adapter) != 1:
            return f"the active adapters {list(self.active_adapters)}"
        if self.merged:
            return f"merged adapters {self.merged_adapters}"
        return ""

    def _altered(self, adapter: str, held: Held) -> str:
        if self.scaling.get(adapter) != held.scale:
            return f"scale {self.scaling.get(adapter)} instead of {held.scale}"
        if not isinstance(self.lora_dropout[adapter], nn.Identity):
            return f"dropout {self.lora_dropout[adapter]}"
        tensors = layer_tensors(self, adapter).values()
        if any(tensor.requires_grad for tensor in tensors):
            return "parameters that ask for gradients"
        if not _equal(_array(self), held.array):
            return "other arrays beside it"
        # Hashing takes long, so only what may have changed is hashed again.
        stamp = tuple((id(each), each.data_ptr(), each._version) for each in tensors)
        if self.stamps.get(adapter) != stamp:
            if layer_digest(self, adapter) != held.sha256:
                return "other tensors"
            self.stamps[adapter] = stamp
        return ""

    def require_same(self, adapter: str) -> None:
        """Hash a sealed adapter of this layer, whatever torch says about changes.

        Args:
            adapter: Its name.
        Raises:
            SealError: It was altered.
        """
        self.stamps.pop(adapter, None)
        if altered := self._altered(adapter, self.held[adapter]):
            raise self._refusal(adapter, altered, ANEW)

    def hold(self, adapter: str) -> None:
        """Take an adapter as sealed: fixed, active, and without dropout.

        Args:
            adapter: One that the model has; what this layer lacks does not matter.
        """
        # Not by set_adapter, which makes all that is active trainable.
        self._active_adapter = list(dict.fromkeys([*self.active_adapters, adapter]))
        if not layer_tensors(self, adapter):
            return
        self.lora_dropout[adapter] = nn.Identity()
        scale, sha256 = float(self.scaling[adapter]), layer_digest(self, adapter)
        self.held[adapter] = Held(scale, sha256, _array(self))
        self.fix_sealed()

    def fix_sealed(self) -> None:
        """Keep sealed adapters out of training."""
        for adapter in self.held:
            for tensor in layer_tensors(self, adapter).values():
                tensor.requires_grad_(False)
                tensor.grad = None

    # --- what PEFT offers to go around an adapter -------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate as PEFT does, sealed adapters included and fixed."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.seal_book.require(names, f"set_adapter({names})", self.seal_layer)
        super().set_adapter(names, inference_mode)
        self.fix_sealed()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch on; switching off is refused."""
        if not enabled:
            self.seal_book.refuse_all("enable_adapters(False)")
        super().enable_adapters(enabled)
        self.fix_sealed()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as PEFT does, unless the adapter is sealed."""
        require_open(self.seal_book, [adapter_name], f"delete_adapter('{adapter_name}')")
        super().delete_adapter(adapter_name)

    def merge(self, *_: Any, **__: Any) -> None:
        """Refuse: where something is merged, PEFT runs no other adapter."""
        raise self.seal_book.refusal(self.seal_book.seals, "merge()", STAYS)

    def unload_and_optionally_merge_module(self, *_: Any, **__: Any) -> None:
        """Refuse; PEFT calls this before it takes a layer off."""
        raise self.seal_book.refusal(self.seal_book.seals, "unload()", STAYS)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale as PEFT does, unless the adapter is sealed."""
        if self.seal_book.in_force:
            require_open(self.seal_book, [adapter], f"set_scale('{adapter}', {scale})", MEASURE)
        super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Refuse where a sealed adapter would be scaled along."""
        self._refuse_scaling(f"scale_layer({scale})")
        super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Refuse where a sealed adapter would be scaled along."""
        self._refuse_scaling(f"unscale_layer({scale})")
        super().unscale_layer(scale)

    def _refuse_scaling(self, action: str) -> None:
        if self.held:
            self.seal_book.refuse_all(action)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let PEFT switch training of the adapters that are not sealed."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if requires_grad and self.seal_book.in_force:
            require_open(self.seal_book, names, f"set_requires_grad({names})", MEASURE)
        super().set_requires_grad(names, requires_grad)

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Add an adapter as PEFT does; a sealed one is not started over."""
        require_open(self.seal_book, [adapter_name], f"update_layer('{adapter_name}')")
        super().update_layer(adapter_name, *args, **options)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        self.require_same_in(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def require_same_in(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuse a state with other tensors of a sealed adapter.

        Args:
            state_dict: What is about to be loaded.
            prefix: What the names of this layer begin with.
        Raises:
            SealError: It would alter one; what it lacks does not matter.
        """
        for adapter, held in self.held.items():
            names = [n for n in layer_tensors(self, adapter) if prefix + n in state_dict]
            stored = {name: state_dict[prefix + name] for name in names}
            if names and layer_digest(self, adapter, stored) != held.sha256:
                raise self._refusal(
                    adapter,
                    "other tensors in a state_dict",
                    "Load a state that was saved after the adapter was sealed.",
                )


class SealedTuner(_Sealed, LoraModel):
    """PEFT's tuner of LoRA, which keeps sealed adapters in and seals new layers too."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """Inject as PEFT does, on the digital unit where others are there."""
        require_open(self.seal_book, [adapter_name], f"inject_adapter('{adapter_name}')")
        super().inject_adapter(model, adapter_name, *args, **options)
        found = dict(branches.branches(model))
        srams = [each.sram for each in found.values() if isinstance(each, branches.BranchesOnUnit)]
        for name, layer in found.items():
            if srams and branches.unknown(layer, [adapter_name]) is None:
                branches.place_(name, layer, srams[0], [adapter_name])
        guard_layers_(model, self.seal_book)

    def _enable_peft_forward_hooks(self, *args: Any, **options: Any) -> Any:
        # Before PEFT 0.21 hangs up hooks that it leaves behind where a pass raises.
        if options.get("adapter_names") is not None:
            self.seal_book.refuse_all("adapter_names")
        return super()._enable_peft_forward_hooks(*args, **options)

    def disable_adapter_layers(self) -> None:
        """Refuse, unless an audit is running."""
        self.seal_book.refuse_all("disable_adapter_layers()")
        super().disable_adapter_layers()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate as PEFT does, sealed adapters included."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.seal_book.require(names, f"set_adapter({names})")
        super().set_adapter(names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as PEFT does, unless the adapter is sealed."""
        require_open(self.seal_book, [adapter_name], f"delete_adapter('{adapter_name}')")
        super().delete_adapter(adapter_name)

    def merge_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse."""
        raise self.seal_book.refusal(self.seal_book.seals, "merge_adapter()", STAYS)

    def _unload_and_optionally_merge(self, merge: bool = True, *_: Any, **__: Any) -> None:
        action = "merge_and_unload()" if merge else "unload()"
        raise self.seal_book.refusal(self.seal_book.seals, action, STAYS)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        *args: Any,
        **options: Any,
    ) -> None:
        """Combine as PEFT does, without sealed adapters: a weight of -1 would undo them."""
        action = f"add_weighted_adapter('{adapter_name}')"
        require_open(self.seal_book, [*adapters, adapter_name], action)
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **options)


class SealedModel(_Sealed, PeftModel):
    """PEFT's model with sealed adapters."""

    def disable_adapter(self) -> Any:
        """Refuse, unless an audit is running."""
        self.seal_book.refuse_all("disable_adapter()")
        return super().disable_adapter()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate as PEFT does, or several at once, sealed adapters included."""
        if isinstance(adapter_name, str):
            self.seal_book.require([adapter_name], f"set_adapter('{adapter_name}')")
            super().set_adapter(adapter_name, inference_mode)
        else:
            tuner_of(self).set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as PEFT does, unless the adapter is sealed."""
        require_open(self.seal_book, [adapter_name], f"delete_adapter('{adapter_name}')")
        super().delete_adapter(adapter_name)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **options: Any) -> Any:
        """Load as PEFT does, but not over a sealed adapter."""
        require_open(self.seal_book, [adapter_name], f"load_adapter('{adapter_name}')")
        return super().load_adapter(model_id, adapter_name, *args, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load as torch does, if it leaves sealed adapters as they are."""
        for name, layer in sealed_layers(self):
            layer.require_same_in(state_dict, f"{name}.")
        return super().load_state_dict(state_dict, *args, **options)

    def save_pretrained(
        self,
        save_directory: Any,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        """Save as PEFT does, sealed adapters included."""
        if selected_adapters is not None:
            self.seal_book.require(
                selected_adapters, f"save_pretrained(selected_adapters={selected_adapters})"
            )
        super().save_pretrained(
            save_directory, safe_serialization, selected_adapters, *args, **options
        )


_CLASSES: dict[type, type[_Sealed]] = {}


def sealed_class(original: type) -> type[Any]:
    """The class that a module of this class gets when its model is sealed.

    Args:
        original: A class of models, tuners or layers of PEFT.
    """
    if issubclass(original, _Sealed):
        return original
    if original not in _CLASSES:
        kind: type = SealedLayer
        if issubclass(original, PeftModel):
            kind = SealedModel
        elif issubclass(original, LoraModel):
            kind = SealedTuner
        contents = {"original": original, "__doc__": original.__doc__, "__module__": __name__}
        _CLASSES[original] = type(f"Sealed{original.__name__}", (kind, original), contents)
    return _CLASSES[original]


def _instance(original: type) -> Any:
    return object.__new__(sealed_class(original))


def guard_(model: PeftModel, book: SealBook) -> None:
    """Give a model of PEFT, its tuner and its layers the classes of a sealed model.

    Args:
        model: With LoRA.
        book: Holds its seals.
    """
    for module in (model, tuner_of(model)):
        module.__class__ = sealed_class(type(module))
        module.seal_book = book
    guard_layers_(model, book)


def guard_layers_(model: nn.Module, book: SealBook) -> None:
    """Give LoRA layers, those that a later adapter has brought included, their sealed classes.

    Args:
        model: What contains them.
        book: Holds its seals.
    """
    fresh: Iterator[tuple[str, Any]] = lora_layers(model)
    for name, layer in fresh:
        if not isinstance(layer, SealedLayer):
            layer.__class__ = sealed_class(type(layer))
            layer.seal_book, layer.seal_layer = book, name
            layer.held, layer.stamps = {}, {}


def sealed_layers(model: nn.Module) -> Iterator[tuple[str, SealedLayer]]:
    """Find the layers of a sealed model, with their names in it.

    Args:
        model: Any module.
    """
    for name, module in model.named_modules():
        if isinstance(module, SealedLayer):
            yield name, module


def require_open(
    book: SealBook, adapters: Sequence[str], action: str, way_out: str = STAYS
) -> None:
    """Refuse what is only done to adapters that are not sealed.

    Args:
        book: The seals of the model.
        adapters: Names.
        action: What somebody tried.
        way_out: What to do instead.
    Raises:
        SealError: One of them is sealed.
    """
    if sealed := book.named(adapters):
        raise book.refusal(sealed, action, way_out)


def _array(layer: LoraLayer) -> Tensor | None:
    base = layer.get_base_layer()
    return base.analog_module.digest if isinstance(base, FrozenLayer) else None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


# The digital unit finds classes in these tables, so a sealed model can go onto it and off it.
for _ordinary, _on_unit in list(branches._LAYERS.items()):
    branches._LAYERS[sealed_class(_ordinary)] = sealed_class(_on_unit)
    branches._ORDINARY[sealed_class(_on_unit)] = sealed_class(_ordinary)
branches._ORDINARY[sealed_class(branches.TunerOnUnit)] = sealed_class(LoraModel)
