"""Streams of requests: learn this, forget that, in any order that makes sense."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import nearest

_NAME = re.compile(r"[\w+-]+")  # PEFT keeps adapters in a ModuleDict, whose keys hold no dots.
_VERBS = ("learn", "forget")


@dataclass(frozen=True, kw_only=True)
class Learn:
    """A request to learn something new.

    Args:
        name: Name of the task, unique within a stream: letters, digits, ``_``, ``+`` and ``-``.
        units: What can be forgotten of it later, one by one: people, speakers, classes. The task as
            a whole by default.
    Raises:
        ConfigurationError: A name cannot be used, or units repeat.

    Example:
        >>> Learn(name="5").units
        ('5',)
        >>> str(Learn(name="staff", units=("0", "1", "2")))
        'learn staff (0, 1, 2)'
    """

    name: str
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(self.units) or (self.name,))
        for name in (self.name, *self.units):
            _check_name("learn", name)
        if len(set(self.units)) < len(self.units):
            raise ConfigurationError(
                f"learn {self.name}: expected each unit once, got {', '.join(self.units)}. Remove "
                "what repeats."
            )

    @property
    def adapter(self) -> str:
        """Name for the adapter that serves this request."""
        return f"learn-{self.name}"

    def __str__(self) -> str:
        whole = self.units == (self.name,)
        return f"learn {self.name}" if whole else f"learn {self.name} ({', '.join(self.units)})"


@dataclass(frozen=True, kw_only=True)
class Forget:
    """A request to forget something learnt before.

    Args:
        name: A unit, or a task as a whole.
    Raises:
        ConfigurationError: The name cannot be used.

    Example:
        >>> str(Forget(name="2")), Forget(name="2").adapter
        ('forget 2', 'forget-2')
    """

    name: str

    def __post_init__(self) -> None:
        _check_name("forget", self.name)

    @property
    def adapter(self) -> str:
        """Name for the adapter that serves this request."""
        return f"forget-{self.name}"

    def __str__(self) -> str:
        return f"forget {self.name}"


Request = Learn | Forget
"""One step of a stream."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One request, and where the stream stands once it has been served.

    Args:
        index: Place in the stream, from 0.
        request: What to do.
        units: What the request is about: the units to learn, or those to forget.
        learnt_so_far: All units ever learnt, this request's included, in that order.
        forgotten_so_far: All units forgotten, this request's included, in that order.
    """

    index: int
    request: Request
    units: tuple[str, ...]
    learnt_so_far: tuple[str, ...]
    forgotten_so_far: tuple[str, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """What has been learnt and not been forgotten, in the order of learning."""
        return tuple(unit for unit in self.learnt_so_far if unit not in self.forgotten_so_far)

    @property
    def learns(self) -> bool:
        """Whether this phase learns; it forgets otherwise."""
        return isinstance(self.request, Learn)

    @property
    def old(self) -> tuple[str, ...]:
        """What is kept and not new: the units to replay, or to retain."""
        return tuple(unit for unit in self.kept if unit not in self.units)


@dataclass(frozen=True)
class TaskStream:
    """Learn and forget requests, checked as a whole before the first one is served.

    Args:
        requests: In the order in which they arrive.
    Raises:
        ConfigurationError: The stream is empty, a name is used twice, or something is to be
            forgotten that has not been learnt or is forgotten already.

    Example:
        >>> stream = TaskStream.parse(["learn 0 1 2", "forget 1", "learn 3"])
        >>> for phase in stream:
        ...     print(phase.request, "| kept", *phase.kept, "| forgotten", *phase.forgotten_so_far)
        learn 0+1+2 (0, 1, 2) | kept 0 1 2 | forgotten
        forget 1 | kept 0 2 | forgotten 1
        learn 3 | kept 0 2 3 | forgotten 1
    """

    requests: tuple[Request, ...]
    _phases: tuple[Phase, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", tuple(self.requests))
        if not self.requests:
            raise ConfigurationError(
                "task stream: expected at least one request, got none. Give for example "
                "['learn 0 1 2', 'forget 1']."
            )
        object.__setattr__(self, "_phases", tuple(_phases(self.requests)))

    @classmethod
    def parse(cls, lines: Iterable[str]) -> TaskStream:
        """Read a stream from lines such as ``"learn 5"`` and ``"forget 2"``.

        Args:
            lines: ``learn UNIT [UNIT …]``, which makes one task of all its units, or ``forget
                NAME``. Blank lines are left out.
        Returns:
            The checked stream.
        Raises:
            ConfigurationError: A line is no request, or the stream makes no sense.

        Example:
            >>> TaskStream.parse(["learn 5", "forgot 5"])
            Traceback (most recent call last):
            ...
            aihwkit_lora.errors.ConfigurationError: task stream, line 2: expected ...
        """
        numbered = [(number, line) for number, line in enumerate(lines, 1) if str(line).strip()]
        return cls(tuple(parse_request(line, number) for number, line in numbered))

    def __iter__(self) -> Iterator[Phase]:
        return iter(self._phases)

    def __len__(self) -> int:
        return len(self.requests)

    def __str__(self) -> str:
        return "; ".join(map(str, self.requests))


def parse_request(line: object, number: int = 1) -> Request:
    """Read one request.

    Args:
        line: ``learn UNIT [UNIT …]`` or ``forget NAME``.
        number: Where it stands, from 1, for the error message.
    Returns:
        The request. A task of several units is named after all of them.
    Raises:
        ConfigurationError: It is none.

    Example:
        >>> parse_request("learn 3 4")
        Learn(name='3+4', units=('3', '4'))
    """
    verb, *names = str(line).split()
    if verb == "learn" and names:
        return Learn(name="+".join(names), units=tuple(names))
    if verb == "forget" and len(names) == 1:
        return Forget(name=names[0])
    hint = "" if verb in _VERBS else f" {nearest(verb, _VERBS)}"
    raise ConfigurationError(
        f"task stream, line {number}: expected 'learn UNIT ...' or 'forget NAME', got '{line}'."
        f"{hint}"
    )


def _check_name(verb: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{verb} {name}: expected a name of letters, digits, '_', '+' and '-', got {name!r}. "
            "It becomes the name of an adapter."
        )


def _phases(requests: Iterable[Request]) -> Iterator[Phase]:
    """Serve the requests on paper."""
    tasks: dict[str, tuple[str, ...]] = {}
    learnt: dict[str, None] = {}
    forgotten: dict[str, None] = {}
    for index, request in enumerate(requests):
        if isinstance(request, Learn):
            units = _new_units(index, request, tasks, learnt)
            tasks[request.name] = units
            learnt.update(dict.fromkeys(units))
        else:
            units = _units_to_forget(index, request, tasks, learnt, forgotten)
            forgotten.update(dict.fromkeys(units))
        yield Phase(
            index=index,
            request=request,
            units=units,
            learnt_so_far=tuple(learnt),
            forgotten_so_far=tuple(forgotten),
        )


def _new_units(
    index: int, request: Learn, tasks: Iterable[str], learnt: Iterable[str]
) -> tuple[str, ...]:
    taken = {*tasks, *learnt}
    twice = sorted({request.name, *request.units} & taken)
    if twice:
        raise ConfigurationError(
            f"task stream, request {index + 1} ({request}): expected names that have not been "
            f"learnt before, got {', '.join(twice)}. What is to be learnt again needs a name of "
            "its own."
        )
    return request.units


def _units_to_forget(
    index: int,
    request: Forget,
    tasks: dict[str, tuple[str, ...]],
    learnt: Iterable[str],
    forgotten: Iterable[str],
) -> tuple[str, ...]:
    learnt, gone, where = set(learnt), set(forgotten), f"task stream, request {index + 1}"
    named = tasks.get(request.name, (request.name,) if request.name in learnt else ())
    left = tuple(unit for unit in named if unit not in gone)
    if left:
        return left
    if named:
        raise ConfigurationError(
            f"{where} ({request}): expected something that is still known, got '{request.name}', "
            "which is forgotten already. Remove the request."
        )
    raise ConfigurationError(
        f"{where} ({request}): expected something learnt before, got '{request.name}'. "
        f"{nearest(request.name, learnt | set(tasks))}"
    )
