"""The recurrent spiking network of the speaker workload: 336,384 weights in three linear layers.

The neuron is the leaky integrate-and-fire cell of arXiv:2601.10037's code. Plain torch computes it
by default; snntorch does, spike for spike the same, where it is installed (extra ``snn``). The loop
over time is our own: snntorch's recurrent cells call their recurrent layer twice per step when they
reset to zero, which would double every read of an array, and draw its noise twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.registry import Registry

BANDS = 140
"""Inputs of the network: bands of a cochlea."""

WINDOWS = 10
"""Time steps of a clip."""

LORA_TARGETS = ["input", "recurrent"]
"""Layers that get a LoRA branch: those with at least 10,000 weights."""

THRESHOLD = 0.3
DECAY = 0.5
SURROGATE_HALF_WIDTH = 0.25


class Neuron(Protocol):
    """A layer of spiking neurons, one time step per call."""

    def __call__(self, current: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """Integrate a current; return spikes (0 or 1) and the potential after the reset."""


NEURONS: Registry[Callable[[], nn.Module]] = Registry("neuron")
"""Makers of :class:`Neuron` modules, by name."""


class _Spike(torch.autograd.Function):
    """A step forwards, a rectangle backwards: its height makes its area 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(excess: Tensor) -> Tensor:
        return (excess > 0.0).to(excess.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (excess,) = ctx.saved_tensors
        near: Tensor = excess.abs() < SURROGATE_HALF_WIDTH
        return grads[0] * near / (2.0 * SURROGATE_HALF_WIDTH)


def spike(excess: Tensor) -> Tensor:
    """Fire where the potential is above the threshold.

    The gradient is that of a ramp of half-width 0.25 around the threshold.

    Args:
        excess: Potential minus threshold, any shape.
    Returns:
        0 or 1, same shape.

    Example:
        >>> spike(torch.tensor([-0.1, 0.0, 0.1]))
        tensor([0., 0., 1.])
    """
    fired: Tensor = _Spike.apply(excess)
    return fired


class LeakyIntegrateAndFire(nn.Module):
    """Leaky integrate-and-fire neurons that reset to zero by multiplication.

    u ← 0.5·u + current, a spike where u > 0.3, then u ← u·(1 − spike).

    Example:
        >>> neuron, u = LeakyIntegrateAndFire(), torch.zeros(1)
        >>> for _ in range(3):
        ...     s, u = neuron(torch.tensor([0.18]), u)
        ...     print(s.item(), round(u.item(), 3))
        0.0 0.18
        0.0 0.27
        1.0 0.0
    """

    def forward(self, current: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """Integrate one time step.

        Args:
            current: What flows in, any shape.
            potential: After the last step, same shape.
        Returns:
            Spikes and the potential after the reset.
        """
        charged = DECAY * potential + current
        spikes = spike(charged - THRESHOLD)
        return spikes, charged - spikes * charged


NEURONS.add("torch", LeakyIntegrateAndFire)


class SnntorchNeuron(nn.Module):
    """The same neurons, computed by snntorch's ``Leaky``.

    Raises:
        ConfigurationError: snntorch is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            snntorch = importlib.import_module("snntorch")
        except ImportError as error:
            raise ConfigurationError(
                "neuron 'snntorch': expected snntorch to be installed, got none. Install "
                "aihwkit-lora[snn], or choose neuron 'torch', which computes the same."
            ) from error
        self.leaky = snntorch.Leaky(
            beta=DECAY,
            threshold=THRESHOLD,
            spike_grad=spike,
            reset_mechanism="zero",
            reset_delay=False,
        )

    def forward(self, current: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """Integrate one time step, as :meth:`LeakyIntegrateAndFire.forward` does."""
        spikes, potential = self.leaky(current, potential)
        # It would keep tensors with their whole graph, which nobody could copy or save.
        self.leaky.mem = self.leaky.reset = torch.zeros(0)
        return spikes, potential


NEURONS.add("snntorch", SnntorchNeuron)


class SpikingNet(nn.Module):
    """Tell speakers apart by the spikes of recurrent neurons, counted over a clip.

    In every time step the input layer reads the cochlea's spike counts and the recurrent layer the
    neurons' own spikes of the step before; the head reads mean spike counts once per clip. With the
    defaults that is 336,384 weights and 3,340,800 multiply–accumulates per clip, if none is
    skipped. All layers have biases.

    Args:
        bands: Inputs per time step.
        neurons: Hidden neurons.
        outputs: Speakers.
        neuron: Who computes the neurons, see :data:`NEURONS`.
    Raises:
        ConfigurationError: A size is below 1, or the neuron's library is missing.
        UnknownNameError: There is no such neuron.

    Example:
        >>> net = SpikingNet()
        >>> sum(p.numel() for p in net.parameters() if p.ndim == 2)
        336384
        >>> net(torch.rand(3, 10, 140)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        *,
        bands: int = BANDS,
        neurons: int = 512,
        outputs: int = 5,
        neuron: str = "torch",
    ) -> None:
        super().__init__()
        if min(bands, neurons, outputs) < 1:
            raise ConfigurationError(
                f"spiking net: expected bands, neurons and outputs of at least 1, got {bands}, "
                f"{neurons} and {outputs}."
            )
        self.bands, self.neurons = bands, neurons
        self.input = nn.Linear(bands, neurons)
        self.recurrent = nn.Linear(neurons, neurons)
        self.neuron = NEURONS.get(neuron)()
        self.head = nn.Linear(neurons, outputs)

    def forward(self, clips: Tensor) -> Tensor:
        """Score clips.

        Args:
            clips: Scaled spike counts of the cochlea, shape ``(clips, windows, bands)``.
        Returns:
            Logits, shape ``(clips, outputs)``.
        Raises:
            DataError: The clips have another shape.
        """
        logits: Tensor = self.head(self.rates(clips))
        return logits

    def rates(self, clips: Tensor) -> Tensor:
        """Mean spike count of each hidden neuron, shape ``(clips, neurons)``.

        Args:
            clips: See :meth:`forward`.
        Raises:
            DataError: The clips have another shape.
        """
        if clips.ndim != 3 or clips.shape[2] != self.bands:
            raise DataError(
                f"expected clips of shape (n, windows, {self.bands}), found {tuple(clips.shape)}."
            )
        spikes = potential = clips.new_zeros(len(clips), self.neurons)
        total = torch.zeros_like(spikes)
        for window in clips.unbind(dim=1):
            # The first step sends zeros round the loop: they drive no row, but the bias counts.
            current = self.input(window) + self.recurrent(spikes)
            spikes, potential = self.neuron(current, potential)
            total = total + spikes
        return total / clips.shape[1]


class WiderHead(nn.Module):
    """A head and digital rows for outputs that came later.

    Args:
        old: Gives the first outputs.
        features: Size of its input.
        outputs: How many to add.

    Example:
        >>> WiderHead(nn.Linear(4, 2), 4, 1)(torch.zeros(3, 4)).shape
        torch.Size([3, 3])
    """

    def __init__(self, old: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.old, self.new = old, nn.Linear(features, outputs)

    def forward(self, rates: Tensor) -> Tensor:
        """Compute old outputs, then new ones; shape ``(clips, outputs)``."""
        return torch.cat([self.old(rates), self.new(rates)], dim=-1)
