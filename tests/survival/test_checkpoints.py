"""State dictionaries: plain, complete, and loadable where they belong and nowhere else."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aihwkit_lora as al


def stored(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restored(content: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(content), weights_only=True)


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_a_checkpoint_loads_safely_into_an_equal_model(kind: Any) -> None:
    model = kind.adapted()
    twin = kind.adapted(init_lora_weights=True)
    twin.load_state_dict(restored(stored(model.state_dict())))
    kind.assert_survived(twin, model)


def test_a_checkpoint_loads_safely_into_a_model_frozen_for_it(kind: Any) -> None:
    model, blank = kind.frozen(), kind.blank()
    assert al.fingerprint(blank) != al.fingerprint(model)
    assert not torch.equal(blank(kind.x), model(kind.x))  # reads once, so that engines have tiles
    blank.load_state_dict(restored(stored(model.state_dict())))
    kind.assert_survived(blank, model)


def test_the_state_is_plain_tensors_and_no_handle_of_aihwkit(kind: Any) -> None:
    state = kind.adapted().state_dict()
    assert {type(value) for value in state.values()} == {Tensor}
    assert not [name for name in state if "analog_ctx" in name or "device_anchor" in name]
    assert all(value.numel() for value in state.values())


def test_two_saves_are_equal_to_the_byte(kind: Any, train: Any) -> None:
    model = kind.frozen()
    first = stored(model.state_dict())
    model(kind.x.requires_grad_()).sum().backward()
    assert stored(model.state_dict()) == first
    # Padding between tiles of unequal sizes is part of the file, and must not be stale memory.
    assert stored(kind.frozen().state_dict()) == first


@pytest.mark.parametrize("keep_vars", [True, False])
def test_saved_and_loaded_values_are_copies(kind: Any, keep_vars: bool) -> None:
    model = kind.frozen()
    state = model.state_dict(keep_vars=keep_vars)
    model.load_state_dict(state)
    for name, value in state.items():
        if "analog_module" in name:
            value.zero_()
    kind.assert_survived(model, kind.frozen())


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        clones,
        lambda state: {name: value.cpu() for name, value in state.items()},
        lambda state: {name: value.numpy() for name, value in state.items()},
    ],
    ids=["deepcopy", "clone", "cpu", "numpy"],
)
def test_copies_of_the_state_are_as_good(kind_of: Any, way: Any) -> None:
    kind = kind_of()
    model, blank = kind.frozen(), kind.blank()
    state = {name: torch.as_tensor(value) for name, value in way(model.state_dict()).items()}
    blank.load_state_dict(state)
    kind.assert_survived(blank, model)


def test_safetensors_take_the_state(kind: Any, tmp_path: Any) -> None:
    model, twin = kind.adapted(), kind.adapted(init_lora_weights=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    kind.assert_survived(twin, model)


def test_assigning_takes_the_digital_part_only(kind: Any) -> None:
    model, twin = kind.adapted(), kind.adapted(init_lora_weights=True)
    state = clones(model.state_dict())
    twin.load_state_dict(state, assign=True)
    kind.assert_survived(twin, model)
    assert not any(p.requires_grad for n, p in twin.named_parameters() if "lora_" not in n)
    for value in state.values():
        value.zero_()
    al.verify(twin)


def changed(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    state = dict(state)
    if what == "missing":
        del state["layers.0.analog_module.scale"], state["layers.0.bias"]
    else:
        state["layers.2.analog_module.analog_ctx"] = state["layers.2.weight"] = torch.ones(3)
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r'Missing.*"layers\.0\.bias", "layers\.0\.analog_module\.scale"'),
        ("unexpected", r'"layers\.2\.weight", "layers\.2\.analog_module\.analog_ctx"'),
    ],
    ids=["missing", "unexpected"],
)
def test_keys_that_do_not_fit_are_named(kind: Any, what: str, message: str) -> None:
    model = kind.frozen()
    state = changed(model.state_dict(), what)
    with pytest.raises(RuntimeError, match=message):
        kind.frozen().load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert len(result.missing_keys + result.unexpected_keys) == 2
    kind.assert_survived(model, kind.frozen())


def test_a_layer_is_loaded_as_a_whole_or_not_at_all(kind: Any) -> None:
    model, blank, untouched = kind.frozen(), kind.blank(), kind.blank()
    blank.load_state_dict(changed(model.state_dict(), "missing"), strict=False)
    al.verify(blank)
    assert al.fingerprint(blank.layers[0]) == al.fingerprint(untouched.layers[0])
    assert al.fingerprint(blank.layers[2]) == al.fingerprint(model.layers[2])


@pytest.mark.parametrize("strict", [True, False])
def test_another_tile_size_is_torchs_error_with_our_advice(
    fused_kind: Any, kind_of: Any, strict: bool
) -> None:
    other = kind_of(fused_kind.network, fused_kind.config, tile=5)
    state, model = other.frozen().state_dict(), fused_kind.frozen()
    message = (
        r"(?s)Error\(s\) in loading state_dict for Net.*layer 'layers\.0': expected "
        r"'layers\.0\.analog_module\.conductance' of shape .* got .*Convert with the tile sizes"
    )
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    al.verify(model)
    first, untouched = model.layers[0], fused_kind.frozen().layers[0]
    assert al.fingerprint(first) == al.fingerprint(untouched)


def test_content_that_contradicts_its_digest_is_refused(kind_of: Any) -> None:
    kind = kind_of()
    model, state = kind.frozen(), kind.frozen().state_dict()
    state["layers.2.analog_module.conductance"][1, 0, 5] += 0.125  # in columns 5 to 9
    before = al.fingerprint(model)
    match = r"'layers\.2\.analog_module\.conductance': .*whose digests the checkpoint holds"
    with pytest.raises(al.FrozenConductanceError, match=match):
        model.load_state_dict(state)
    assert al.fingerprint(model) == before
    al.verify(model)


def test_state_dicts_are_named_under_any_prefix(kind_of: Any) -> None:
    kind = kind_of()
    model, outer = kind.frozen(), nn.ModuleDict({"one": kind.frozen(), "two": kind.blank()})
    state = outer.state_dict()
    state |= {f"two.{name}": value for name, value in model.state_dict().items()}
    outer.load_state_dict(state)
    kind.assert_survived(outer["two"], outer["one"])
