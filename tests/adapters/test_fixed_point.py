"""Fixed point against integers: codes in Python fractions, products in 64-bit integers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from aihwkit_lora.adapters import DigitalUnit
from aihwkit_lora.adapters.fixed_point import ON_UNIT, OnUnit, fixed_point

BITS = st.integers(2, 16)
VALUES = arrays("float32", (3, 5), elements=st.floats(-1e6, 1e6, width=32))


def codes(values: Tensor, bits: int) -> tuple[Tensor, int]:
    """Integer codes and the exponent that they share, by trying exponents from below."""
    exact = [Fraction(value) for value in values.flatten().tolist()]
    peak, largest, exponent = max(map(abs, exact)), 2 ** (bits - 1) - 1, -400
    if peak == 0:
        return torch.zeros(values.shape, dtype=torch.int64), 0
    while largest * Fraction(2) ** exponent < peak:
        exponent += 1
    integers = [round(value / Fraction(2) ** exponent) for value in exact]  # halves to even
    return torch.tensor(integers, dtype=torch.int64).view(values.shape), exponent


def value_of(integers: Tensor, exponent: int) -> Tensor:
    exact = [float(code * Fraction(2) ** exponent) for code in integers.flatten().tolist()]
    return torch.tensor(exact, dtype=torch.float64).view(integers.shape)


def on_unit(layer: nn.Module, bits: int | None, **settings: str) -> OnUnit:
    layer.__class__ = ON_UNIT[type(layer)]
    layer.unit = DigitalUnit(bits=bits, **settings)  # type: ignore[arg-type,assignment]
    assert isinstance(layer, OnUnit)
    return layer


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@given(VALUES, BITS)
def test_rounding_is_that_of_integers(values: object, bits: int) -> None:
    x = torch.tensor(values)
    found = fixed_point(x, bits)
    integers, exponent = codes(x, bits)
    assert integers.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(found, value_of(integers, exponent))


@given(VALUES, BITS)
def test_a_number_on_the_grid_stays(values: object, bits: int) -> None:
    once = fixed_point(torch.tensor(values), bits, (-1,))
    assert torch.equal(fixed_point(once, bits, (-1,)), once)


@given(VALUES, BITS)
def test_rounding_knows_no_sign(values: object, bits: int) -> None:
    x = torch.tensor(values)
    assert torch.equal(fixed_point(-x, bits), -fixed_point(x, bits))


@given(VALUES, BITS, st.integers(-60, 60))
def test_powers_of_two_pass_through(values: object, bits: int, shift: int) -> None:
    x = torch.tensor(values).double()
    assert torch.equal(fixed_point(x * 2.0**shift, bits), fixed_point(x, bits) * 2.0**shift)


@given(VALUES, st.integers(2, 15))
def test_one_more_bit_never_makes_a_number_worse(values: object, bits: int) -> None:
    x = torch.tensor(values)
    coarse, fine = ((fixed_point(x, b) - x).abs() for b in (bits, bits + 1))
    assert bool((fine <= coarse).all())
    assert float(coarse.max()) <= float(x.abs().max()) / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("exponent", [-148, -127, -126, 127])
def test_the_ends_of_the_float_range_are_no_exception(exponent: int) -> None:
    x = torch.tensor([2.0**exponent, -(2.0 ** (exponent - 1)), 0.0])
    assert torch.equal(fixed_point(x, 16), x.double())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_pass_for_a_number(bad: float) -> None:
    found = fixed_point(torch.tensor([[1.0, 2.0], [1.0, bad]]), 8, (-1,))
    assert torch.equal(found[0], torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert not bool(found[1, 1].isfinite())


def test_gradients_pass_straight_through() -> None:
    x = torch.tensor([0.9, -0.3, 7.0], requires_grad=True)
    (fixed_point(x, 4) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_equal_to_integers(bits: int, bias: bool) -> None:
    layer = seeded(lambda: nn.Linear(300, 7, bias=bias))
    weight, bias_held = layer.weight.detach(), layer.bias.detach() if bias else torch.zeros(7)
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1.0], [1e-3], [50.0], [0.0]]
    )
    found = on_unit(layer, bits)(x)
    (w, w_exponent), (b, b_exponent) = codes(weight, bits), codes(bias_held, bits)
    for vector, output in zip(x, found, strict=True):
        v, v_exponent = codes(vector, bits)
        sums = [
            s * Fraction(2) ** (v_exponent + w_exponent) + c * Fraction(2) ** b_exponent
            for s, c in zip((w @ v).tolist(), b.tolist(), strict=True)
        ]
        # The sums span fewer than 53 bits, so that floats hold them exactly.
        exact = torch.tensor([float(s) for s in sums], dtype=torch.float64)
        assert torch.equal(output, value_of(*codes(exact, bits)).float())
    assert found.dtype == torch.float32


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, bias=False), (4, 7, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 5, 4)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_a_convolution_is_equal_to_integers(kind: str, bits: int) -> None:
    make, shape = CONVOLUTIONS[kind]
    layer, exact = seeded(make), seeded(make).double()
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    found = on_unit(layer, bits)(images)
    for parameter in exact.parameters():
        parameter.data = value_of(*codes(parameter.detach().float(), bits))
    for image, output in zip(images, found, strict=True):
        # Integers have no convolution in torch; 53 bits hold every sum of theirs.
        sums = exact(value_of(*codes(image, bits))).detach()
        assert torch.equal(output, value_of(*codes(sums, bits)).float())
    assert torch.equal(layer(images[0]), found[0])


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 3), lambda: nn.Conv1d(2, 3, 2)])
def test_floats_are_bit_equal_to_no_unit(make: Callable[[], nn.Module]) -> None:
    layer = seeded(make)
    x = torch.randn(4, 2, 6)
    plain = layer(x)
    assert torch.equal(on_unit(layer, None)(x), plain)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 3), lambda: nn.Conv1d(2, 3, 2)])
def test_an_empty_batch_stays_empty(make: Callable[[], nn.Module]) -> None:
    layer = on_unit(seeded(make), 8)
    assert layer(torch.ones(4, 2, 6))[:0].shape == layer(torch.ones(0, 2, 6)).shape


def test_vectors_do_not_see_each_other() -> None:
    layer = on_unit(seeded(lambda: nn.Linear(6, 3)), 4)
    x = torch.randn(2, 5, 6) * torch.logspace(-3, 3, 5)[:, None]
    alone = torch.stack([torch.stack([layer(vector) for vector in part]) for part in x])
    assert torch.equal(layer(x), alone)


def test_gradients_are_those_of_the_rounded_numbers() -> None:
    layer = on_unit(seeded(lambda: nn.Linear(6, 3)), 4)
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).sum().backward()
    rounded_x, rounded_w = fixed_point(x, 4, (-1,)).detach(), fixed_point(layer.weight, 4).detach()
    ones = torch.ones(5, 3, dtype=torch.float64)
    assert torch.equal(layer.weight.grad, (ones.T @ rounded_x).float())
    assert torch.equal(x.grad, (ones @ rounded_w).float())
    assert torch.equal(layer.bias.grad, torch.full((3,), 5.0))  # type: ignore[union-attr]


def test_autocast_rounds_nothing_away() -> None:
    layer = on_unit(seeded(lambda: nn.Linear(300, 3)), 8)
    x = torch.randn(5, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_the_weight_can_be_what_the_unit_holds() -> None:
    layer = on_unit(seeded(lambda: nn.Linear(6, 3)), 4)
    master = layer.weight
    with layer.holding():
        assert torch.equal(layer.weight, fixed_point(master, 4).float())
        layer.weight.sum().backward()
    assert layer.weight is master
    assert torch.equal(master.grad, torch.ones(3, 6))
    floats = on_unit(seeded(lambda: nn.Linear(6, 3)), None)
    with floats.holding():
        assert isinstance(floats.weight, nn.Parameter)
