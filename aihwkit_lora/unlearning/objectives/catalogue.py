"""Registries of objectives, and the tables that the docs show."""

from __future__ import annotations

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import Registry
from aihwkit_lora.unlearning.objectives.objective import Objective

_SAYS = ("name", "summary", "formula", "source", "needs", "bounded")


class Catalogue[Kind: Objective]:
    """Classes of objectives by the names that they give themselves.

    Args:
        kind: What an entry is called in error messages.

    Example:
        >>> Catalogue("objective").names()
        ()
    """

    def __init__(self, kind: str) -> None:
        self._entries = Registry[type[Kind]](kind)

    def register[Own: Objective](self, objective: type[Own]) -> type[Own]:
        """Store a class of objectives under its ``name``; a decorator.

        Args:
            objective: The class.
        Raises:
            ConfigurationError: The name is taken, or the class does not say what it is.

        Example:
            >>> @register
            ... class Nameless(Objective):
            ...     pass
            Traceback (most recent call last):
            ...
            aihwkit_lora.errors.ConfigurationError: Nameless: expected class attributes name, ...
        """
        if missing := [field for field in _SAYS if not hasattr(objective, field)]:
            raise ConfigurationError(
                f"{objective.__name__}: expected class attributes {', '.join(_SAYS)}, got no "
                f"{', '.join(missing)}. Say them in the class body."
            )
        self._entries.add(objective.name, objective)  # type: ignore[arg-type]
        return objective

    def get(self, name: str) -> type[Kind]:
        """Find a class of objectives; its fields are the parameters.

        Args:
            name: One of :meth:`names`.
        Raises:
            UnknownNameError: No such objective; the message lists the nearest names.

        Example:
            >>> from aihwkit_lora.unlearning import objectives
            >>> objectives.get("npo")(beta=0.5)
            NPO(retain_weight=1.0, beta=0.5)
        """
        return self._entries.get(name)

    def names(self) -> tuple[str, ...]:
        """All objectives, sorted.

        Example:
            >>> from aihwkit_lora.unlearning import objectives
            >>> "masked_teacher" in objectives.names()
            True
        """
        return self._entries.names()

    def table(self) -> str:
        """Describe all objectives as a table in Markdown.

        Returns:
            One row for each: name, what it does, loss, whether that is bounded, needs, source.

        Example:
            >>> from aihwkit_lora.unlearning import objectives
            >>> print(objectives.table().splitlines()[0])
            | objective | what it does | loss | bounded | needs | source |
        """
        rows = ["| objective | what it does | loss | bounded | needs | source |", "|---" * 6 + "|"]
        for name in self.names():
            kind = self.get(name)
            bounded = "yes" if kind.bounded else "**no**"
            needs = ", ".join(sorted(kind.needs))
            cells = (f"`{name}`", kind.summary, f"`{kind.formula}`", bounded, needs, kind.source)
            rows.append(f"| {' | '.join(cells)} |")
        return "\n".join(rows) + "\n"


_OBJECTIVES = Catalogue[Objective]("objective")
register, get = _OBJECTIVES.register, _OBJECTIVES.get
names, table = _OBJECTIVES.names, _OBJECTIVES.table
