"""Chips as data: what is read, what is refused and how that is told, and what comes back."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from aihwkit.inference import PCMLikeNoiseModel, ReRamCMONoiseModel, ReRamWan2022NoiseModel
from aihwkit.simulator.presets.devices import PCMPresetDevice, ReRamArrayOMPresetDevice
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.chips import Chip, Maker
from aihwkit_lora.chips.quantities import BOOKKEEPING, OVERLAPPING
from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.metering import EVENTS, Status

DOCS = Path(__file__).parents[2] / "docs" / "chips.md"
(EXAMPLE,) = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def values() -> dict[str, Any]:
    example: dict[str, Any] = yaml.safe_load(EXAMPLE)
    return example


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        path = tmp_path / "my-chip.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


@pytest.mark.parametrize("name", al.chips.names())
def test_a_shipped_chip_survives_the_way_to_yaml_and_back(
    name: str, write: Callable[[str], Path]
) -> None:
    chip = al.chips.get(name)
    path = write(yaml.safe_dump(al.chips.to_dict(chip), allow_unicode=True, sort_keys=False))
    again = al.chips.load(path)
    assert again == chip
    assert again is not chip
    # Two ways to the same file
    assert al.chips.find(path) == al.chips.find(str(path)) == chip


def test_the_example_of_the_docs_is_read_as_it_says(write: Callable[[str], Path]) -> None:
    chip = al.chips.load(write(EXAMPLE))
    assert (chip.name, chip.rows, chip.columns) == ("my-chip", 64, 64)
    assert (chip.mapping.g_min_siemens, chip.mapping.g_max_siemens) == (2e-6, 40e-6)
    assert (chip.mapping.pairs, chip.cell_states) == (1, (-0.2, 0.8))
    assert chip.write_policy.device is ReRamArrayOMPresetDevice
    assert chip.tolerance_siemens == pytest.approx(1.14e-6, rel=1e-9)
    assert chip.write_policy.statistics.median_pulses == 4.0
    pulse = chip.prices.energy["set_pulses"]
    assert (pulse.value, pulse.low, pulse.high, pulse.unit) == (30e-12, 25e-12, 40e-12, "J")
    assert pulse.status is Status.CITED
    assert chip.prices.latency["verify_slots"].value == 1e-6
    assert chip.prices.energy_free == BOOKKEEPING | {"row_drive_bits"}
    assert chip.prices.latency_free == OVERLAPPING
    assert chip.noise_model == Maker(ReRamWan2022NoiseModel, {"noise_scale": 1.0}, chip.mapping)
    assert chip.facts["read voltage"].value == 0.2


def test_the_example_programs_reads_and_prices_a_model(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    chip, ledger = al.chips.from_dict(values), al.Ledger()
    model = al.convert(nn.Sequential(nn.Linear(100, 10)), chip)
    report = al.program_(model, chip, ledger=ledger, seed=0)
    assert report.failed_fraction < 0.02
    al.freeze_(model)
    with al.observe(model, ledger, phase="infer"):
        model(torch.ones(1, 100))
    read = al.price(ledger.total(phase="infer"), chip)
    assert read.unpriced_energy == ()
    assert read.latency_s.value == pytest.approx(1e-6)
    # Its 2-tile product: 100 rows, 10 columns of each of two tiles
    drives = read.energy_by_event["active_row_drive_bits"].value
    assert drives == pytest.approx(100 * 8 * 0.78e-12)
    assert read.energy_by_event["adc_conversions"].value == pytest.approx(20 * 6.49e-12)


def test_numbers_may_be_written_as_yaml_1_1_misreads_them(values: dict[str, Any]) -> None:
    values["mapping"] = {"g_min_siemens": "2e-6", "g_max_siemens": "0.04 mS", "pairs": 1}
    values["endurance_pulses"]["value"] = "1e6"
    chip = al.chips.from_dict(values)
    assert (chip.mapping.g_min_siemens, chip.mapping.g_max_siemens) == (2e-6, 4e-5)
    assert chip.endurance_pulses is not None
    assert chip.endurance_pulses.value == 1e6


def test_what_is_left_out_takes_its_default(values: dict[str, Any]) -> None:
    for key in ("cell_states", "endurance_pulses", "noise_model", "facts"):
        del values[key]
    values["drift_compensation"] = None
    chip = al.chips.from_dict(values)
    assert (chip.cell_states, chip.scaling, dict(chip.facts)) == ((-1.0, 1.0), "tile", {})
    assert chip.endurance_pulses is chip.noise_model is chip.drift_compensation is None


def test_a_device_takes_arguments_or_comes_from_elsewhere(values: dict[str, Any]) -> None:
    values["write_policy"]["device"] = {"type": "PCMPresetDevice", "dw_min": 0.02}
    chip = al.chips.from_dict(values)
    assert chip.write_policy.device() == PCMPresetDevice(dw_min=0.02)
    values["write_policy"]["device"] = "aihwkit.simulator.presets.devices.PCMPresetDevice"
    assert al.chips.from_dict(values).write_policy.device is PCMPresetDevice
    # A noise model without a g_converter gets none.
    values["noise_model"] = {"type": "ReRamCMONoiseModel", "acceptance_range": 2}
    chip = al.chips.from_dict(values)
    assert chip.noise_model == Maker(ReRamCMONoiseModel, {"acceptance_range": 2})
    assert al.chips.from_dict(al.chips.to_dict(chip)) == chip


class OwnDevice(ReRamArrayOMPresetDevice):
    """Of a user."""


def test_classes_from_elsewhere_are_written_with_their_path() -> None:
    chip = al.chips.get("rm-180nm")
    own = replace(chip, write_policy=replace(chip.write_policy, device=OwnDevice))
    written = al.chips.to_dict(own)["write_policy"]["device"]
    assert written == f"{OwnDevice.__module__}.OwnDevice"


@pytest.mark.parametrize(
    "noise",
    [
        lambda: PCMLikeNoiseModel(),
        Maker(lambda: PCMLikeNoiseModel()),
        # Its own converter is not the one that a reader would give it.
        PCMLikeNoiseModel,
        Maker(PCMLikeNoiseModel, {}, al.chips.get("neurram-130nm").mapping),
    ],
)
def test_what_cannot_be_read_again_is_not_written(noise: Any) -> None:
    chip = replace(al.chips.get("rm-180nm"), noise_model=noise)
    match = r"chip\.noise_model: expected a class, or a chips\.Maker of one .* cannot be written"
    with pytest.raises(ConfigurationError, match=match):
        al.chips.to_dict(chip)


def put(values: dict[str, Any], keys: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced, added, or, for ``...``, removed."""
    changed = copy.deepcopy(values)
    *way, last = keys.split(".")
    place = changed
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


REFUSED: list[tuple[str, Any, str]] = [
    ("collumns", 3, r"'my\.yaml': unknown key 'collumns'\. Did you mean 'columns'"),
    ("columns", ..., r"'my\.yaml': expected the key 'columns', got none\. It has no default\."),
    ("rows", 6.5, r"rows: expected a whole number, got 6\.5"),
    ("rows", True, r"rows: expected a whole number, got True"),
    ("rows", 0, r"'my\.yaml': chip 'my-chip': expected rows 1 or more, got 0"),
    ("name", 5, r"name: expected text, got 5"),
    ("mapping", 5, r"mapping: expected a mapping, got 5"),
    ("mapping.g_max_siemens", "2 J", r"mapping\.g_max_siemens: expected a number, got '2 J'"),
    ("mapping.g_max_siemens", "much", r"mapping\.g_max_siemens: expected a number, got 'much'"),
    ("mapping.g_max_siemens", 1e-6, r"mapping: conductance window: .* 2 µS to 1 µS"),
    ("adc_full_scale", "8 V", r"adc_full_scale: expected a number, got '8 V'"),
    ("adc_full_scale", True, r"adc_full_scale: expected a number, got True"),
    ("cell_states", 3, r"cell_states: expected a list, got 3"),
    ("cell_states", [1], r"cell_states: expected a list of 2, got \[1\]"),
    ("cell_states", [0, "x"], r"cell_states: expected a number, got 'x'"),
    (
        "scaling",
        "row",
        r"scaling: expected one of the known names, got 'row'\. Known: column, tile",
    ),
    ("write_policy.tolerence", 1, r"write_policy: unknown key 'tolerence'\. Did .* 'tolerance'"),
    ("write_policy.tolerance", -1, r"write_policy: WritePolicy\.tolerance: expected above 0"),
    ("write_policy.abrupt_reset", 1, r"write_policy\.abrupt_reset: expected true or false, got 1"),
    ("write_policy.order", "colum", r"write_policy\.order: expected one of the known names"),
    ("write_policy.device", 3, r"write_policy\.device: expected the name of a class, got 3"),
    (
        "write_policy.device",
        "PCMPreset",
        r"write_policy\.device: .* name of a PulsedDevice, got 'PCMPreset'\. Did .* 'PCMPresetDev",
    ),
    ("write_policy.device", "no.such.Device", r"write_policy\.device: expected a class to import"),
    ("write_policy.device", "torch.nn.Linear", r"name of a PulsedDevice, got 'torch\.nn\.Linear'"),
    (
        "write_policy.device",
        {"type": "PCMPresetDevice", "dw_minn": 1},
        r"write_policy\.device: unknown argument 'dw_minn' of PCMPresetDevice\. Did .* 'dw_min'",
    ),
    (
        "noise_model",
        {"type": "HermesNoiseModel", "num_devices": 3},
        r"noise_model: expected arguments that HermesNoiseModel takes, got: Hermes supports either",
    ),
    ("prices.energie", {}, r"prices: unknown key 'energie'\. Did you mean 'energy'"),
    ("prices.energy", [], r"prices\.energy: expected a mapping, got \[\]"),
    ("prices.energy.set_pulses", 3, r"prices\.energy\.set_pulses: expected a mapping, got 3"),
    ("prices.energy.set_pulses.unit", "ns", r"prices: energy price of 'set_pulses': .* got s\."),
    ("prices.energy.set_pulses.unit", 1, r"set_pulses\.unit: expected text, got 1"),
    ("prices.energy.set_pulses.unit", ..., r"set_pulses: expected the key 'unit', got none"),
    ("prices.energy.set_pulses.value", "lots", r"set_pulses\.value: expected a number, got 'lots'"),
    ("prices.energy.set_pulses.low", 50, r"set_pulses: interval: expected 0 <= low <= value"),
    ("prices.energy.set_pulses.source", " ", r"set_pulses: quantity of .*: expected a source"),
    (
        "prices.energy.set_pulses.status",
        "measured",
        r"set_pulses\.status: expected one of the known names, got 'measured'\. Did",
    ),
    (
        "prices.energy.set_pulse",
        {"value": 1, "unit": "J", "source": "x", "status": "cited"},
        r"prices: unknown event 'set_pulse'\. Did you mean 'set_pulses'",
    ),
    ("prices.energy_free", "bookkeeping", r"prices\.energy_free: expected a list, got 'bookkeep"),
    ("prices.energy_free", ["bookkeping"], r"prices: unknown event 'bookkeping'"),
    ("prices.energy_free", ["set_pulses"], r"prices: energy prices: .* both for set_pulses"),
]


@pytest.mark.parametrize(("keys", "value", "match"), REFUSED)
def test_what_is_wrong_is_told_with_file_and_key(
    values: dict[str, Any], keys: str, value: Any, match: str
) -> None:
    wrong = put(values, keys, value)
    with pytest.raises(ConfigurationError, match=match) as caught:
        al.chips.from_dict(wrong, where="'my.yaml'")
    assert str(caught.value).startswith("'my.yaml': ")


@pytest.mark.parametrize("text", ["", "3", "- name: x"])
def test_a_file_that_holds_no_mapping_is_refused(write: Callable[[str], Path], text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"my-chip\.yaml': expected a mapping, got"):
        al.chips.load(write(text))


def test_a_file_that_is_no_yaml_is_refused(write: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"my-chip\.yaml': expected YAML, got: "):
        al.chips.load(write("name: [1"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"binary\.yaml': expected YAML, got: "):
        al.chips.load(tmp_path / "binary.yaml")


def test_a_key_that_stands_twice_is_refused(write: Callable[[str], Path]) -> None:
    again = "    shift_adds: {value: 9, unit: pJ, source: a second thought, status: assumed}\n"
    text = EXAMPLE.replace("    forward_macs:", again + "    forward_macs:")
    line = text.splitlines().index(again.rstrip()) + 1
    match = rf"my-chip\.yaml': expected each key once, got 'shift_adds' again in line {line}\."
    with pytest.raises(ConfigurationError, match=match):
        al.chips.load(write(text))


def test_a_file_that_is_not_there_and_a_name_that_nobody_has(tmp_path: Path) -> None:
    match = r"expected a chip in '.*gone\.yml', got: No such file"
    with pytest.raises(DataError, match=match):
        al.chips.find(tmp_path / "gone.yml")
    with pytest.raises(UnknownNameError, match=r"unknown chip 'rm-180'\. Did you mean 'rm-180nm'"):
        al.chips.find("rm-180")
    assert al.chips.find("rm-180nm") is al.chips.get("rm-180nm")


def test_a_chip_of_ones_own_prices_every_event_or_is_told_which_not(
    values: dict[str, Any],
) -> None:
    chip: Chip = al.chips.from_dict(values)
    report = al.price(al.Counts(dict.fromkeys(EVENTS, 1)), chip)
    known = chip.prices.energy.keys() | chip.prices.energy_free
    assert set(report.unpriced_energy) == set(EVENTS) - known
    assert "sram_read_bits" in report.unpriced_energy
