"""Three processes, one chip: what samples cost adds up, what is written counts once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aihwkit_lora as al
from aihwkit_lora.callbacks import PulseCounter, ranks
from aihwkit_lora.callbacks.ranks import Ranks
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Counts, Level

SCRIPT = Path(__file__).with_name("three_ranks.py")
SPAWNED = Path(__file__).with_name("spawned.py")
# One batch of two vectors on each of three ranks; see test_logged_values for that of one.
STEP = {
    "step": 0,
    "optimizer_steps": 1.0,
    "pulses": 0.0,
    "set_pulses": 0.0,
    "reset_pulses": 0.0,
    "verify_reads": 0.0,
    "pulsed_cells": 0.0,
    "failed_cells": 0.0,
    "pulses_total": 0.0,
    "energy_j": 152.0,
    "energy_j/write": 0.0,
    "energy_j/forward": 48.0,
    "energy_j/backward": 84.0,
    "energy_j/optimizer": 20.0,
    "energy_j/transfer": 0.0,
    "energy_j/analog": 78.0,
    "energy_j/digital": 74.0,
    "energy_j/memory": 0.0,
    "latency_s": 24.0,
    "latency_s/write": 0.0,
    "latency_s/forward": 12.0,
    "latency_s/backward": 12.0,
    "latency_s/optimizer": 0.0,
    "latency_s/transfer": 0.0,
    "energy_total_j": 152.0,
    "unpriced_events": 0.0,
}
NINE_BATCHES = {
    "energy_j": 416.0,
    "energy_j/forward": 144.0,
    "energy_j/backward": 252.0,
    "energy_j/analog": 234.0,
    "energy_j/digital": 182.0,
    "latency_s": 72.0,
    "latency_s/forward": 36.0,
    "latency_s/backward": 36.0,
    "energy_total_j": 416.0,
}
SIX_BATCHES = {
    "energy_j": 284.0,
    "energy_j/forward": 96.0,
    "energy_j/backward": 168.0,
    "energy_j/analog": 156.0,
    "energy_j/digital": 128.0,
    "latency_s": 48.0,
    "latency_s/forward": 24.0,
    "latency_s/backward": 24.0,
    "energy_total_j": 284.0,
}
# 3 SET pulses at 100 and 5 verify reads at 4, on the one chip
WRITTEN = {
    "pulses": 3.0,
    "set_pulses": 3.0,
    "verify_reads": 5.0,
    "pulses_total": 3.0,
    "energy_j": 472.0,
    "energy_j/write": 320.0,
    "energy_j/analog": 398.0,
}


def steps(*rows):
    return [STEP | {"step": number} | row for number, row in enumerate(rows)]


PLAIN = steps({}, {"energy_total_j": 304.0}, {"energy_total_j": 456.0})
ROWS = {
    "plain": PLAIN,
    "accumulated": steps(NINE_BATCHES),
    # The third batch takes no step.
    "by_hand": [STEP | SIX_BATCHES | {"step": 1, "optimizer_steps": 2.0}],
    # Each validation is two batches on each rank, 96 J in all.
    "validated": steps({}, {"energy_total_j": 400.0}, {"energy_total_j": 648.0}),
    "written": steps(
        {},
        WRITTEN | {"energy_total_j": 624.0},
        {"pulses_total": 3.0, "energy_total_j": 776.0},
    ),
    "written_apart": steps({}),
    "broken": steps({}),
    "distributed_tensors": PLAIN,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes saw, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def ledger_of(found, scenario):
    ledger = al.Ledger()
    ledger.load_state_dict(found[0][scenario]["ledger"])
    return ledger


@pytest.mark.parametrize("scenario", ROWS)
def test_every_rank_logs_the_same_global_numbers(found, scenario):
    assert [rank[scenario]["rows"] for rank in found] == [ROWS[scenario]] * 3


@pytest.mark.parametrize("scenario", sorted(ROWS.keys() - {"broken", "written_apart"}))
def test_every_rank_has_the_same_ledger(found, scenario):
    first = found[0][scenario]["ledger"]
    assert [rank[scenario]["ledger"] for rank in found] == [first] * 3


def test_reads_add_up_and_updates_and_writing_count_once(found):
    total = ledger_of(found, "written").total()
    assert total["tile_reads"] == 3 * 3 * 6
    assert total["transposed_tile_reads"] == 3 * 3 * 2
    assert total["forward_macs"] == 3 * 3 * 20
    assert total["optimizer_updates"] == 3 * 10
    assert (total["set_pulses"], total["verify_reads"]) == (3, 5)
    assert ledger_of(found, "validated").total(phase="validate")["tile_reads"] == 3 * 3 * 2 * 6


def test_ranks_that_write_different_things_are_named_on_every_rank(found):
    (error,) = {rank["written_apart"]["error"] for rank in found}
    assert error.startswith(
        "StageError: written arrays: expected the same counts on every rank, which all have the "
        "one chip, got rank 0: set_pulses 3; rank 1: set_pulses 3; rank 2: set_pulses 4. Write on"
    )


def test_an_exception_keeps_what_each_rank_has_counted(found):
    assert {rank["broken"]["error"] for rank in found} == {"RuntimeError: in a step"}
    for rank in found:
        ledger = al.Ledger()
        ledger.load_state_dict(rank["broken"]["ledger"])
        # All three of the first batch, and its own of the second, which went forwards only.
        assert ledger.total()["tile_reads"] == 3 * 6 + 6
        assert ledger.total()["transposed_tile_reads"] == 3 * 2


@pytest.mark.parametrize("accumulation", ["each batch", "three batches"])
def test_a_resumed_run_is_the_uninterrupted_one(found, accumulation):
    for rank in found:
        through, cut, rest = rank["resumed"][accumulation]
        assert (through["error"], rest["error"]) == ("", "")
        assert cut["error"] == "RuntimeError: power cut"
        assert cut["rows"] + rest["rows"] == through["rows"]
        assert len(cut["rows"]) == (2 if accumulation == "each batch" else 0)


def test_ledgers_of_resumed_runs_are_equal(found):
    for rank in found:
        through, _, rest = rank["resumed"]["each batch"]
        assert rest["ledger"] == through["ledger"] == found[0]["resumed"]["each batch"][0]["ledger"]
        # Gradients that other ranks have accumulated are in no checkpoint: what depends on the
        # values of weights goes another way then.
        through, _, rest = rank["resumed"]["three batches"]
        assert without_values(rest["ledger"]) == without_values(through["ledger"])


def without_values(state):
    ledger = al.Ledger()
    ledger.load_state_dict(state)
    return {k: n for k, n in ledger.total().items() if "x2g" not in k and "active" not in k}


def test_updates_of_sharded_parameters_add_up(found):
    """10 parameters, of which each rank has some."""
    assert sum(rank["sharded"]["own"] for rank in found) == 10
    energy = {key: value for key, value in STEP.items() if key in found[0]["sharded"]["rows"][0]}
    rows = [energy, energy | {"step": 1, "energy_total_j": 304.0}]
    assert [rank["sharded"]["rows"] for rank in found] == [rows] * 3


def test_lightning_starts_fsdp_on_gpus_only(found):
    """If this fails, run the meters under strategy='fsdp' and say so in docs/callbacks.md."""
    for rank in found:
        assert rank["refused"]["error"].startswith("The strategy `fsdp` requires a GPU accelerator")


# ------------------------------------------------------------------ without processes


@pytest.fixture
def others(monkeypatch):
    """Lets two more ranks seem to count along."""

    def pretend(*found):
        monkeypatch.setattr(ranks, "_gathered", lambda own: [own, *found])

    return pretend


def ledger(**entries):
    made = al.Ledger()
    for layer, counts in entries.items():
        made.add(Counts(counts), phase="train", layer=layer)
    return made


def test_entries_of_all_ranks_are_added(others):
    one, two = ledger(a={"tile_reads": 2}, c={"tile_reads": 7}), ledger(b={"tile_reads": 5})
    others(one.state_dict(), two.state_dict())
    total = ledger(a={"tile_reads": 100})
    Ranks().add_up(ledger(a={"tile_reads": 1}), total)
    found = {layer: counts["tile_reads"] for layer, counts in total.by_layer("train").items()}
    assert found == {"a": 103, "c": 7, "b": 5}


@pytest.mark.parametrize(("sharded", "updates"), [(False, 4), (True, 12)])
def test_updates_count_once_or_add_up(others, sharded, updates):
    same = ledger(a={"optimizer_updates": 4})
    others(same.state_dict(), same.state_dict())
    total = al.Ledger()
    Ranks(sharded=sharded).add_up(same, total)
    assert total.total()["optimizer_updates"] == updates


def test_an_adapter_is_loaded_once_and_its_traffic_adds_up(others):
    same = ledger(
        fc={"adapter_loads": 1, "sram_write_bits": 64, "offchip_read_bits": 64, "additions": 6},
        lora_A={"sram_read_bits": 8, "forward_macs_int8": 5},
    )
    others(same.state_dict(), same.state_dict())
    total = al.Ledger()
    Ranks().add_up(same, total)
    assert dict(total.total(layer="fc")) == {
        "adapter_loads": 1, "sram_write_bits": 64, "offchip_read_bits": 64, "additions": 18
    }  # fmt: skip
    assert dict(total.total(layer="lora_A")) == {"sram_read_bits": 24, "forward_macs_int8": 15}


def test_a_sum_is_as_sure_as_its_least_sure_rank(others):
    unsure = al.Ledger()
    unsure.add(Counts({"tile_reads": 1}, level=Level.BOUND), phase="train", layer="a")
    others(unsure.state_dict(), ledger(a={"tile_reads": 1}).state_dict())
    total = al.Ledger()
    Ranks().add_up(ledger(a={"tile_reads": 1}), total)
    assert total.total().level is Level.BOUND


def test_updates_that_differ_between_replicas_are_refused(others):
    others(
        ledger(a={"optimizer_updates": 4}).state_dict(),
        ledger(a={"optimizer_updates": 1000}).state_dict(),
    )
    expected = (
        r"phase 'train', layer 'a': expected the same counts .* got rank 0: optimizer_updates 4; "
        r"rank 1: optimizer_updates 4; rank 2: optimizer_updates 1,000\. Write on all ranks"
    )
    with pytest.raises(StageError, match=expected):
        Ranks().add_up(ledger(a={"optimizer_updates": 4}), al.Ledger())


def test_a_write_that_others_know_nothing_of_is_refused(others):
    others(Counts(), Counts())
    expected = r"got rank 0: set_pulses 9, verify_reads 3; rank 1: set_pulses 0, verify_reads 0;"
    with pytest.raises(StageError, match=expected):
        Ranks().agree(Counts({"set_pulses": 9, "verify_reads": 3}))


def test_a_process_alone_asks_nobody(lab, monkeypatch):
    def gathered(own):
        raise AssertionError("asked")

    monkeypatch.setattr(ranks, "_gathered", gathered)
    lab.fit(lab.Module(lab.tiny()), PulseCounter(al.Ledger()), sizes=(4, 2))


# ------------------------------------------------------------------ processes that Lightning spawns


@pytest.mark.slow
def test_spawned_processes_count_the_same_and_say_where_the_counts_are(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SPAWNED), str(tmp_path)],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["rows"] == [{k: str(v) for k, v in row.items()} for row in PLAIN]
    assert seen["ledger of the script"] == {"entries": []}
    stored = al.Ledger()
    stored.load_state_dict(seen["ledger of the checkpoint"])
    assert stored.total()["tile_reads"] == 3 * 3 * 6
    assert stored.total()["optimizer_updates"] == 3 * 10
    for callback in ("PulseCounter", "EnergyMeter"):
        assert done.stderr.count(f"{callback}: this process got a copy of the ledger") == 1
    assert seen["energy_total_j"] == 456.0
