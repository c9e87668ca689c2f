"""Whether people watch: progress bars belong on terminals, never in logs or tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN: ContextVar[bool] = ContextVar("progress_shown", default=False)


def shown() -> bool:
    """Tell whether trainers shall show progress bars. Off unless somebody asks for them.

    Example:
        >>> shown()
        False
    """
    return _SHOWN.get()


@contextmanager
def showing(on: bool | None = None) -> Iterator[None]:
    """Show progress bars, or none, for a while.

    Args:
        on: Whether to show them; if None, where both outputs are terminals. Lightning draws its
            bars on the standard output, so a run whose output goes into a log gets none even if
            its errors are seen on a terminal.

    Example:
        >>> with showing(True):
        ...     shown()
        True
        >>> shown()
        False
    """
    if on is None:
        on = sys.stdout.isatty() and sys.stderr.isatty()
    before = _SHOWN.set(on)
    try:
        yield
    finally:
        _SHOWN.reset(before)
