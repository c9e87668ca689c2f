"""Every Python block of the README and the docs runs as it stands, in the order it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
# Trainers in the examples are as short as users would write them.
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:.*number of training batches .* is smaller")
# aihwkit 1.2.0 multiplies tensors by numpy scalars in one of its noise models.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_blocks_run(page, tmp_path, monkeypatch):
    # In one folder, so that a block can use the files of the one before.
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks(page)):
        code = compile(block, f"{page.name}, block {number + 1}", "exec")
        exec(code, {"__name__": "__main__"})


def test_readme_shows_both_commands_and_three_snippets_in_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    order = ["# aihwkit-lora", "make demo", "make test", "Lightning", "PEFT", "existing aihwkit"]
    headings = [text.index(word) for word in order[:3]]
    sections = [text.index(f"## For {word}") for word in order[3:]]
    assert headings + sections == sorted(headings + sections)
    assert len(blocks(ROOT / "README.md")) == 3
