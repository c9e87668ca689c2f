"""The request log: a chain that shows what was altered, and outlives crashes."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aihwkit_lora.errors import ConfigurationError, SealError
from aihwkit_lora.unlearning.request_log import RequestLog

WRITERS = """
import os, random, signal, sys, time
from aihwkit_lora.unlearning.request_log import RequestLog

def write(path, name, entries):
    child = os.fork()  # what is imported here is imported once
    if child:
        return child
    log = RequestLog(path)
    for number in range(entries):
        log.append("learn", f"{name} {number}", note="é" * 150, number_of_writer=number)
    os._exit(0)

together, path, moments = sys.argv[1], sys.argv[2], random.Random(0)
children = [write(together, f"writer {n}", 20) for n in range(3)]
print([os.waitpid(child, 0)[1] for child in children])
for kill in range(20):
    child = write(path, f"writer {kill}", 10**9)
    time.sleep(moments.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), end=" ")
    RequestLog(path).append("seal", f"after kill {kill}")
"""


@pytest.fixture(params=["file", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> RequestLog:
    return RequestLog(None if request.param == "memory" else tmp_path / "deep" / "log.jsonl")


def filled(path: Path, entries: int = 4) -> RequestLog:
    log = RequestLog(path)
    for number in range(entries):
        log.append("learn", f"request {number}", adapter=f"a{number}")
    return log


def test_entries_come_back_in_order_and_chained(log: RequestLog) -> None:
    assert (log.entries(), log.verify(), log.head) == ((), 0, "0" * 64)
    first = log.append("learn", "enrol é", unit="person 3", count=3, share=0.5, kept=True, by=None)
    second = log.append("seal", "forget 2")
    assert log.entries() == (first, second)
    assert dict(first.fields) == {
        "unit": "person 3", "count": 3, "share": 0.5, "kept": True, "by": None
    }  # fmt: skip
    assert (first.number, first.previous, first.request) == (0, "0" * 64, "enrol é")
    assert (second.number, second.previous) == (1, first.sha256)
    assert (log.verify(), log.head) == (2, second.sha256)
    assert pickle.loads(pickle.dumps(log)).entries() == log.entries()


def test_copies_write_into_the_same_log(log: RequestLog) -> None:
    copy.deepcopy(log).append("seal", "forget 2")
    assert log.verify() == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": torch.zeros(3)}, "'x': expected a finite number, a short text or None, got a Tens"),
        ({"x": np.float32(1.0)}, "got a float32"),
        ({"x": np.zeros(3)}, "got a ndarray"),
        ({"x": [1, 2]}, "got a list"),
        ({"x": b"data"}, "got a bytes"),
        ({"x": float("nan")}, "got nan"),
        ({"x": "y" * 201}, "'x': expected at most 200 characters, got 201"),
        ({"sha256": "0"}, "expected fields other than .* got 'sha256'"),
        ({"number": 3}, "got 'number'"),
    ],
)
def test_data_does_not_get_in(log: RequestLog, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        log.append("learn", "enrol 3", **fields)
    assert log.entries() == ()


@pytest.mark.parametrize(("kind", "request_"), [("", "a"), ("learn", ""), ("learn", 3)])
def test_kind_and_request_are_texts(log: RequestLog, kind: Any, request_: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a text, got"):
        log.append(kind, request_)


def altered(lines: list[str], number: int) -> list[str]:
    body = json.loads(lines[number])
    return [*lines[:number], json.dumps(body | {"adapter": "other"}), *lines[number + 1 :]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: altered(lines, 1), "line 2: expected the entry whose SHA-256 it holds"),
        (lambda lines: altered(lines, 3), "line 4: expected the entry whose SHA-256 it holds"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: expected entry 1 after .*got entry 2"),
        (lambda lines: lines[1:], "line 1: expected entry 0 after 000000000000…, got entry 1"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], "line 3: expected entry 2"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: expected entry 0"),
        (lambda lines: [*lines[:2], "[]", *lines[2:]], r"line 3: expected an entry .* got b'\[\]'"),
        (lambda lines: [*lines[:2], "", *lines[2:]], "line 3: expected an entry"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "log.jsonl"
    log = filled(path)
    assert log.verify() == 4
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(damage(lines)) + "\n", encoding="utf-8")
    with pytest.raises(SealError, match=message):
        log.verify()


def test_nothing_is_appended_to_an_altered_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = filled(path)
    path.write_text(path.read_text().replace("a3", "b3"))
    with pytest.raises(SealError, match="last line: expected the entry whose SHA-256 it holds"):
        log.append("learn", "request 4")


def test_a_line_rewritten_with_its_hash_breaks_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    other = filled(tmp_path / "other.jsonl", 1)
    filled(path)
    other.append("learn", "another request", adapter="a1")
    lines = path.read_text().splitlines()
    forged = (tmp_path / "other.jsonl").read_text().splitlines()
    path.write_text("\n".join([forged[0], forged[1], *lines[2:]]) + "\n")
    with pytest.raises(SealError, match="line 3: expected entry 2 after"):
        RequestLog(path).verify()


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_torn_line_is_set_aside(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    log = filled(path)
    whole = path.read_bytes()
    torn = whole.splitlines(keepends=True)[-1][:-cut]
    path.write_bytes(whole[:-cut])
    assert len(log.entries()) == 3
    with pytest.raises(SealError, match=f"line 4: expected a whole line, got {len(torn)} bytes"):
        log.verify()
    log.append("seal", "forget 2")
    assert [entry.number for entry in log.entries()] == [0, 1, 2, 3]
    assert (log.verify(), log.entries()[-1].kind) == (4, "seal")
    assert (tmp_path / "log.jsonl.torn").read_bytes() == torn + b"\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Logs that several processes have written; one process for both, since imports take long."""
    folder = tmp_path_factory.mktemp("logs")
    paths = [str(folder / name) for name in ("together.jsonl", "killed.jsonl")]
    command = [sys.executable, "-c", WRITERS, *paths]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return folder, said


def test_three_processes_write_one_chain(written: tuple[Path, str]) -> None:
    folder, said = written
    assert said.splitlines()[0] == "[0, 0, 0]"
    log = RequestLog(folder / "together.jsonl")
    assert log.verify() == 60
    for n in range(3):
        own = [e.fields["number_of_writer"] for e in log.entries() if f"writer {n}" in e.request]
        assert own == list(range(20))


def test_killed_writers_leave_a_chain_that_goes_on(written: tuple[Path, str]) -> None:
    folder, said = written
    assert said.splitlines()[1].split() == ["9"] * 20
    log = RequestLog(folder / "killed.jsonl")
    assert log.verify() > 20
    assert [entry.kind for entry in log.entries()].count("seal") == 20


def test_long_lines_are_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RequestLog(path)
    for number in range(3):
        log.append("learn", "enrol", **{f"field_{n}": "é" * 200 for n in range(30 * number)})
    path.write_bytes(path.read_bytes() + b"x" * 5000)
    log.append("seal", "forget")
    assert (log.verify(), path.with_name("log.jsonl.torn").stat().st_size) == (4, 5001)
