"""The guard against pairs that disagree, and what the doctor lists."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from aihwkit_lora import _environment as environment
from aihwkit_lora.errors import EnvironmentMismatchError


@pytest.fixture(autouse=True)
def looks_again() -> Iterator[None]:
    environment.check.cache_clear()
    yield
    environment.check.cache_clear()


def fail_as_aihwkit_1_1_with_torch_2_13() -> str:
    raise RuntimeError("Invalid weights dimensions: expected [2,2] tensor\nException raised from")


def test_this_environment_passes() -> None:
    environment.check()


def test_a_pair_that_disagrees_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"aihwkit": "1.1.0", "torch": "2.13.0"}
    monkeypatch.setattr(environment, "probe_pulsed_tile", fail_as_aihwkit_1_1_with_torch_2_13)
    monkeypatch.setattr(environment, "_version", versions.__getitem__)
    match = (
        r"aihwkit 1\.1\.0 cannot work with torch 2\.13\.0: .* failed with "
        r"'Invalid weights dimensions: expected \[2,2\] tensor'\..*pip install 'aihwkit==.*torch=="
    )
    with pytest.raises(EnvironmentMismatchError, match=match) as caught:
        environment.check()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), TypeError("no such type")])
def test_other_ways_to_disagree_are_named_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(environment, "probe_pulsed_tile", fail)
    with pytest.raises(EnvironmentMismatchError, match=f"of size 2×2 failed with '{error}'"):
        environment.check()


def test_a_sound_pair_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(environment, "probe_pulsed_tile", lambda: looks.append(1))
    for _ in range(3):
        environment.check()
    assert looks == [1]


def test_a_default_type_of_ones_own_does_not_look_like_a_fault() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        environment.check()
        assert [check.name for check in environment.doctor() if check.fatal] == []
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_a_missing_package_is_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ModuleNotFoundError("No module named 'aihwkit'")

    monkeypatch.setattr(environment, "probe_pulsed_tile", missing)
    with pytest.raises(ModuleNotFoundError, match=re.escape("No module named 'aihwkit'")):
        environment.check()


@pytest.mark.parametrize("program", ["/usr/bin/aihwkit-lora", "-m"])
def test_the_doctor_gets_past_the_guard(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "probe_pulsed_tile", fail_as_aihwkit_1_1_with_torch_2_13)
    monkeypatch.setattr("sys.argv", [program, "doctor"])
    environment.check()


@pytest.mark.parametrize(
    "arguments",
    [["aihwkit-lora", "run"], ["aihwkit-lora"], ["train.py", "doctor"], ["-m", "x", "doctor"]],
)
def test_nothing_else_gets_past_the_guard(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "probe_pulsed_tile", fail_as_aihwkit_1_1_with_torch_2_13)
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(EnvironmentMismatchError, match="compiled parts disagree"):
        environment.check()


def test_random_numbers_go_on_as_without_a_look() -> None:
    before = torch.get_rng_state()
    environment.check()
    environment.doctor()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_doctor_lists_versions_engines_and_libraries() -> None:
    checks = environment.doctor()
    assert [check.name for check in checks] == [
        "Python", "aihwkit", "torch", "peft", "pytorch-lightning", "torchmetrics", "transformers",
        "RPUCuda tiles", "torch tiles", "PEFT attaches", "Lightning imports", "CUDA", "torchvision",
    ]  # fmt: skip
    assert [check.name for check in checks if check.fatal] == []
    optional = {check.name for check in checks if not check.required}
    assert optional == {"transformers", "CUDA", "torchvision"}
    assert all(check.detail for check in checks)


def test_the_doctor_reports_a_broken_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "probe_pulsed_tile", fail_as_aihwkit_1_1_with_torch_2_13)
    fatal = [check for check in environment.doctor() if check.fatal]
    assert [check.name for check in fatal] == ["RPUCuda tiles"]
    assert fatal[0].detail == "Invalid weights dimensions: expected [2,2] tensor"


def test_the_doctor_reports_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    known = environment.metadata.version

    def version(name: str) -> str:
        if name in ("peft", "transformers"):
            raise environment.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    missing = {check.name: check for check in environment.doctor()[:7] if not check.ok}
    assert {name: check.detail for name, check in missing.items()} == {
        "peft": "not installed",
        "transformers": "not installed",
    }
    assert (missing["peft"].fatal, missing["transformers"].fatal) == (True, False)


def test_the_doctor_survives_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise KeyError

    monkeypatch.setattr(environment, "_probe_torch_tile", fail)
    monkeypatch.setattr(environment, "_probe_peft", fail)
    monkeypatch.setattr(environment, "_probe_cuda", fail)
    failed = {
        check.name: check.fatal for check in environment.doctor() if check.detail == "KeyError"
    }
    assert failed == {"torch tiles": True, "PEFT attaches": True, "CUDA": False}
