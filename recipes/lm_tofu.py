"""TOFU (arXiv:2401.06121) from a folder with its files, as they are published.

Each file holds one JSON object per line, with ``question`` and ``answer``; those that end in
``_perturbed`` also have ``perturbed_answer``, a list, and mostly ``paraphrased_answer``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.lm_data import TEXT_SETS, LmDataConfig, Question, TextData

SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
"""What is kept, for each set that can be forgotten."""

QUESTIONS = 20
"""Questions about each author; they follow one another."""

_ENDINGS = (".json", ".jsonl")
_OTHERS = ("real_authors", "world_facts")


@TEXT_SETS.register("tofu")
def read_tofu(config: LmDataConfig) -> TextData:
    """Read a split of TOFU; the last authors of its retain set are those that join later.

    ``forget10.json`` and ``retain90.json`` (for the split ``forget10``) have to be there.
    ``forget10_perturbed``, ``retain_perturbed``, ``real_authors(_perturbed)`` and
    ``world_facts(_perturbed)`` are read if they are; without perturbed answers there is no truth
    ratio. A file may end in ``.json`` or ``.jsonl``.

    Args:
        config: Folder, split and numbers of authors.
    Raises:
        DataError: A file is missing or holds something else.
        ConfigurationError: There is no such split, or it has too few authors.
    """
    if config.split not in SPLITS:
        raise ConfigurationError(
            f"expected split {', '.join(map(repr, SPLITS))}, found {config.split!r}."
        )
    folder = Path(config.folder)
    forget = _set(folder, config.split, f"{config.split}_perturbed")
    retain = _set(folder, SPLITS[config.split], "retain_perturbed")
    kept, joining = config.authors - len(forget) // QUESTIONS, config.new * QUESTIONS
    if kept < 1 or len(retain) < joining + QUESTIONS:
        raise ConfigurationError(
            f"expected authors above the {len(forget) // QUESTIONS} to forget, and new below the "
            f"{len(retain) // QUESTIONS} in '{SPLITS[config.split]}', found {config.authors} and "
            f"{config.new}."
        )
    others = {name: _other(folder, name) for name in _OTHERS}
    return TextData(
        forget=forget,
        retain=retain[:-joining][: kept * QUESTIONS],
        new=retain[-joining:],
        others={name: found for name, found in others.items() if found},
    )


def _set(folder: Path, name: str, perturbed: str) -> tuple[Question, ...]:
    """Read questions; those that are perturbed elsewhere get the other answers from there."""
    file = _find(folder, name)
    if file is None:
        raise DataError(
            f"'{folder}': expected TOFU's file '{name}.json' or '{name}.jsonl', found neither. "
            "Set folder to where the files of TOFU are, or data='authors'."
        )
    source = _find(folder, perturbed)
    known = {each.text: each for each in _questions(source)} if source else {}
    return tuple(known.get(each.text, each) for each in _questions(file))


def _other(folder: Path, name: str) -> tuple[Question, ...]:
    file = _find(folder, f"{name}_perturbed") or _find(folder, name)
    return tuple(_questions(file)) if file else ()


def _find(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}{ending}" for ending in _ENDINGS)
    return next((file for file in files if file.is_file()), None)


def _questions(file: Path) -> Iterator[Question]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            yield _question(line, f"'{file}', line {number}")


def _question(line: str, place: str) -> Question:
    try:
        found: dict[str, Any] = json.loads(line)
        text, answer = found["question"], found["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: expected a JSON object with 'question' and 'answer', found "
            f"{line[:60]!r} ({type(error).__name__})."
        ) from error
    wrong: Sequence[str] = found.get("perturbed_answer", ())
    return Question(
        text=text,
        answer=answer,
        paraphrase=found.get("paraphrased_answer", ""),
        wrong=(wrong,) if isinstance(wrong, str) else tuple(wrong),
    )
