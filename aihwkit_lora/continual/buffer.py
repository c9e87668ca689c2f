"""Samples of earlier tasks, kept for replay, and really gone once removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError


class ReplayBuffer:
    """A part of what has been learnt, as plain tensors on the side of the digital unit.

    Of every :meth:`add` a fixed share is drawn, class by class, at least one sample each. With a
    capacity, the buffer is a uniform sample of all that were drawn, until something is removed
    (reservoir sampling, Vitter 1985, algorithm R). Whose sample it is stays noted, so that
    :meth:`remove` can delete it; a unit that was removed is never taken in again.

    Args:
        ratio: Share of the samples of each class that is drawn, in (0, 1].
        capacity: Most samples that the buffer holds; None means no limit.
        seed: Of every random choice.
    Raises:
        ConfigurationError: The ratio or the capacity is out of range.

    Example:
        >>> buffer = ReplayBuffer(ratio=0.5, seed=0)
        >>> buffer.add(torch.randn(8, 3), torch.tensor([0] * 4 + [1] * 4))
        >>> len(buffer), buffer.units
        (4, ('0', '1'))
        >>> buffer.remove("1"), len(buffer)
        (2, 2)
    """

    def __init__(self, ratio: float = 0.3, *, capacity: int | None = None, seed: int = 0) -> None:
        if not 0.0 < ratio <= 1.0:
            raise ConfigurationError(
                f"ReplayBuffer: expected a ratio above 0 and up to 1, got {ratio}. It is the "
                "share of each class's samples that is kept."
            )
        if capacity is not None and capacity < 1:
            raise ConfigurationError(
                f"ReplayBuffer: expected a capacity of at least 1 sample, got {capacity}. Leave it "
                "out for no limit."
            )
        self.ratio, self.capacity = ratio, capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs = self._targets = torch.empty(0)
        self._logits: Tensor | None = None
        self._units: list[str] = []
        self._removed: set[str] = set()
        self._seen = 0

    def __len__(self) -> int:
        return len(self._units)

    @property
    def units(self) -> tuple[str, ...]:
        """Whose samples the buffer holds, sorted."""
        return tuple(sorted(set(self._units)))

    @property
    def removed(self) -> tuple[str, ...]:
        """Units that were removed and are not taken in again, sorted."""
        return tuple(sorted(self._removed))

    @property
    def inputs(self) -> Tensor:
        """All inputs, shape ``(samples, …)``."""
        return self._inputs

    @property
    def targets(self) -> Tensor:
        """Class of each sample, shape ``(samples,)``."""
        return self._targets

    @property
    def logits(self) -> Tensor | None:
        """What :meth:`record` noted, shape ``(samples, outputs)``."""
        return self._logits

    def add(
        self, inputs: Tensor, targets: Tensor, *, units: str | Sequence[str] | None = None
    ) -> None:
        """Draw from new samples and keep what was drawn.

        Args:
            inputs: Shape ``(samples, …)``; copied.
            targets: Classes, shape ``(samples,)``.
            units: Whose samples these are: one name for all, or one for each. Their classes, as
                strings, by default.
        Raises:
            DataError: Lengths or shapes do not fit, or a unit was removed before.
        """
        names = self._named(inputs, targets, units)
        self._logits = None  # They would no longer be of all samples.
        rows = self._drawn(targets)
        room = len(rows) if self.capacity is None else self.capacity - len(self)
        self._append(inputs[rows[:room]], targets[rows[:room]], [names[row] for row in rows[:room]])
        for row in rows[room:]:
            self._replace_any(inputs[row], targets[row], names[row])

    def remove(self, unit: str) -> int:
        """Delete all samples of a unit, and never take one in again.

        The tensors are replaced by ones without its samples, and the old ones overwritten with
        zeros. Copies that others have drawn are out of reach.

        Args:
            unit: Name of the unit; one that the buffer does not hold is barred all the same.
        Returns:
            How many samples were deleted.
        """
        self._removed.add(unit)
        keep = torch.tensor([name != unit for name in self._units], dtype=torch.bool)
        deleted = int((~keep).sum())
        if deleted:
            self._inputs = _without(self._inputs, keep)
            self._targets = _without(self._targets, keep)
            self._logits = None if self._logits is None else _without(self._logits, keep)
            self._units = [name for name in self._units if name != unit]
        return deleted

    @torch.no_grad()
    def record(self, model: nn.Module, *, batch_size: int = 256) -> None:
        """Note the logits of the current model, as DER++ compares with.

        Call it again after forgetting: logits noted before still speak of what was forgotten.

        Args:
            model: Run once over all samples, in evaluation mode; reads are metered as usual.
            batch_size: Samples in one pass.
        Raises:
            DataError: The buffer is empty.
        """
        self._require_samples("record")
        training = model.training
        model.eval()
        self._logits = torch.cat([_logits(model(part)) for part in self._inputs.split(batch_size)])
        model.train(training)

    def balanced(self) -> tuple[Tensor, ...]:
        """Repeat the samples of small classes until all classes are as frequent as the largest.

        Returns:
            Inputs, targets and, where recorded, logits, in random order. Each sample is there at
            least once; how often samples of one class are there differs by at most one.
        Raises:
            DataError: The buffer is empty.

        Example:
            >>> buffer = ReplayBuffer(ratio=1.0)
            >>> buffer.add(torch.arange(5.0), torch.tensor([0, 0, 0, 0, 1]))
            >>> buffer.balanced()[1].bincount()
            tensor([4, 4])
        """
        self._require_samples("balanced")
        classes = [self._rows(label) for label in self._targets.unique()]
        size = max(map(len, classes))
        rows = torch.cat([self._repeated(members, size) for members in classes])
        return self._at(self._shuffled(rows))

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """Draw samples with replacement: first a class, evenly, then one of its samples.

        Args:
            count: How many, at least 1.
        Returns:
            Inputs, targets and, where recorded, logits.
        Raises:
            DataError: The buffer is empty.
        """
        self._require_samples("draw")
        labels = self._targets.unique()
        chosen = labels[torch.randint(len(labels), (count,), generator=self._generator)]
        rows = [self._any_of(self._rows(label)) for label in chosen]
        return self._at(torch.stack(rows))

    def _named(
        self, inputs: Tensor, targets: Tensor, units: str | Sequence[str] | None
    ) -> list[str]:
        if units is None:
            units = [str(label.item()) for label in targets]
        names = [units] * len(targets) if isinstance(units, str) else list(units)
        if not len(inputs) == len(targets) == len(names):
            raise DataError(
                "ReplayBuffer.add: expected as many inputs as targets and units, got "
                f"{len(inputs)}, {len(targets)} and {len(names)}. Pass one of each per sample."
            )
        if self._units and inputs.shape[1:] != self._inputs.shape[1:]:
            raise DataError(
                f"ReplayBuffer.add: expected inputs of shape {tuple(self._inputs.shape[1:])}, got "
                f"{tuple(inputs.shape[1:])}. Use one buffer for each shape."
            )
        barred = sorted(self._removed & set(names))
        if barred:
            raise DataError(
                f"ReplayBuffer.add: expected no samples of removed units, got {', '.join(barred)}. "
                "What was removed does not come back; leave those samples out."
            )
        return names

    def _drawn(self, targets: Tensor) -> list[int]:
        drawn: list[Tensor] = []
        for label in targets.unique():
            members = self._shuffled((targets == label).nonzero().flatten())
            drawn.append(members[: max(1, int(self.ratio * len(members)))])
        return sorted(torch.cat(drawn).tolist()) if drawn else []

    def _append(self, inputs: Tensor, targets: Tensor, names: list[str]) -> None:
        inputs, targets = inputs.detach().clone(), targets.detach().clone()
        first = not self._units
        self._inputs = inputs if first else torch.cat([self._inputs, inputs])
        self._targets = targets if first else torch.cat([self._targets, targets])
        self._units += names
        self._seen += len(names)

    def _replace_any(self, x: Tensor, y: Tensor, unit: str) -> None:
        """Let one more sample into a full buffer with the chance that all seen before had."""
        self._seen += 1
        place = int(torch.randint(self._seen, (1,), generator=self._generator))
        if place < len(self):
            self._inputs[place], self._targets[place], self._units[place] = x, y, unit

    def _rows(self, label: Tensor) -> Tensor:
        return (self._targets == label).nonzero().flatten()

    def _repeated(self, members: Tensor, size: int) -> Tensor:
        return self._shuffled(members).repeat(-(-size // len(members)))[:size]

    def _any_of(self, rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (), generator=self._generator)]

    def _shuffled(self, rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=self._generator)]

    def _at(self, rows: Tensor) -> tuple[Tensor, ...]:
        columns: Iterable[Tensor | None] = (self._inputs, self._targets, self._logits)
        return tuple(column[rows] for column in columns if column is not None)

    def _require_samples(self, call: str) -> None:
        if not self._units:
            raise DataError(
                f"ReplayBuffer.{call}: expected samples, got an empty buffer. Call add(inputs, "
                "targets) first."
            )


def _without(column: Tensor, keep: Tensor) -> Tensor:
    kept = column[keep]
    column.zero_()
    return kept


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"expected a model that returns logits or an object with .logits, got "
            f"{type(output).__name__}. Wrap the model."
        )
    return logits.detach()
