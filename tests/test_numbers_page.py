"""docs/numbers.md defines every event in the very words of the registry, and every level."""

from __future__ import annotations

import re
from pathlib import Path

from aihwkit_lora import chips
from aihwkit_lora.metering import EVENTS, Level, Side, Status, events
from aihwkit_lora.reporting import FACES, published_ratios, rtx_4090

PAGE = (Path(__file__).parent.parent / "docs" / "numbers.md").read_text(encoding="utf-8")
SECTIONS = {
    Side.ANALOG: "In and around the arrays",
    Side.DIGITAL: "Digital unit",
    Side.MEMORY: "Memory",
}


def rows(section: str) -> dict[str, tuple[str, str]]:
    """Meaning and price of each event in a table of the page."""
    text = PAGE.split(f"### {section}\n")[1].split("\n#")[0]
    found = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", text, flags=re.MULTILINE)
    return {name: (meaning, price) for name, meaning, price in found}


def test_every_event_is_defined_where_it_happens() -> None:
    own = {name for group in (events._ANALOG, events._DIGITAL, events._MEMORY) for name in group}
    found = {side: rows(section) for side, section in SECTIONS.items()}
    assert {name for table in found.values() for name in table} == own
    for side, table in found.items():
        for name, (meaning, price) in table.items():
            assert (EVENTS.get(name).side, EVENTS.get(name).meaning) == (side, meaning)
            assert re.match(r"(energy|time|none|the same|as `)", price), name


def test_every_level_and_status_is_explained() -> None:
    for name in (*Level, *Status):
        assert f"\n| `{name}` | " in PAGE


def test_every_kind_of_ratio_is_defined() -> None:
    defined = re.findall(r"^\| ([a-z ]+) \| .* \| .* \| .* \|$", PAGE, flags=re.MULTILINE)
    found = published_ratios(FACES, chips.get("rm-180nm"), rtx_4090(utilisation=1.0))
    assert {ratio.name.split(",")[0] for ratio in found} == set(defined) - {"ratio"}
