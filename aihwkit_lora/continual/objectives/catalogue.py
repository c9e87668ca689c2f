"""The registry of continual objectives, and the table that the docs show."""

from __future__ import annotations

from aihwkit_lora.continual.objectives.objective import ContinualObjective
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import Registry

OBJECTIVES = Registry[type[ContinualObjective]]("continual objective")

_SAYS = ("name", "summary", "formula", "source")


def register[Kind: ContinualObjective](objective: type[Kind]) -> type[Kind]:
    """Store a class of objectives under its ``name``; a decorator.

    Args:
        objective: The class.
    Raises:
        ConfigurationError: The name is taken, or the class does not say what it is.

    Example:
        >>> @register
        ... class Nameless(ContinualObjective):
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
    OBJECTIVES.add(objective.name, objective)
    return objective


def get(name: str) -> type[ContinualObjective]:
    """Find a class of objectives; its fields are the parameters.

    Args:
        name: One of :func:`names`.
    Raises:
        UnknownNameError: No such objective; the message lists the nearest names.

    Example:
        >>> from aihwkit_lora.continual import objectives
        >>> objectives.get("o_lora")(strength=0.1)
        OLoRA(ratio=1.0, class_balanced=True, strength=0.1)
    """
    return OBJECTIVES.get(name)


def names() -> tuple[str, ...]:
    """All continual objectives, sorted.

    Example:
        >>> from aihwkit_lora.continual import objectives
        >>> objectives.names()
        ('der++', 'ewc', 'inflora', 'lwf', 'o_lora', 'replay', 'sd_lora')
    """
    return OBJECTIVES.names()


def table() -> str:
    """Describe all objectives as a table in Markdown.

    Returns:
        One row for each: name, what it does, loss, needs, source.

    Example:
        >>> from aihwkit_lora.continual import objectives
        >>> print(objectives.table().splitlines()[0])
        | objective | what it does | loss | needs | source |
    """
    rows = ["| objective | what it does | loss | needs | source |", "|---" * 5 + "|"]
    for name in names():
        kind = get(name)
        needs = ", ".join(sorted(kind.needs))
        cells = (f"`{name}`", kind.summary, f"`{kind.formula}`", needs, kind.source)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
