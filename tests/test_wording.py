"""The wording rule: an adapter on frozen arrays suppresses, so nothing here says that it erases.

Looked at: prose (README, CONTRIBUTING, CHANGELOG, docs) paragraph by paragraph, and in the source
every string (messages, docstrings, parts of f-strings) and every name. Each exception stands in one
table with its reason, and has to be needed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROSE = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SOURCE = sorted(
    path
    for folder in ("aihwkit_lora", "callbacks", "recipes")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".yaml", ".html"}
)

BANNED = {
    r"\beras(e|es|ed|ing|er|ure|ures|able)\b|(?<![a-z])erase": (
        "only the exact modes do that; forgetting by an adapter is 'suppressed'"
    ),
    r"\bGDPR\b|right to be forgotten": "no test can promise what a law asks for",
    r"\b(guarantee[sd]?|prove[sn]?)\b[^.]{0,40}\b(forg[eo]t|unlearn)": (
        "forgetting is measured; nothing here guarantees it"
    ),
    r"\bdelet\w*\b[^.]{0,20}\bknowledge|\bknowledge\b[^.]{0,20}\bdelet": (
        "knowledge in frozen arrays is suppressed"
    ),
}


@dataclass(frozen=True)
class Allowed:
    """A place where a banned word is right.

    Args:
        file: Below the checkout.
        words: What stands there, around the banned word.
        reason: Why it is right.
    """

    file: str
    words: str
    reason: str


ALLOWED = [
    Allowed(
        "aihwkit_lora/chips/write_policy.py",
        "one RESET pulse erases a cell",
        "about the state of a cell, not about what a model knows",
    ),
    Allowed(
        "aihwkit_lora/unlearning/exact.py",
        "so that its unit's data is erased",
        "the exact mode: data that only ever lived in an adapter, which is destroyed",
    ),
    Allowed(
        "docs/seal.md",
        "its data went nowhere else, destroying the adapter erases the data",
        "the exact mode, in the section on exact forgetting",
    ),
]


@dataclass(frozen=True)
class Text:
    """Some words, and where they stand."""

    file: str
    line: int
    words: str


def prose(file: str, text: str) -> Iterator[Text]:
    """Paragraphs, each as one line, so that a line break hides nothing."""
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", text):
        if paragraph.strip():
            yield Text(file, line, " ".join(paragraph.split()))
        line += paragraph.count("\n")


def strings_and_names(file: str, text: str) -> Iterator[Text]:
    """Strings of Python source, those in f-strings included, and names of what it defines."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Text(file, node.lineno, " ".join(node.value.split()))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Text(file, node.lineno, node.name.replace("_", " "))
        elif isinstance(node, ast.arg):
            yield Text(file, node.lineno, node.arg.replace("_", " "))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield Text(file, node.lineno, node.id.replace("_", " "))


def texts(paths: Iterable[Path]) -> Iterator[Text]:
    for path in paths:
        file, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        yield from (strings_and_names if path.suffix == ".py" else prose)(file, text)


def findings(found: Iterable[Text], allowed: Iterable[Allowed]) -> list[str]:
    """Say where a banned word stands, and why it is banned."""
    allowed = list(allowed)
    complaints = []
    for text in found:
        words = text.words
        for exception in allowed:
            if exception.file == text.file:
                words = words.replace(exception.words, "…")
        for pattern, why in BANNED.items():
            if match := re.search(pattern, words, re.IGNORECASE):
                complaints.append(f"{text.file}:{text.line}: '{match.group()}' — {why}")
    return complaints


def test_nothing_claims_more_than_suppression() -> None:
    assert findings(texts([*PROSE, *SOURCE]), ALLOWED) == []


def test_every_exception_is_needed_and_explained() -> None:
    everything = list(texts([*PROSE, *SOURCE]))
    for exception in ALLOWED:
        assert exception.reason
        places = [text for text in everything if text.file == exception.file]
        assert any(exception.words in text.words for text in places), exception
        others = [each for each in ALLOWED if each is not exception]
        assert findings(places, others) != [], f"{exception.words!r} is no exception (any more)"


@pytest.mark.parametrize(
    "bad",
    [
        "The adapter erases person 2.",
        "Person 2 is\nerased from the model.",
        "Erasure in one call",
        "This makes you GDPR compliant.",
        "The seal guarantees that the class is forgotten.",
        "It deletes the knowledge of a class.",
    ],
)
def test_the_rule_is_found_broken_in_prose_and_in_strings(bad: str) -> None:
    assert len(findings(prose("docs/x.md", f"# Title\n\nFine.\n\n{bad}\n"), [])) == 1
    sources = [f"x = {bad!r}", f"def f():\n    {bad!r}\n", f"raise E(f'{{n}}' f{bad!r})"]
    for source in sources:
        assert len(findings(strings_and_names("a.py", source), [])) == 1, source


@pytest.mark.parametrize(
    "source", ["def erase_(model): ...", "class Eraser: ...", "erased = 1", "def f(erase): ..."]
)
def test_names_are_words_too(source: str) -> None:
    assert len(findings(strings_and_names("a.py", source), [])) == 1


def test_good_words_pass() -> None:
    good = "The adapter suppresses person 2. Phases, bases and eras are words. Delete the file."
    assert findings(prose("docs/x.md", good), []) == []


def test_an_exception_counts_in_its_own_file_and_for_its_own_words_only() -> None:
    exception = Allowed("a.py", "erases a cell", "a cell")
    text = "A pulse erases a cell."
    assert findings(prose("a.py", text), [exception]) == []
    assert len(findings(prose("b.py", text), [exception])) == 1
    assert len(findings(prose("a.py", text + " It erases a person."), [exception])) == 1


def test_lines_are_told() -> None:
    (complaint,) = findings(prose("a.md", "one\n\ntwo\nthree\n\nerased\n"), [])
    assert complaint.startswith("a.md:6: 'erased'")
