"""Whom a model learns, forgets and learns later, and samples of them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, eq=False)
class People[Labelled]:
    """Training, validation and test samples of everybody, with labels counted from 0.

    Label ``i`` is the ``i``-th of the learnt people; the new person has the last label.

    Args:
        train: Samples to learn from.
        validation: Samples on which the best epoch is picked.
        test: Samples on which accuracy is reported.
        learnt: Labels that are learnt first.
        forgotten: The label among them that is forgotten.
        new: Label of the person who joins.

    Example:
        >>> People(train=(), validation=(), test=(), learnt=(0, 1, 2), forgotten=1, new=3).kept
        (0, 2)
    """

    train: Labelled
    validation: Labelled
    test: Labelled
    learnt: tuple[int, ...]
    forgotten: int
    new: int

    @property
    def kept(self) -> tuple[int, ...]:
        """Labels that are learnt first and never forgotten."""
        return tuple(label for label in self.learnt if label != self.forgotten)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Labels by what becomes of them: ``"forget"``, ``"retain"`` and ``"new"``."""
        return {"forget": (self.forgotten,), "retain": self.kept, "new": (self.new,)}
