"""The seals of a model, and the errors of whoever goes around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aihwkit_lora.errors import SealError
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.request_log import RequestLog

MEASURE = (
    "To measure without it, use `with audit(peft, reason=...)`, which is logged; to learn more, "
    "add another adapter beside it."
)
"""The way out for whoever wants to switch a sealed adapter off."""

STAYS = (
    "A sealed adapter stays for good, in audits too; for a model without it, start from one that "
    "never had it."
)
"""The way out for whoever wants to take a sealed adapter off, or to merge it."""


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The record of one sealed adapter.

    Args:
        request: The request that the adapter answers.
        adapter: Its name.
        date: When it was sealed, UTC, ISO 8601.
        level: How far the forgotten data is out of reach.
        adapter_sha256: Hash of the adapter's tensors and scales.
        base_fingerprint: ``fingerprint`` of the arrays that the adapter was made for.
        log: Where seals and audits of it are written.
    """

    request: str
    adapter: str
    date: str
    level: ForgettingLevel
    adapter_sha256: str
    base_fingerprint: str
    log: RequestLog = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"adapter '{self.adapter}' (request '{self.request}')"


class SealBook:
    """All seals of one model; its modules share the book.

    Example:
        >>> SealBook().seals
        {}
    """

    def __init__(self) -> None:
        self.seals: dict[str, Seal] = {}
        self.audits = 0  # how many are running

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "audits": 0}  # an audit ends here, for copies it never began

    @property
    def in_force(self) -> bool:
        """Whether no audit has lifted the seals."""
        return self.audits == 0

    def named(self, adapters: Iterable[str]) -> list[str]:
        """Those of some adapters that are sealed.

        Args:
            adapters: Names.
        """
        return [adapter for adapter in adapters if adapter in self.seals]

    def require(self, adapters: Iterable[str], action: str, layer: str = "") -> None:
        """Refuse to leave a sealed adapter out, unless an audit is running.

        Args:
            adapters: Those that would run.
            action: What somebody tried.
            layer: Full name, where it is about one layer.
        Raises:
            SealError: A sealed adapter is not among them.
        """
        running = set(adapters)
        if self.in_force and (left := [name for name in self.seals if name not in running]):
            raise self.refusal(left, action, MEASURE, layer)

    def refuse_all(self, action: str, way_out: str = MEASURE) -> None:
        """Refuse something to all sealed adapters, unless an audit is running.

        Args:
            action: What somebody tried.
            way_out: What to do instead.
        Raises:
            SealError: The seals are in force.
        """
        if self.in_force:
            raise self.refusal(self.seals, action, way_out)

    def refusal(
        self, adapters: Iterable[str], action: str, way_out: str, layer: str = ""
    ) -> SealError:
        """Make the error for somebody who goes around seals.

        Args:
            adapters: Names of sealed ones.
            action: What somebody tried.
            way_out: What to do instead.
            layer: Full name, where it is about one layer.
        """
        who = ", ".join(str(self.seals[adapter]) for adapter in adapters)
        place = f"layer '{layer}', " if layer else ""
        return SealError(
            f"{place}sealed {who}: expected to act in every pass, got {action}. {way_out}"
        )
