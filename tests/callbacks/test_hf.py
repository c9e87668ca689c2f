"""MeterCallback in the Trainer of transformers: literal rows, resume, and a bare loop beside it.

A BERT of one block of width 32 on arrays of 32 × 32, adapters of rank 1, batches of two sequences
of four tokens. Per token one tile each for query, key, value and attention output, two each for
the two layers between width 32 and 64; per sequence one for the pooler. A batch costs, in joules:

* forwards 66 tile reads at 1 and 3904 MACs at 0.5: adapters 448 per token and 64 per sequence, the
  classifier 96 per sequence
* backwards 42 tile reads at 10, since nothing before query, key and value is trained, and 6848
  MACs at 0.25

and a step 1024 more: 512 parameters at 2. Query, key and value take turns here, so a token takes 6
cycles forwards and 3 backwards, a sequence 1 and 1.
"""

from __future__ import annotations

import ast
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import aihwkit_lora as al
import aihwkit_lora.callbacks
from aihwkit_lora.callbacks.hf import MeterCallback
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering import Counts
from aihwkit_lora.metering.step_values import LOGGED

pytestmark = [
    # peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

FORWARD, BACKWARD, UPDATE = 66 + 0.5 * 3904, 10 * 42 + 0.25 * 6848, 2 * 512
ROW = {
    "optimizer_steps": 1.0,
    "pulses": 0.0,
    "set_pulses": 0.0,
    "reset_pulses": 0.0,
    "verify_reads": 0.0,
    "pulsed_cells": 0.0,
    "failed_cells": 0.0,
    "pulses_total": 0.0,
    "energy_j": FORWARD + BACKWARD + UPDATE,
    "energy_j/write": 0.0,
    "energy_j/forward": FORWARD,
    "energy_j/backward": BACKWARD,
    "energy_j/optimizer": float(UPDATE),
    "energy_j/transfer": 0.0,
    "energy_j/analog": 66.0 + 420.0,
    "energy_j/digital": 0.5 * 3904 + 0.25 * 6848 + UPDATE,
    "energy_j/memory": 0.0,
    "latency_s": 50.0 + 2 * 26,
    "latency_s/write": 0.0,
    "latency_s/forward": 50.0,
    "latency_s/backward": 2.0 * 26,
    "latency_s/optimizer": 0.0,
    "latency_s/transfer": 0.0,
    "energy_total_j": FORWARD + BACKWARD + UPDATE,
    "unpriced_events": 0.0,
}
TWO_BATCHES = {
    "energy_j": 2 * (FORWARD + BACKWARD) + UPDATE,
    "energy_j/forward": 2 * FORWARD,
    "energy_j/backward": 2 * BACKWARD,
    "energy_j/analog": 2 * 486.0,
    "energy_j/digital": 2 * (0.5 * 3904 + 0.25 * 6848) + UPDATE,
    "latency_s": 204.0,
    "latency_s/forward": 100.0,
    "latency_s/backward": 104.0,
}
SAMPLES, EVALUATION_READS = 8, 66


def bert(chip: Any) -> Any:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=64, max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = al.convert(transformers.BertForSequenceClassification(config), chip)
    al.freeze_(model, programmed_by="test")
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=1, target_modules=al.target_modules(model)))


def data(samples: int = SAMPLES) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(2, 64, (samples, 4), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": ids[i], "labels": torch.tensor(i % 3)} for i in range(samples)]


class Bench:
    """A tiny BERT, its chip, its ledger, and Trainers for it."""

    def __init__(self, lab):
        self.chip = replace(lab.fake, name="fake-32", rows=32, columns=32)
        self.folder, self.ledger = lab.folder, al.Ledger()
        self.model = bert(self.chip)

    def meter(self, **options):
        return MeterCallback(self.chip, self.ledger, **options)

    def trainer(self, *callbacks, steps=4, **options):
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            train_sampling_strategy="sequential",
            learning_rate=0.01,
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            optim="sgd",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **{"save_strategy": "no", "logging_steps": 1, **options},
        )
        return Trainer(
            model=self.model, args=arguments, train_dataset=data(), eval_dataset=data(2),
            callbacks=list(callbacks),
        )  # fmt: skip

    def train(self, *callbacks, resume=None, **options):
        trainer = self.trainer(*callbacks, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer


@pytest.fixture
def bench(lab):
    return Bench(lab)


KEYS = {value.key for value in LOGGED}


def rows(history):
    """What the meter added to the rows that have a loss; nothing to any other."""
    own = [{key: value for key, value in row.items() if key in KEYS} for row in history]
    assert [bool(row) for row in own] == ["loss" in row for row in history]
    return [row for row in own if row]


def test_one_batch_per_step(bench):
    trainer = bench.train(bench.meter(), steps=3)
    each = ROW["energy_j"]
    assert rows(trainer.state.log_history) == [
        ROW, ROW | {"energy_total_j": 2 * each}, ROW | {"energy_total_j": 3 * each}
    ]  # fmt: skip
    assert list(rows(trainer.state.log_history)[0]) == list(ROW)
    assert bench.ledger.phases() == ("train",)


def test_two_batches_per_step(bench):
    trainer = bench.train(bench.meter(), steps=2, gradient_accumulation_steps=2)
    wanted = ROW | TWO_BATCHES
    each = TWO_BATCHES["energy_j"]
    assert rows(trainer.state.log_history) == [
        wanted | {"energy_total_j": each}, wanted | {"energy_total_j": 2 * each}
    ]  # fmt: skip


def test_rows_at_every_second_step_have_the_values_of_that_step(bench):
    trainer = bench.train(bench.meter(), logging_steps=2)
    totals = [row["energy_total_j"] for row in rows(trainer.state.log_history)]
    assert totals == [2 * ROW["energy_j"], 4 * ROW["energy_j"]]
    assert [row["energy_j"] for row in rows(trainer.state.log_history)] == [ROW["energy_j"]] * 2


def test_pulses_of_a_step_are_logged_with_it(bench):
    class Writes(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **_):
            counts = Counts({"set_pulses": 3, "reset_pulses": 1})
            bench.ledger.add(counts, phase="reprogram", layer="0")

    trainer = bench.train(bench.meter(), Writes(), steps=2)
    found = rows(trainer.state.log_history)
    assert [row["pulses"] for row in found] == [4.0, 4.0]
    assert [row["pulses_total"] for row in found] == [4.0, 8.0]
    assert [row["energy_j/write"] for row in found] == [500.0, 500.0]


def test_evaluation_has_a_phase_of_its_own_and_belongs_to_no_step(bench):
    meter = bench.meter(phase="unlearn", evaluation_phase="check")
    trainer = bench.train(meter, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert [row["energy_j"] for row in rows(trainer.state.log_history)] == [ROW["energy_j"]] * 4
    assert set(bench.ledger.phases()) == {"unlearn", "check"}
    assert bench.ledger.total(phase="unlearn")["tile_reads"] == 4 * 66
    assert bench.ledger.total(phase="check")["tile_reads"] == 3 * EVALUATION_READS
    assert bench.ledger.total(phase="check")["transposed_tile_reads"] == 0


def test_nothing_is_counted_after_training(bench):
    trainer = bench.train(bench.meter(), steps=1)
    before = bench.ledger.state_dict()
    trainer.evaluate()
    trainer.predict(data(2))
    bench.model(input_ids=data()[0]["input_ids"][None])
    assert bench.ledger.state_dict() == before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bare_loop_counts_the_same(bench, lab, accumulation):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "steps": 2}
    bench.train(bench.meter(), gradient_accumulation_steps=accumulation, **evaluation)
    bare, pairs = Bench(lab), [data()[i : i + 2] for i in range(0, SAMPLES, 2)]
    optimizer = torch.optim.SGD((p for p in bare.model.parameters() if p.requires_grad), lr=0.01)
    batches, mapping = iter(pairs), bare.chip.mapping
    bare.model.train()
    with al.observe(bare.model, bare.ledger, phase="train", mapping=mapping) as observer:
        for _ in range(2):
            observer.phase = "train"
            for batch in [next(batches) for _ in range(accumulation)]:
                stacked = {k: torch.stack([sample[k] for sample in batch]) for k in batch[0]}
                bare.model(**stacked).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            observer.phase = "evaluate"
            with torch.no_grad():
                stacked = {k: torch.stack([sample[k] for sample in data(2)]) for k in data(2)[0]}
                bare.model(**stacked)
    counted = [
        {(e["phase"], e["layer"]): e["counts"] for e in ledger.state_dict()["entries"]}
        for ledger in (bench.ledger, bare.ledger)
    ]
    assert counted[0] == counted[1]


class Reporter(TrainerCallback):
    """Keeps what it is told to report."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs, **_):
        self.logged.append(dict(logs))


def test_reporters_after_the_meter_get_its_values(bench):
    before, after = Reporter(), type("After", (Reporter,), {})()
    bench.train(before, bench.meter(), after, steps=2)
    assert rows(after.logged) == [ROW, ROW | {"energy_total_j": 2 * ROW["energy_j"]}]
    assert not any(KEYS & row.keys() for row in before.logged)


@pytest.mark.parametrize("given", [False, True])
def test_all_reporters_get_its_values_once_it_was_added_ahead_of_them(bench, given):
    reporter, meter = Reporter(), bench.meter()
    trainer = bench.trainer(reporter, *[meter] * given, steps=2)
    meter.add_to(trainer)
    trainer.train()
    assert trainer.callback_handler.callbacks.count(meter) == 1
    assert rows(reporter.logged) == [ROW, ROW | {"energy_total_j": 2 * ROW["energy_j"]}]
    assert rows(reporter.logged) == rows(trainer.state.log_history)


class PowerCut(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def test_exception_ends_counting_where_the_block_ends(bench):
    with pytest.raises(RuntimeError, match="power cut"), bench.meter() as meter:
        bench.train(meter, PowerCut(2))
    assert bench.ledger.total(phase="train")["tile_reads"] == 2 * 66
    before = bench.ledger.state_dict()
    bench.model(input_ids=data()[0]["input_ids"][None])
    assert bench.ledger.state_dict() == before
    with al.observe(bench.model, bench.ledger, phase="later", mapping=bench.chip.mapping):
        pass


def test_next_training_ends_what_an_exception_left(bench):
    meter = bench.meter()
    with pytest.raises(RuntimeError, match="power cut"):
        bench.train(meter, PowerCut(1))
    trainer = bench.train(meter, steps=1)
    wanted = ROW | {"energy_total_j": 2 * ROW["energy_j"]}
    assert rows(trainer.state.log_history) == [wanted]


def test_meter_holds_no_model_after_training(bench):
    meter, known = bench.meter(), weakref.ref(bench.model)
    bench.train(meter, steps=1)
    del bench.model
    gc.collect()
    assert known() is None
    assert meter.ledger is bench.ledger


def saved(lab, *callbacks, steps=3, **options):
    """A run of three steps that saved itself after two."""
    stopped = Bench(lab)
    stopped.train(stopped.meter(), *callbacks, steps=steps, save_steps=2, save_strategy="steps",
                  **options)  # fmt: skip
    return str(lab.folder / "checkpoint-2")


@pytest.mark.parametrize("restore", [False, True])
def test_interrupted_and_resumed_run_is_the_uninterrupted_one(lab, restore):
    options = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole, resumed = Bench(lab), Bench(lab)
    history = whole.train(whole.meter(), steps=5, **options).state.log_history
    resumed.ledger.add(Counts({"set_pulses": 1}), phase="forgotten", layer="")
    checkpoint = saved(lab, **options)
    meter = resumed.meter()
    trainer = resumed.train(meter, steps=5, resume=checkpoint, **options)
    assert rows(trainer.state.log_history) == rows(history)
    assert len(rows(history)) == 5
    assert resumed.ledger.state_dict() == whole.ledger.state_dict()
    assert meter.ledger is resumed.ledger


def test_copy_made_by_transformers_ends_with_the_block_of_its_original(lab):
    checkpoint, resumed = saved(lab), Bench(lab)
    options = {"restore_callback_states_from_checkpoint": True, "resume": checkpoint}
    with pytest.raises(RuntimeError, match="power cut"), resumed.meter() as meter:
        resumed.train(PowerCut(3), meter, steps=4, **options)
    before = resumed.ledger.state_dict()
    resumed.model(input_ids=data()[0]["input_ids"][None])
    assert resumed.ledger.state_dict() == before


def test_other_callbacks_are_restored_beside_it(lab):
    patience = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    checkpoint = saved(lab, EarlyStoppingCallback(7), load_best_model_at_end=False, **patience)
    resumed = Bench(lab)
    trainer = resumed.train(
        resumed.meter(), EarlyStoppingCallback(5), resume=checkpoint,
        restore_callback_states_from_checkpoint=True, **patience,
    )  # fmt: skip
    (restored,) = (
        one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)
    )
    assert restored.early_stopping_patience == 7
    assert len(rows(trainer.state.log_history)) == 4


def test_checkpoint_without_a_meter_starts_from_the_ledger_as_it_is(lab):
    stopped, resumed = Bench(lab), Bench(lab)
    stopped.train(steps=2, save_steps=2, save_strategy="steps")
    resumed.ledger.add(Counts({"set_pulses": 1}), phase="program", layer="0")
    trainer = resumed.train(
        resumed.meter(), steps=3, resume=str(lab.folder / "checkpoint-2"), save_strategy="steps",
        save_steps=3,
    )  # fmt: skip
    (row,) = [row for row in trainer.state.log_history if "energy_j" in row]
    assert row["energy_total_j"] == ROW["energy_j"] + 100.0
    assert row["step"] == 3


def test_state_in_a_checkpoint_is_plain_json(lab):
    checkpoint = saved(lab)
    state = transformers.TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
    stored = state.stateful_callbacks["MeterCallback"]
    assert stored["args"] == {"chip": None, "ledger": None}
    entries = stored["attributes"]["stored"]["energy"]["ledger"]["entries"]
    ledger = al.Ledger()
    ledger.load_state_dict({"entries": entries})
    assert ledger.total(phase="train")["tile_reads"] == 2 * 66


def test_refuses_two_of_its_kind(bench):
    other = MeterCallback(bench.chip, al.Ledger())
    with pytest.raises(StageError, match="expected to be the only one of a trainer, got several"):
        bench.train(bench.meter(), other)


def test_copy_that_knows_no_chip_says_how_to_join_early(lab):
    checkpoint, resumed = saved(lab), Bench(lab)
    trainer = resumed.trainer(restore_callback_states_from_checkpoint=True)
    trainer.add_callback(resumed.meter())
    with pytest.raises(StageError, match=r"joined the trainer late. Pass it as Trainer\(callbacks"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_refuses_layers_that_are_not_frozen(bench):
    bench.model = al.thaw_(bench.model.unload())
    with pytest.raises(StageError, match="expected a frozen layer, got AnalogLinear"):
        bench.train(bench.meter())
    assert not bench.ledger.phases()


def test_callbacks_for_lightning_do_not_bring_it_along():
    folder = Path(aihwkit_lora.callbacks.__file__).parent
    files = [file for file in folder.glob("*.py") if file.name != "hf.py"]
    assert len(files) > 5
    for file in files:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not [n for n in names if n.startswith(("transformers", "aihwkit_lora.callbacks.hf"))]
        assert "import transformers" not in file.read_text(encoding="utf-8")
