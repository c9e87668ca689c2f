"""Watching training in place: the programming pulses that aihwkit's pulsed tiles take.

Every pulse that aihwkit 1.2.0 trains with passes through ``update`` or ``update_indexed`` of its
C++ tile, whoever calls it: an analogue optimiser, ``program_weights``, a TikiTaka tile written in
torch. While a watch runs, these two methods of the C++ class count as well as update. Nothing is
attached to a model, so its copies, checkpoints and moves between devices stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.tiles.module import TileModule
from torch import Generator, Tensor, nn

from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.pulse_counters import (
    PULSED_TILES,
    Method,
    PulseCounter,
    Site,
    Taken,
    Update,
    counter_of,
)
from aihwkit_lora.tiles.freeze import plain_name
from aihwkit_lora.tiles.layers import FrozenLayer


@dataclass(frozen=True)
class _Watched:
    """A tile of the model; without a counter, it takes no pulses."""

    site: Site
    place: str
    handle: Any
    counter: PulseCounter | None


class PulseWatch:
    """Counts the pulses of a model's updates while it is started. Made by :func:`watch_pulses`.

    Args:
        model: See :func:`watch_pulses`.
        ledger: See :func:`watch_pulses`.
        phase: See :func:`watch_pulses`; may be changed while it runs.
        method: See :func:`watch_pulses`.
        seed: See :func:`watch_pulses`.
        wear: See :func:`watch_pulses`.
    Raises:
        ConfigurationError: The method is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        *,
        phase: str,
        method: Method = "simulated",
        seed: int = 0,
        wear: bool = False,
    ) -> None:
        if method not in get_args(Method):
            raise ConfigurationError(
                f"method: expected one of {', '.join(get_args(Method))}, got {method!r}."
            )
        self.model, self.ledger, self.phase = model, ledger, phase
        self.method, self.tracks_wear = method, wear
        self._seed, self._updates = seed, 0
        self._known: dict[int, _Watched] = {}
        self._wear: dict[tuple[str, str], list[Tensor]] = {}

    def start(self) -> PulseWatch:
        """Begin to count.

        Raises:
            StageError: This watch runs already, or another one counts the model into this ledger.
            UnsupportedTileError: A layer is trained in a way whose pulses cannot be counted.
        """
        if self in _RUNNING:
            raise StageError("watch_pulses: expected a watch that is not running, got one that is.")
        self._scan()
        self._require_alone()
        _RUNNING.append(self)
        if len(_RUNNING) == 1:
            _hook()
        return self

    def stop(self) -> None:
        """End counting; harmless if it is not running."""
        self._known = {}
        if self in _RUNNING:
            _RUNNING.remove(self)
            if not _RUNNING:
                _unhook()

    def __enter__(self) -> PulseWatch:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wear(self) -> dict[str, int]:
        """Most pulses that any one cell took in updates seen by this watch, by layer.

        Raises:
            StageError: The watch was made without ``wear=True``.
        """
        if not self.tracks_wear:
            raise StageError(
                "watch_pulses: expected a watch that keeps the pulses of each cell, got one that "
                "does not. Pass wear=True."
            )
        worst: dict[str, int] = {}
        for (layer, _), cells in self._wear.items():
            most = max(int(pulses.max()) for pulses in cells)
            worst[layer] = max(worst.get(layer, 0), most)
        return worst

    def state_dict(self) -> dict[str, int]:
        """What later draws depend on, as whole numbers, for checkpoints; not the wear."""
        return {"seed": self._seed, "updates": self._updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on drawing where the watch of a checkpoint stopped.

        Args:
            state: What :meth:`state_dict` gave.
        """
        self._seed, self._updates = state["seed"], state["updates"]

    def generator(self) -> Generator:
        """Random numbers for the next update; they depend on the seed and its number only."""
        text = f"{self._seed}/{self._updates}".encode()
        self._updates += 1
        digest = hashlib.blake2b(text, digest_size=4).digest()
        return Generator().manual_seed(int.from_bytes(digest))

    @torch.no_grad()
    def begin(self, update: Update) -> Callable[[], None] | None:
        """Get ready for an update.

        Args:
            update: What is about to happen to a tile of any model.
        Returns:
            Called after the update, adds its pulses to the ledger; None if there are none.
        Raises:
            UnsupportedTileError: The tile is new in this model, and its pulses cannot be counted.
        """
        watched = self._find(update.handle)
        if watched is None or watched.counter is None or update.handle.get_learning_rate() == 0.0:
            return None
        finish = watched.counter.begin(update, self)
        return lambda: self._add(watched, finish())

    def _add(self, watched: _Watched, taken: Taken) -> None:
        pulses = {"set_pulses": taken.set_pulses, "reset_pulses": taken.reset_pulses}
        self.ledger.add(
            Counts(pulses, level=taken.level), phase=self.phase, layer=watched.site.layer
        )
        if taken.cells:
            place = (watched.site.layer, watched.place)
            before = self._wear.get(place, [])
            sums = [new + old for new, old in zip(taken.cells, before, strict=False)]
            self._wear[place] = sums + taken.cells[len(sums) :]

    def _find(self, handle: Any) -> _Watched | None:
        watched = self._known.get(id(handle))
        if watched is None or watched.site.tile.tile is not handle:
            self._scan()  # loading, moving or replacing a layer makes new C++ tiles
            watched = self._known.get(id(handle))
        return watched

    def _scan(self) -> None:
        found = (self._watched(place, site) for place, site in _sites(self.model))
        self._known = {id(watched.handle): watched for watched in found}

    def _watched(self, place: str, site: Site) -> _Watched:
        handle = site.tile.tile
        before = self._known.get(id(handle))
        if before is not None:  # a counter goes on from what it read last
            return before
        return _Watched(site, place, handle, counter_of(site, wear=self.tracks_wear))

    def _require_alone(self) -> None:
        for other in _RUNNING:
            shared = self._known.keys() & other._known.keys()
            if other.ledger is self.ledger and shared:
                layer = self._known[shared.pop()].site.layer
                raise StageError(
                    f"layer '{layer}': expected a ledger that does not count its pulses yet, got "
                    "one that does; they would count twice. Stop the other watch, or use a ledger "
                    "of its own."
                )


def watch_pulses(
    model: nn.Module,
    ledger: Ledger,
    *,
    phase: str,
    method: Method = "simulated",
    seed: int = 0,
    wear: bool = False,
) -> PulseWatch:
    """Count the SET and RESET pulses of training in place, until the ``with`` block ends.

    Counted where a pulsed tile of aihwkit is updated: by ``AnalogSGD`` and its kin, whatever the
    number of accumulated gradients, and by a tile's own ``program_weights``. On CUDA, aihwkit's
    counters give exact numbers. On the CPU it counts none; there, the trains are drawn once more
    from the inputs, gradients and settings of each update. They follow the law of those that
    aihwkit draws, but are not the same ones (level ``simulated``); deterministic trains are exact.
    Frozen, inference and floating-point tiles take no pulses. Setting weights, resetting, decay,
    diffusion and drift happen without pulses and are not counted.

    Args:
        model: Any model; PEFT's names are left out of the ledger.
        ledger: Where ``set_pulses`` and ``reset_pulses`` are added, by layer.
        phase: Under which name.
        method: On the CPU, for stochastic trains: ``"simulated"`` draws them, ``"mean"`` takes the
            mean over all trains that the same inputs could cause, rounded at random, which is
            cheaper and closer to what aihwkit drew.
        seed: Of the draws; the random numbers of aihwkit and torch are left alone.
        wear: Whether to keep the pulses of each cell for :meth:`PulseWatch.wear`. Needs a number
            per cell and, on the CPU, two matrix products per update; trains are then always drawn.
    Returns:
        A context manager; its ``phase`` may be changed inside the block.
    Raises:
        ConfigurationError: The method is unknown.
        StageError: On entering; see :meth:`PulseWatch.start`.
        UnsupportedTileError: On entering, or at the first update after such a layer was put in.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit.nn import AnalogLinear
        >>> from aihwkit.optim import AnalogSGD
        >>> from aihwkit.simulator.configs import PulseType, SingleRPUConfig, UpdateParameters
        >>> update = UpdateParameters(pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
        >>> layer = AnalogLinear(3, 1, bias=False, rpu_config=SingleRPUConfig(update=update))
        >>> model, ledger = nn.Sequential(layer), al.Ledger()
        >>> optimizer = AnalogSGD(model.parameters(), lr=0.01)
        >>> with watch_pulses(model, ledger, phase="learn"):
        ...     model(torch.tensor([[1.0, -0.5, 0.0]])).sum().backward()
        ...     optimizer.step()
        >>> ledger.total(phase="learn", layer="0")
        Counts(reset_pulses=10, set_pulses=5; exact)
    """
    return PulseWatch(model, ledger, phase=phase, method=method, seed=seed, wear=wear)


def _sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Names and sites of all tiles that are not frozen."""
    layer, owner = "", model
    for name, module in model.named_modules():
        if isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER:
            layer, owner = name, module
        if not isinstance(module, TileModule):
            continue
        if not isinstance(owner, AnalogLayerBase) or not _inside(name, layer):
            yield name, Site(plain_name(name), module, module)
        elif not isinstance(owner, FrozenLayer):
            yield name, Site(plain_name(layer), owner, module)


def _inside(name: str, layer: str) -> bool:
    return layer == "" or name.startswith(f"{layer}.")


_RUNNING: list[PulseWatch] = []
_UNDO: list[Callable[[], None]] = []


def _hook() -> None:
    """Let the C++ tiles report their updates."""
    for kind in PULSED_TILES:
        for name, read in (("update", _read_update), ("update_indexed", _read_indexed)):
            _UNDO.append(_undo(kind, name))
            setattr(kind, name, _reporting(getattr(kind, name), read))


def _unhook() -> None:
    while _UNDO:
        _UNDO.pop()()


def _undo(kind: type, name: str) -> Callable[[], None]:
    if name in vars(kind):
        own = vars(kind)[name]
        return lambda: setattr(kind, name, own)
    return lambda: delattr(kind, name)  # it was inherited


def _reporting(original: Callable[..., None], read: Callable[..., Update]) -> Callable[..., None]:
    def update(handle: Any, *inputs: Any, **named: Any) -> None:
        seen = read(handle, *inputs, **named)
        endings = [watch.begin(seen) for watch in _RUNNING]
        original(handle, *inputs, **named)
        for end in endings:
            if end is not None:
                end()

    return update


def _read_update(
    handle: Any,
    x_input: Tensor,
    d_input: Tensor,
    bias: bool,
    # aihwkit 1.2.0 has these two names the wrong way round; what counts is their place.
    d_trans: bool = False,
    x_trans: bool = False,
    non_blocking: bool = False,
) -> Update:
    return Update(handle, x_input, d_input, bias, x_transposed=d_trans, d_transposed=x_trans)


def _read_indexed(
    handle: Any, x_input: Tensor, d_input: Tensor, non_blocking: bool = False
) -> Update:
    return Update(handle, x_input, d_input, indexed=True)
