"""The log of requests: what was learnt, forgotten, sealed and audited, in an order nobody rewrites.

One JSON object a line. Each holds the SHA-256 of the one before and its own, so that a line that
was changed, dropped or put in later shows. A log holds names and numbers, never data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Self

from aihwkit_lora.errors import ConfigurationError, SealError

Scalar = str | int | float | bool | None
"""What an entry may hold."""

LONGEST = 200
"""Characters of the longest text in an entry: enough for a name or a reason, too few for data."""

_START = "0" * 64  # what the first entry follows
_CHUNK = 4096  # bytes that are read at a time from the end of a file
_OWN = ("number", "time", "kind", "request", "previous", "sha256")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a log.

    Args:
        number: Position in the log, from 0.
        time: When it was written, UTC, ISO 8601.
        kind: What happened, for example ``"learn"``, ``"seal"`` or ``"audit-start"``.
        request: For which request.
        fields: What else is known.
        previous: SHA-256 of the entry before.
        sha256: SHA-256 of this entry, of all that stands above.
    """

    number: int
    time: str
    kind: str
    request: str
    fields: Mapping[str, Scalar] = field(hash=False)
    previous: str
    sha256: str

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "fields": dict(self.fields)}  # a proxy cannot be pickled


class RequestLog:
    """An append-only log, in a file or in memory.

    Several processes can write one file: each line is written under a lock and is on the disk
    before ``append`` returns. A line that was cut off, by a crash or a kill, is moved into
    ``<file>.torn`` by the next ``append``, and the chain goes on from the line before it.

    What the chain does not show is that the last lines are missing, or that somebody has written
    the whole file anew. Keep :attr:`head` elsewhere to see that.

    Args:
        path: The file, created by the first ``append``; None keeps the log in memory.

    Example:
        >>> log = RequestLog(None)
        >>> entry = log.append("learn", "enrol 3", unit="person 3", adapter="p3")
        >>> log.append("audit-start", "enrol 3", reason="yearly check").previous == entry.sha256
        True
        >>> log.verify()
        2
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._memory = b""

    def __repr__(self) -> str:
        return f"RequestLog({'in memory' if self.path is None else str(self.path)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of a model go on in the same log

    def append(self, kind: str, request: str, **fields: Scalar) -> Entry:
        """Write one entry.

        Args:
            kind: What happened, at most 200 characters.
            request: For which request, at most 200 characters.
            fields: Numbers, names and short texts.
        Returns:
            The entry as it stands in the log.
        Raises:
            ConfigurationError: A field is neither a number nor a short text, or its name is taken.
            SealError: The last line of the log was altered.
        """
        check_text("kind", kind)
        check_text("request", request)
        for name, value in fields.items():
            _check(name, value)
        if self.path is None:
            last = self._memory[:-1].rpartition(b"\n")[2]
            line, entry = _line(last, kind, request, fields, "the log in memory")
            self._memory += line
            return entry
        return self._append_to_file(kind, request, fields)

    def _append_to_file(self, kind: str, request: str, fields: Mapping[str, Scalar]) -> Entry:
        path = self._file()
        path.parent.mkdir(parents=True, exist_ok=True)
        created = not path.exists()
        with path.open("a+b") as file, _locked(file, fcntl.LOCK_EX):
            last = _last_line(file, path)
            line, entry = _line(last, kind, request, fields, str(path))
            # One call for one line: what a kill leaves is the start of the line or all of it.
            os.write(file.fileno(), line)
            os.fsync(file.fileno())
        if created:
            sync_folder(path.parent)
        return entry

    def _file(self) -> Path:
        assert self.path is not None
        return self.path

    def _content(self) -> bytes:
        if self.path is None or not self.path.exists():
            return self._memory
        with self.path.open("rb") as file, _locked(file, fcntl.LOCK_SH):
            return file.read()

    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first; a last line that was cut off is left out.

        Raises:
            SealError: A line is no entry.
        """
        lines = self._content().split(b"\n")[:-1]
        return tuple(_parsed(line, self._place(n)) for n, line in enumerate(lines))

    @property
    def head(self) -> str:
        """SHA-256 of the last entry; zeros in an empty log."""
        entries = self.entries()
        return entries[-1].sha256 if entries else _START

    def verify(self) -> int:
        """Follow the chain from the first line to the last.

        Returns:
            The number of entries.
        Raises:
            SealError: A line was altered, dropped, added or cut off; the message names the first.
        """
        *lines, rest = self._content().split(b"\n")
        previous = _START
        for number, line in enumerate(lines):
            previous = _follows(_parsed(line, self._place(number)), number, previous, self)
        if rest:
            raise SealError(
                f"{self._place(len(lines))}: expected a whole line, got {len(rest)} bytes without "
                "an end; something stopped the writer. The next append sets them aside."
            )
        return len(lines)

    def _place(self, number: int) -> str:
        return f"{'the log in memory' if self.path is None else self.path}, line {number + 1}"


def _follows(entry: Entry, number: int, previous: str, log: RequestLog) -> str:
    if (entry.number, entry.previous) != (number, previous):
        raise SealError(
            f"{log._place(number)}: expected entry {number} after {previous[:12]}…, got entry "
            f"{entry.number} after {entry.previous[:12]}…. Lines before it were altered, dropped "
            "or added; restore the file from a copy."
        )
    return entry.sha256


def _line(
    last: bytes, kind: str, request: str, fields: Mapping[str, Scalar], place: str
) -> tuple[bytes, Entry]:
    """The line that follows the ``last`` one, and what it says."""
    before = _parsed(last, f"{place}, last line") if last else None
    body = {
        "number": before.number + 1 if before else 0,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "request": request,
        **fields,
        "previous": before.sha256 if before else _START,
    }
    line = json.dumps({**body, "sha256": _hash(body)}, ensure_ascii=False).encode()
    return line + b"\n", _parsed(line, place)


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parsed(line: bytes, place: str) -> Entry:
    try:
        body = json.loads(line)
        claimed = body.pop("sha256")
        entry = Entry(
            fields=MappingProxyType({key: body[key] for key in body if key not in _OWN}),
            sha256=claimed,
            **{key: body[key] for key in _OWN if key != "sha256"},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SealError(
            f"{place}: expected an entry of a request log, got {line[:40]!r}. Restore the file "
            "from a copy."
        ) from error
    if claimed != _hash(body):
        raise SealError(
            f"{place}: expected the entry whose SHA-256 it holds, {claimed[:12]}…, got another. "
            "The line was altered; restore the file from a copy."
        )
    return entry


def _last_line(file: IO[bytes], path: Path) -> bytes:
    """Read the last whole line, empty if there is none; set aside what was cut off after it."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start > 0 and tail.count(b"\n") < 2:  # an end of line on either side of the last one
        start = max(0, start - _CHUNK)
        file.seek(start)
        tail = file.read(end - start)
    whole, newline, torn = tail.rpartition(b"\n")
    if torn:
        with path.with_name(f"{path.name}.torn").open("ab") as aside:
            aside.write(torn + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        file.truncate(end - len(torn))
    return whole.rpartition(b"\n")[2] if newline else b""


@contextmanager
def _locked(file: IO[bytes], mode: int) -> Iterator[None]:
    fcntl.flock(file, mode)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def check_text(name: str, value: Any) -> None:
    """Refuse what is no short text.

    Args:
        name: Of the field, for the error message.
        value: Its value.
    Raises:
        ConfigurationError: It is empty, too long or no text.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f"request log, '{name}': expected a text, got {_shown(value)}. Give a name."
        )
    _check(name, value)


def _check(name: str, value: Any) -> None:
    if name in _OWN and name not in ("kind", "request"):
        raise ConfigurationError(
            f"request log: expected fields other than {', '.join(_OWN)}, got '{name}'. The log "
            "writes that one itself; choose another name."
        )
    if isinstance(value, str) and len(value) > LONGEST:
        raise ConfigurationError(
            f"request log, '{name}': expected at most {LONGEST} characters, got {len(value)}. A "
            "log holds names, not data; shorten the text."
        )
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not (value is None or isinstance(value, str) or finite):
        raise ConfigurationError(
            f"request log, '{name}': expected a finite number, a short text or None, got "
            f"{_shown(value)}. A log holds no data; write a name or a count instead."
        )


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | float) else f"a {type(value).__name__}"


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk.

    Args:
        folder: An existing folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
