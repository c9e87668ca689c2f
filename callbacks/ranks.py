"""The processes of a distributed run: each has some of the samples, all have the one chip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import FSDPStrategy

from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import EVENTS, Counts, Ledger, Part


def on_all_ranks[Found](own: Found, trainer: pl.Trainer) -> list[Found]:
    """Tell all processes what this one has found, and learn what they have.

    Args:
        own: Anything that can be pickled.
        trainer: Whose processes.
    Returns:
        What each has found, by rank; only one's own where training is not distributed.

    Example:
        >>> trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
        >>> on_all_ranks("3f2a", trainer)
        ['3f2a']
    """
    if ranks_of(trainer) is None:
        return [own]
    return _gathered(own)


def ranks_of(trainer: pl.Trainer) -> Ranks | None:
    """Find the processes that train together.

    Args:
        trainer: Any trainer.
    Returns:
        None if this process is alone.
    """
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    # ModelParallelStrategy shards too, but its distributed tensors tell the size of the whole.
    return Ranks(sharded=isinstance(trainer.strategy, FSDPStrategy))


class Ranks:
    """Brings together what the processes of a run count.

    Reads and multiply–accumulates belong to samples, of which each process has its own: they add
    up. Writing arrays and loading adapters happens to the one chip, of which each process has a
    copy: all must count the same, and it counts once.

    Args:
        sharded: Whether the parameters of each process are parts of the model's, as in FSDP, so
            that optimiser updates add up too. Otherwise all update the same ones.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.sharded = sharded

    def agree(self, counts: Counts) -> None:
        """See that all ranks have written the same.

        Args:
            counts: What this one has written.
        Raises:
            StageError: They have not; raised on every rank.
        """
        _require_agreement(_gathered(counts), "written arrays")

    def add_up(self, own: Ledger, total: Ledger) -> None:
        """Add what all ranks together have counted.

        Args:
            own: What this one has counted; stays as it is.
            total: Where everything is added, alike on all ranks.
        Raises:
            StageError: Of something that happens to the one chip, they have counted different
                things; raised on every rank.
        """
        ranks = [_entries(state) for state in _gathered(own.state_dict())]
        for phase, layer in dict.fromkeys(place for entries in ranks for place in entries):
            found = [entries.get((phase, layer), Counts()) for entries in ranks]
            once = self._counted_once(found)
            of_chip = [counts.only(once) for counts in found]
            _require_agreement(of_chip, f"phase '{phase}', layer '{layer}'")
            of_samples = (counts.only(set(counts) - once) for counts in found)
            total.add(of_chip[0] + Counts.sum(of_samples), phase=phase, layer=layer)

    def _counted_once(self, found: Sequence[Counts]) -> set[str]:
        """Which events of a layer happen to the chip, not to samples."""
        happened = {event for counts in found for event in counts}
        parts = {Part.WRITE} if self.sharded else {Part.WRITE, Part.OPTIMIZER}
        if "adapter_loads" in happened:  # then bits are moved for the load: layers of adapters have
            parts.add(Part.TRANSFER)  # names of their own, under which their traffic is counted
        return {event for event in happened if EVENTS.get(event).part in parts}


def _entries(state: Mapping[str, Any]) -> dict[tuple[str, str], Counts]:
    return {(e["phase"], e["layer"]): Counts.from_dict(e["counts"]) for e in state["entries"]}


def _require_agreement(found: Sequence[Counts], where: str) -> None:
    events = sorted({event for counts in found for event in counts})
    differing = [event for event in events if len({counts[event] for counts in found}) > 1]
    if not differing:
        return
    ranks = (
        f"rank {rank}: " + ", ".join(f"{event} {counts[event]:,}" for event in differing)
        for rank, counts in enumerate(found)
    )
    raise StageError(
        f"{where}: expected the same counts on every rank, which all have the one chip, got "
        f"{'; '.join(ranks)}. Write on all ranks, with the same targets and the same seed; arrays "
        "that are trained in place by each rank's own samples are chips of their own."
    )


def _gathered[Found](own: Found) -> list[Found]:
    # Not the strategy's all_gather, in which Lightning 2.6.6 uses a function that torch 2.15 warns
    # of.
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks
