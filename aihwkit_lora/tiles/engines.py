"""How a frozen layer computes: one blocked product for all tiles, or aihwkit's own tiles.

The *fused* engine follows converters and noise itself and is fast. The *reference* engine reads
with tiles of aihwkit, for non-idealities that the fused one lacks. Which tiles there are, and what
each needs, stands in one table, :data:`TILES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from aihwkit.simulator.configs.configs import SingleRPUConfig
from aihwkit.simulator.configs.devices import IdealDevice
from aihwkit.simulator.tiles.analog import AnalogTile
from aihwkit.simulator.tiles.custom import CustomSimulatorTile, CustomTile
from aihwkit.simulator.tiles.floating_point import FloatingPointTile
from aihwkit.simulator.tiles.inference import InferenceTile
from aihwkit.simulator.tiles.inference_torch import TorchInferenceTile
from aihwkit.simulator.tiles.module import TileModule
from aihwkit.simulator.tiles.quantized_inference_torch import QuantizedTorchInferenceTile
from aihwkit.simulator.tiles.torch_tile import TorchSimulatorTile
from aihwkit.simulator.tiles.transfer import TorchTransferTile
from torch import Tensor

from aihwkit_lora.errors import ConfigurationError, UnsupportedTileError
from aihwkit_lora.tiles.blocked import ReadProbe, blocked_mvm, transposed_mvm
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.periphery import Lack, TileIO, missing

if TYPE_CHECKING:
    from aihwkit_lora.tiles.grid import TileGrid

EngineName = Literal["auto", "fused", "reference"]


class Engine(Protocol):
    """What a frozen layer computes with; it holds no conductance of its own."""

    @property
    def name(self) -> str:
        """``"fused"`` or ``"reference"``."""

    @property
    def reason(self) -> str:
        """Why this engine and not the other, as a sentence without its subject."""

    def read(
        self,
        x: Tensor,
        tensors: TileTensors,
        blocks: Blocks,
        probes: tuple[ReadProbe, ...] = (),
    ) -> Tensor:
        """Read all tiles; from ``(vectors, in_features)`` to ``(vectors, out_features)``."""

    def read_back(self, grad: Tensor, tensors: TileTensors, blocks: Blocks) -> Tensor:
        """Read all tiles backwards; from ``(vectors, out_features)`` to ``(…, in_features)``."""

    def finish(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """What the digital periphery does with the sum of all tiles."""

    def refill(self, grid: TileGrid) -> None:
        """Give an ordinary layer what the engine has of the frozen one."""

    def for_tile(self, index: int) -> Engine:
        """The engine that reads one tile as if it were a layer, inputs first."""


@dataclass(frozen=True, eq=False)
class FusedEngine:
    """All tiles of a layer in few batched products, in pure torch.

    Args:
        io: Converters and noise of each tile.
        reason: Why it was chosen.
    """

    io: TileIO
    reason: str = "follows all of the tile's settings"
    name: str = "fused"

    def read(
        self,
        x: Tensor,
        tensors: TileTensors,
        blocks: Blocks,
        probes: tuple[ReadProbe, ...] = (),
    ) -> Tensor:
        """See :func:`~aihwkit_lora.tiles.blocked.blocked_mvm`."""
        return blocked_mvm(x, tensors, blocks, self.io, probes)

    def read_back(self, grad: Tensor, tensors: TileTensors, blocks: Blocks) -> Tensor:
        """See :func:`~aihwkit_lora.tiles.blocked.transposed_mvm`."""
        return transposed_mvm(grad, tensors, blocks)

    def finish(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """Add the digital bias."""
        return y if bias is None else y + bias

    def refill(self, grid: TileGrid) -> None:
        """Do nothing: all there is stands in the tensors."""

    def for_tile(self, index: int) -> FusedEngine:
        """The same engine: all tiles of a layer have the same converters."""
        return self


def _nothing(tile: TileModule) -> Lack | None:
    return None


def _same(config: Any) -> Any:
    return config


@dataclass(frozen=True, kw_only=True)
class TileKind:
    """How tiles of one class of aihwkit are frozen.

    Args:
        whole_batch: Whether bound management works on whole batches (aihwkit's torch tiles) or on
            each vector (its C++ tiles).
        lacks: Says what, besides settings of ``rpu_config.forward``, the fused engine does not
            follow for a tile; None for nothing.
        reader: From the tile's configuration to that of the aihwkit tile that the reference
            engine reads with.
        reader_class: Class of that tile; None for the class itself.
        noisy_backward: Whether gradients pass converters and noise of their own on the way back
            (``rpu_config.backward``), which the reference engine follows.
    """

    whole_batch: bool
    lacks: Callable[[TileModule], Lack | None] = _nothing
    reader: Callable[[Any], Any] = _same
    reader_class: type[TileModule] | None = None
    noisy_backward: bool = False


TILES: dict[type[TileModule], TileKind] = {}
"""Tiles that can be frozen, by their exact class: a subclass may compute anything."""


def add_tile(tile_class: type[TileModule], kind: TileKind) -> None:
    """Say how tiles of a class are frozen.

    Args:
        tile_class: Class of aihwkit tiles, perhaps one of your own. Its ``tile.get_weights()``
            gives the conductances.
        kind: How they are read.
    Raises:
        ConfigurationError: The class has a kind already.

    Example:
        >>> class OwnTile(TorchInferenceTile): ...
        >>> add_tile(OwnTile, TileKind(whole_batch=True))
        >>> TILES.pop(OwnTile).whole_batch
        True
    """
    if tile_class in TILES:
        raise ConfigurationError(
            f"add_tile: expected a class without a kind, got {tile_class.__name__}, which has one. "
            "Derive a class of your own."
        )
    TILES[tile_class] = kind


def kind_of(tile: TileModule, layer: str) -> TileKind:
    """Find how a tile is frozen.

    Args:
        tile: A tile of aihwkit.
        layer: Full name of its layer, for the error message.
    Raises:
        UnsupportedTileError: Nobody has said how.
    """
    if type(tile) not in TILES:
        known = ", ".join(sorted(each.__name__ for each in TILES))
        raise UnsupportedTileError(
            f"layer '{layer}': expected tiles of a class that can be frozen ({known}), got "
            f"{type(tile).__name__}. Add it with aihwkit_lora.tiles.engines.add_tile("
            f"{type(tile).__name__}, TileKind(...)), or convert this layer with another RPUConfig."
        )
    return TILES[type(tile)]


def fused_engine(tile: TileModule, layer: str) -> FusedEngine | Lack:
    """Make the fused engine of a layer, or say what it lacks.

    Args:
        tile: One tile of the layer; the others have the same configuration.
        layer: Full name of the layer, for error messages.
    """
    kind = kind_of(tile, layer)
    forward = getattr(tile.rpu_config, "forward", None)
    if forward is None:
        return FusedEngine(TileIO.ideal())
    if lacking := kind.lacks(tile) or missing(forward):
        return lacking
    return FusedEngine(TileIO.from_aihwkit(forward, whole_batch=kind.whole_batch, layer=layer))


def _other_simulator(expected: type) -> Callable[[TileModule], Lack | None]:
    def lacks(tile: TileModule) -> Lack | None:
        found = tile.rpu_config.simulator_tile_class
        if found is expected:
            return None
        return Lack("simulator_tile_class", expected.__name__, found.__name__)

    return lacks


def _quantised(tile: TileModule) -> Lack | None:
    return Lack("tile_class", TorchInferenceTile.__name__, type(tile).__name__)


def _with_ideal_cells(config: Any) -> SingleRPUConfig:
    """The same converters around cells that hold any weight exactly, and are never pulsed."""
    return SingleRPUConfig(
        device=IdealDevice(),
        forward=config.forward,
        backward=config.backward,
        mapping=config.mapping,
        pre_post=config.pre_post,
    )


_PULSED = TileKind(
    whole_batch=False,
    reader=_with_ideal_cells,
    reader_class=AnalogTile,
    noisy_backward=True,
)
add_tile(InferenceTile, TileKind(whole_batch=False))
add_tile(AnalogTile, _PULSED)
add_tile(TorchTransferTile, _PULSED)
add_tile(FloatingPointTile, TileKind(whole_batch=False))
add_tile(TorchInferenceTile, TileKind(whole_batch=True, lacks=_other_simulator(TorchSimulatorTile)))
add_tile(
    CustomTile,
    TileKind(whole_batch=True, lacks=_other_simulator(CustomSimulatorTile), noisy_backward=True),
)
add_tile(QuantizedTorchInferenceTile, TileKind(whole_batch=True, lacks=_quantised))
