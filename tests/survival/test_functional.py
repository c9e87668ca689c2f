"""torch.func, autograd and its helpers: a frozen layer is one more differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

import aihwkit_lora as al
from aihwkit_lora.tiles.layers import FrozenLayer


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda values, x: func.functional_call(model, values, (x,)).square().mean()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By the ordinary way, leaving nothing behind."""
    found = torch.autograd.grad(model(x).square().mean(), list(adapters(model).values()))
    return dict(zip(adapters(model), found, strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(bool(value.any()) for value in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_functional_call_swaps_adapters_and_only_these(kind: Any) -> None:
    model, other = kind.adapted(), kind.adapted()
    zeros = {name: torch.zeros_like(p) for name, p in adapters(model).items()}
    swapped = func.functional_call(model, zeros, (kind.x,))
    assert torch.equal(swapped, kind.frozen()(kind.x))
    kind.assert_survived(model, other)


def test_gradients_of_torch_func_are_those_of_autograd(kind: Any) -> None:
    model = kind.adapted()
    values = {name: p.detach() for name, p in adapters(model).items()}
    assert_close(func.grad(loss_of(model))(values, kind.x), gradients(model, kind.x))
    assert all(p.grad is None for p in model.parameters())


# torch 2.15 has no rule for the gradient of Tensor.unfold, which convolutions use, and loops.
@pytest.mark.filterwarnings("ignore:.*batching rule for aten..unfold_backward:UserWarning")
def test_gradients_of_each_sample_equal_a_loop(kind: Any) -> None:
    model, x = kind.adapted(), kind.batch(5)
    values = {name: p.detach() for name, p in adapters(model).items()}
    one = func.grad(lambda v, sample: loss_of(model)(v, sample[None]))
    found = func.vmap(one, in_dims=(None, 0))(values, x)
    for index, sample in enumerate(x):
        expected = gradients(model, sample[None])
        assert_close({name: value[index] for name, value in found.items()}, expected)


def test_the_jacobian_of_a_layer_is_its_weight(linear_kind: Any) -> None:
    layer = linear_kind.frozen().layers[0]
    found = func.jacrev(layer)(linear_kind.x[0])
    if linear_kind.config == "pulsed" and linear_kind.engine == "reference":
        # Its gradients pass converters of their own on the way back (rpu_config.backward).
        torch.testing.assert_close(found, torch.as_tensor(layer.weight), rtol=0, atol=0.05)
    else:
        torch.testing.assert_close(found, torch.as_tensor(layer.weight), rtol=0, atol=1e-6)


def test_autograd_leaves_nothing_behind(kind: Any) -> None:
    model, x = kind.adapted(), kind.x.requires_grad_()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert bool(gradient.any())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())
    kind.assert_survived(model, kind.adapted())


def perfect(kind: Any) -> nn.Module:
    """The same model without converters, so that it is the linear map itself."""
    model = kind.frozen()
    for layer in [layer for _, layer in al.frozen_layers(model)]:
        for name in ("forward", "backward"):
            direction = getattr(layer.analog_module.rpu_config, name, None)
            if direction is not None:
                direction.is_perfect = True
    return al.freeze_(al.thaw_(model), programmed_by="tests", engine=kind.engine)


def digital_twin(layer: FrozenLayer) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        twin: nn.Module = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding
        )
    else:
        twin = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        twin.weight.copy_(torch.as_tensor(layer.weight))
        twin.bias.copy_(layer.bias)
    return twin


def double_backward(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).pow(3).mean(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().mean(), x)
    return first.detach(), second


def test_double_backward_is_that_of_a_digital_layer(kind: Any) -> None:
    layer = perfect(kind).layers[0]
    found, expected = double_backward(layer, kind.x), double_backward(digital_twin(layer), kind.x)
    assert bool(expected[1].any())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reads_without_gradients_are_the_same(kind: Any, mode: Any) -> None:
    model = kind.adapted()
    with mode():
        output = model(kind.x)
    assert not output.requires_grad
    assert torch.equal(output, kind.adapted()(kind.x))
    kind.assert_survived(model, kind.adapted())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_activations_gives_the_same_gradients(kind: Any, reentrant: bool) -> None:
    model, x = kind.adapted(), kind.x.requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    expected = gradients(kind.adapted(), kind.x)
    assert all(torch.equal(p.grad, expected[name]) for name, p in adapters(model).items())


def test_recomputed_reads_draw_the_same_noise(kind_of: Any) -> None:
    model = kind_of(noisy=True).adapted()
    torch.manual_seed(0)
    checkpoint(model, model_input := kind_of().x, use_reentrant=False).square().mean().backward()
    torch.manual_seed(0)
    expected = gradients(model, model_input)
    assert all(torch.equal(p.grad, expected[name]) for name, p in adapters(model).items())


def test_autocast_reaches_adapters_only(kind: Any) -> None:
    bare, model = kind.frozen(), kind.adapted()
    plain = bare(kind.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bare(kind.x), plain)
        output = model(kind.x).float()
    output.square().mean().backward()
    exact, expected = gradients(kind.adapted(), kind.x), kind.adapted()(kind.x)
    output, expected = output.detach(), expected.detach()
    assert not torch.equal(output, expected)
    assert float((output - expected).norm() / expected.norm()) < 0.1
    for name, p in adapters(model).items():
        # Rounding to 8 bits moves a few values across a step of an ADC or the kink of a ReLU.
        assert float((p.grad - exact[name]).norm() / exact[name].norm()) < 0.25
    kind.assert_survived(model, kind.adapted())


def test_vectors_of_parameters_hold_no_conductance(kind: Any) -> None:
    model = kind.adapted()
    vector = parameters_to_vector(model.parameters())
    sizes = [p.numel() for n, p in model.named_parameters() if "lora_" in n or n.endswith("bias")]
    assert len(vector) == sum(sizes)
    vector_to_parameters(vector.detach().clone(), model.parameters())
    kind.assert_survived(model, kind.adapted())


def test_norms_are_clipped_over_adapters(kind: Any) -> None:
    model = kind.adapted()
    model(kind.x).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in adapters(model).values()]).norm()
    found = clip_grad_norm_(model.parameters(), 0.01, error_if_nonfinite=True)
    torch.testing.assert_close(found, expected)
    assert found > 0.01
    clipped = torch.cat([p.grad.flatten() for p in adapters(model).values()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.01), rtol=1e-3, atol=0)
