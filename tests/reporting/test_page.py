"""The page of all workloads and chips: what is averaged, what is missing, what it says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from aihwkit_lora import chips
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Level, price
from aihwkit_lora.reporting import (
    Overview,
    Ratio,
    RunReport,
    StageRecord,
    draw_energies,
    overview,
    page,
    write_page,
)

CHIPS = ("hermes-14nm", "neurram-130nm", "rm-180nm")
FACES, SPEAKERS, IMAGES = "face_recognition", "speaker_authentication", "image_generation"


def stage(chip: str, name: str, metrics=None, *, wall_s=1.0, level=Level.SIMULATED, **counts):
    found = Counts(counts, level=level)
    return StageRecord(
        name=name,
        metrics=metrics or {},
        counts=found,
        energy=price(found, chips.get(chip)),
        trainable_parameters=5,
        fingerprint="",
        wall_s=wall_s,
    )


def ratio(value: float, **parts: str) -> Ratio:
    words = {"name": "energy", "numerator": "all", "denominator": "some", "includes": "pulses"}
    return Ratio(value=value, low=value / 2, high=2 * value, **(words | parts))


def run(recipe: str, chip: str, seed: int = 0, *, arms=("hybrid",), kept=0.9, **changes):
    def stages(arm: str) -> tuple[StageRecord, ...]:
        pulses = {} if arm in ("hybrid", "digital") else {"set_pulses": 100, "reset_pulses": 20}
        after = {"forget_accuracy": seed / 10, "retain_accuracy": kept - seed / 10}
        off = {"adapter_off_forget_accuracy": 1.0} if arm == "hybrid" else {}
        return (
            stage(chip, "learn", {"learnt_accuracy": 0.75}, level=Level.EXACT),
            stage(chip, "program", {"learnt_accuracy": 0.5}, set_pulses=1000),
            stage(chip, "forget", after | off, forward_macs=10**6 * (seed + 1), **pulses),
            stage(chip, "continue", after | {"new_accuracy": 0.25}, forward_macs=10**6, **pulses),
            stage(chip, "noise", {"hybrid/new_accuracy_at_3_us": 0.5}),
            stage(chip, "restore", after, forward_macs=10**9),
        )

    config = {"seed": seed, "chip": chip, **changes.pop("config", {})}
    made = RunReport(
        recipe=recipe,
        chip=chip,
        seed=seed,
        config=config,
        environment={"python": "3.12.0"},
        arms={arm: stages(arm) for arm in arms},
        ratios=(ratio(4.0 + seed),) if len(arms) > 1 else (),
    )
    return replace(made, **changes)


@pytest.fixture
def many() -> Overview:
    runs = [run(FACES, chip, s, arms=("hybrid", "reprogram")) for chip in CHIPS for s in (0, 1, 2)]
    runs.append(run(SPEAKERS, "rm-180nm", arms=("hybrid", "reprogram", "digital")))
    runs.append(run(IMAGES, "rm-180nm", arms=("digital", "deploy_once", "hybrid")))
    return overview(runs)


def lines(text: str, *cells: str) -> list[list[str]]:
    """Rows of tables that start with some cells."""
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()]
    return [row for row in rows if row[: len(cells)] == list(cells)]


def line(text: str, *cells: str) -> list[str]:
    (row,) = lines(text, *cells)
    return row


def section(text: str, title: str) -> str:
    (found,) = [part for part in text.split("\n### ") if part.startswith(title)]
    return found


def test_runs_are_sorted_by_workload_chip_and_seed(many):
    assert many.chips == CHIPS
    assert many.runs == 11
    found = {w.title: {c: cell.runs.seeds for c, cell in w.cells.items()} for w in many.workloads}
    assert found == {
        FACES: dict.fromkeys(CHIPS, (0, 1, 2)),
        IMAGES: {"rm-180nm": (0,)},
        SPEAKERS: {"rm-180nm": (0,)},
    }


def test_configurations_and_versions_are_never_averaged():
    plain = run(FACES, "rm-180nm", 0)
    other = run(FACES, "rm-180nm", 1, config={"rank": 8})
    newer = run(FACES, "hermes-14nm", 1, environment={"python": "3.13.0"})
    titles = [workload.title for workload in overview([plain, other, newer]).workloads]
    assert titles == [
        f"{FACES}: python = 3.12.0, rank = –",
        f"{FACES}: python = 3.12.0, rank = 8",
        f"{FACES}: python = 3.13.0, rank = –",
    ]


def test_nobody_takes_a_quick_run_for_a_result():
    (workload,) = overview([run(IMAGES, "rm-180nm", config={"quick": True})]).workloads
    assert workload.title == f"{IMAGES} (quick)"


def test_no_report_and_one_given_twice_are_refused():
    with pytest.raises(ConfigurationError, match="page: expected at least one report, got none"):
        overview([])
    twice = run(FACES, "rm-180nm", 3)
    with pytest.raises(ConfigurationError, match="two of 'face_recognition' on 'rm-180nm' with"):
        overview([twice, twice])


def test_arms_that_were_not_run_have_their_place(many):
    faces, images, speakers = many.workloads
    assert faces.arms == ("hybrid", "reprogram", "digital")
    assert images.arms == ("hybrid", "deploy_once", "digital")
    assert speakers.arms == ("hybrid", "reprogram", "digital")
    (own,) = overview([run(FACES, "rm-180nm", arms=("npo", "rmu"))]).workloads
    assert own.arms == ("npo", "rmu")


def test_adapting_is_what_follows_programming_without_noise_and_restoring(many):
    cell = many.workloads[0].cells["rm-180nm"]
    took = cell.adaptation("reprogram")
    assert took.stages == ("forget", "continue")
    assert took.pulses == 240
    mac = chips.get("rm-180nm").prices.energy["forward_macs"].interval
    macs = (1 + 2 + 3) / 3 * 1e6 + 1e6
    hybrid = cell.adaptation("hybrid")
    assert hybrid.energy_j.to_dict() == pytest.approx((mac * macs).to_dict(), rel=1e-12)
    assert hybrid.latency_s is None  # nobody has priced the time of digital work
    assert {n: v.mean for n, v in hybrid.metrics.items()} == pytest.approx(
        {"forget_accuracy": 0.1, "retain_accuracy": 0.8, "new_accuracy": 0.25}
    )
    assert cell.adaptation("digital") is None
    assert cell.wall_s("hybrid") == 6.0


def test_an_arm_that_adapts_nothing_has_dashes():
    only = replace(run(FACES, "rm-180nm"), arms={"hybrid": (stage("rm-180nm", "program"),)})
    row = line(page(overview([only])), FACES, "rm-180nm", "hybrid")
    assert row == [FACES, "rm-180nm", "hybrid", "0", *["–"] * 6, "1.00 s"]


def test_everything_at_a_glance(many):
    text = section(page(many).replace("\n## ", "\n### "), "At a glance")
    row = line(text, FACES, "rm-180nm", "hybrid")
    assert row[3:8] == [
        "0, 1, 2", "10.0 ± 10.0 % (worst 20.0)", "80.0 ± 10.0 % (worst 70.0)",
        "25.0 ± 0.0 % (worst 25.0)", "0",
    ]  # fmt: skip
    assert row[8].startswith("72.0 µJ [")
    assert row[9:] == ["–", "6.00 s"]
    assert line(text, FACES, "rm-180nm", "reprogram")[7] == "240"
    assert line(text, FACES, "rm-180nm", "digital")[3] == "not run"
    assert line(text, IMAGES, "hermes-14nm")[2:4] == ["–", "not run"]
    # Every combination is there.
    rows = [row[:2] for row in lines(text, FACES) + lines(text, IMAGES) + lines(text, SPEAKERS)]
    assert {tuple(row) for row in rows} == {
        (w, c) for w in (FACES, IMAGES, SPEAKERS) for c in CHIPS
    }


def test_ratios_of_all_workloads_and_chips_are_in_one_table(many):
    text = page(many)
    assert text.count("| above the line |") == 1
    row = line(text, FACES, "energy")
    assert row == [FACES, "energy", "all", "some", *["5.00 ± 1.00 [2.50, 10.0]"] * 3]
    assert line(text, IMAGES, "energy")[4:] == ["not run", "not run", "4.00 [2.00, 8.00]"]
    assert "- *energy*: pulses." in text


def test_ratios_keep_all_that_runs_say_about_them():
    both = {"arms": ("hybrid", "digital")}
    runs = [
        run(FACES, "rm-180nm", **both),
        run(FACES, "rm-180nm", 1, **both, ratios=(ratio(2.0, denominator="less"),)),
        run(FACES, "hermes-14nm", **both, ratios=(ratio(2.0, name="time", includes="slots"),)),
    ]
    text = page(overview(runs))
    assert line(text, FACES, "energy")[3:] == ["some; or less", "–", "3.00 ± 1.41 [1.50, 6.00]"]
    assert line(text, FACES, "time")[4:] == ["2.00 [1.00, 4.00]", "–"]
    assert "- *time*: slots." in text
    # One seed has it, the other does not.
    alone = [run(FACES, "rm-180nm", 0, **both), run(FACES, "rm-180nm", 1, **both, ratios=())]
    found = line(page(overview(alone)), FACES, "energy")
    assert found[-1] == "4.00 [2.00, 8.00], in 1 of 2 seeds"


def test_a_spread_that_nobody_could_see_is_left_out():
    both = {"arms": ("hybrid", "digital")}
    close = [ratio(4.0), ratio(4.001)]
    runs = [run(FACES, "rm-180nm", n, **both, ratios=(r,)) for n, r in enumerate(close)]
    assert line(page(overview(runs)), FACES, "energy")[-1] == "4.00 [2.00, 8.00]"


def test_runs_of_one_arm_compare_nothing():
    assert "No run has compared two arms." in page(overview([run(FACES, "rm-180nm")]))


def test_the_claims_of_the_paper_are_cited_and_not_reproduced(many):
    text = page(many)
    claims = text[text.index("## What the paper claims") : text.index(f"## {FACES}")]
    for factor in ("147.76", "387.95", "48.44"):
        assert text.count(factor) == claims.count(factor) == 1
    assert claims.count("not public |") == 3
    assert "Nothing on this page reproduces them" in claims


def test_stages_arm_beside_arm(many):
    text = section(page(many), f"{FACES} on rm-180nm, seeds 0, 1, 2")
    assert line(text, "stage") == ["stage", "", "hybrid", "reprogram", "digital: not run"]
    assert line(text, "learn")[1:] == ["learnt", *["75.0 ± 0.0 % (worst 75.0)"] * 2, "–"]
    assert lines(text, "", "pulses")[2][2:] == ["0", "120 (simulated)", "–"]
    assert lines(text, "", "forgotten, adapter off")[0][2:] == [
        "100.0 ± 0.0 % (worst 100.0)", "–", "–",
    ]  # fmt: skip
    energies = lines(text, "", "energy")
    pulse = chips.get("rm-180nm").prices.energy["set_pulses"]
    assert energies[0][2] == energies[0][3]
    assert energies[0][2].split()[0] == f"{1e9 * 1000 * pulse.value:.0f}"
    statuses = lines(text, "", "of it, by status of the price")
    assert statuses[0][2] == f"{pulse.status} 100 %"
    assert lines(text, "", "simulated in")[0][2:] == ["1.00 s", "1.00 s", "–"]
    assert f"### {IMAGES} on hermes-14nm: not run" in page(many)


def test_prices_of_several_statuses_share_an_energy():
    happened = {"set_pulses": 10**6, "verify_conversions": 1, "sram_read_bits": 10**6}
    forget = stage("rm-180nm", "forget", **happened)
    text = page(overview([replace(run(FACES, "rm-180nm"), arms={"hybrid": (forget,)})]))
    (row,) = lines(text, "", "of it, by status of the price")
    prices = chips.get("rm-180nm").prices.energy
    spent: dict[str, float] = {}
    for event, count in happened.items():
        status = str(prices[event].status)
        spent[status] = spent.get(status, 0.0) + count * prices[event].value
    first, *others = sorted(spent, key=lambda status: -spent[status])
    assert row[2].startswith(f"{first} {100 * spent[first] / sum(spent.values()):.0f} %")
    assert {part.split()[0] for part in row[2].split(", ")} == {first, *others}
    assert "library < 1 %" in row[2]


def test_prices_of_a_chip_that_is_not_registered_are_not_known_here():
    forget = stage("rm-180nm", "forget", set_pulses=5)
    forget = replace(forget, energy=replace(forget.energy, chip="theirs"))
    made = replace(run(FACES, "rm-180nm"), chip="theirs", arms={"hybrid": (forget,)})
    text = page(overview([made]))
    assert line(text, "", "of it, by status of the price")[2] == "not known here 100 %"


def test_sweeps_have_tables_of_their_own_and_parts_of_numbers_none():
    swept = {
        f"{model}/{group}_accuracy_at_{point}{worst}": value
        for model in ("base", "hybrid")
        for group, value in (("retain", 0.9), ("forget", 0.1))
        for point in ("1_us", "10_us", "86400s")
        for worst in ("", "_worst")
    }
    metrics = swept | {"frechet_distance": 0.5, "frechet/bold": 0.75, "retain_accuracy": 1.0}
    noise = (stage("rm-180nm", "noise", metrics, level=Level.EXACT),)
    once = replace(run(FACES, "rm-180nm"), arms={"hybrid": noise})
    text = page(overview([once]))
    assert line(text, "noise")[1:3] == ["kept", "100.0 %"]
    assert line(text, "", "frechet distance")[2] == "0.500"
    assert "bold" not in text
    (kept,) = lines(text, "hybrid, noise: hybrid, kept")[:1]
    assert kept[1:] == ["90.0 % (90.0)", "90.0 % (90.0)"]
    assert text.index("write noise of a cell") < text.index("time after programming")
    assert "| 1.00 µS | 10.0 µS |" in text
    assert "| 86.4 ks |" in text
    assert "86400" not in text


def test_worst_of_a_sweep_is_over_seeds_as_well():
    def noisy(seed: int, mean: float, worst: float) -> RunReport:
        metrics = {"forget_accuracy_at_2_us": mean, "forget_accuracy_at_2_us_worst": worst}
        return replace(
            run(FACES, "rm-180nm", seed), arms={"hybrid": (stage("rm-180nm", "noise", metrics),)}
        )

    text = page(overview([noisy(0, 0.0, 0.5), noisy(1, 0.25, 0.25), noisy(2, 0.5, 0.5)]))
    assert line(text, "hybrid, noise: forgotten")[1] == "25.0 % (50.0)"


def test_metrics_that_few_seeds_have_say_so():
    def known(seed: int, **metrics: float) -> RunReport:
        forget = (stage("rm-180nm", "forget", metrics),)
        return replace(run(FACES, "rm-180nm", seed), arms={"hybrid": forget})

    runs = [known(0, utility=0.25), known(1, utility=0.75, relapse=0.5), known(2, utility=0.5)]
    text = page(overview(runs))
    assert line(text, "forget")[1:3] == ["utility", "0.500 ± 0.250 (worst 0.250)"]
    assert line(text, "", "relapse")[2] == "0.500, in 1 of 3 seeds"


def test_the_page_is_written_with_its_chart_beside_it(many, tmp_path):
    file = tmp_path / "new" / "results.md"
    text = write_page(many, file)
    assert file.read_text(encoding="utf-8") == text == page(many, chart="results.png")
    assert "(results.png)" in text
    assert {f.name for f in file.parent.iterdir()} == {"results.md", "results.png"}
    assert "![" not in page(many)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures that were saved."""
    figures: list[Figure] = []
    save: Callable[..., None] = Figure.savefig

    def keep(figure: Figure, *arguments, **options) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_the_chart_has_a_panel_for_each_workload_and_a_row_for_each_arm(many, tmp_path, drawn):
    draw_energies(many, tmp_path / "chart.png")
    header = (tmp_path / "chart.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert width == 1350
    assert height > 900
    (figure,) = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes] == [FACES, IMAGES, SPEAKERS]
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert names[0] == ["hybrid", "reprogram", "digital"] * 3
    assert names[1] == ["", "", "hybrid", "deploy_once", "digital"]
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[0].count("not run") == 3
    assert texts[1].count("not run") == 2
    assert all(set(CHIPS) <= set(found) for found in texts)
    # Points stand where the numbers are.
    (point,) = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [6]][:1]
    energy = many.workloads[0].cells["rm-180nm"].adaptation("hybrid").energy_j
    assert list(point.get_xdata()) == [energy.value]


@pytest.mark.parametrize(
    ("arms", "why"),
    [
        ({"npo": ()}, "adapts nothing"),
        ({"npo": (stage("rm-180nm", "program", set_pulses=3),)}, "adapts nothing"),
        ({"npo": (stage("rm-180nm", "forget"),)}, "nothing priced"),
        ({}, "not run"),
    ],
)
def test_runs_that_spent_nothing_are_no_error_and_the_chart_says_why(arms, why, tmp_path, drawn):
    free = overview([replace(run(FACES, "rm-180nm"), arms=arms)])
    text = write_page(free, tmp_path / "page.md")
    (axes,) = drawn[0].axes
    assert sorted(text.get_text() for text in axes.texts) == sorted([why, "rm-180nm"])
    assert [row[2] for row in lines(text, FACES, "rm-180nm")][:1] == [*arms][:1]
