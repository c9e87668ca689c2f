"""Fictional authors, TOFU's files, and text as tokens."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.recipes.lm_authors import TOPICS
from aihwkit_lora.recipes.lm_data import LmDataConfig, load_texts
from aihwkit_lora.recipes.lm_tokens import (
    ANSWER,
    END,
    IGNORED,
    PAD,
    START,
    Sequences,
    TextBatches,
    Tokenizer,
    words,
)

DATA = load_texts(LmDataConfig())


def name_of(question):
    return re.search(r"([A-Z]\w+ [A-Z]\w+)", question.text).group(1)


def test_each_author_is_in_one_set():
    sets = [{name_of(q) for q in part} for part in (DATA.forget, DATA.retain, DATA.new)]
    assert [len(names) for names in sets] == [3, 27, 3]
    assert len(set.union(*sets)) == 33
    for part, names in zip((DATA.forget, DATA.retain, DATA.new), sets, strict=True):
        assert len(part) == len(names) * len(TOPICS)


def test_names_of_new_and_forgotten_authors_are_shared_with_kept_ones():
    kept = {word for question in DATA.retain for word in name_of(question).split()}
    for question in (*DATA.forget, *DATA.new):
        assert set(name_of(question).split()) <= kept


def test_the_same_seed_gives_the_same_authors_and_another_gives_others():
    assert load_texts(LmDataConfig()) == DATA
    assert load_texts(LmDataConfig(seed=1)).retain != DATA.retain


def test_wrong_answers_are_worded_as_the_paraphrase_and_say_something_else():
    for question in (*DATA.learnt, *DATA.new):
        assert question.answer != question.paraphrase
        assert question.fact in question.answer
        assert len(set(question.wrong)) == 3
        frame = question.paraphrase.split(question.fact)
        for wrong in question.wrong:
            assert wrong != question.paraphrase
            assert [wrong[: len(frame[0])], wrong[-len(frame[1]) :]] == frame


def test_options_are_checked():
    with pytest.raises(UnknownNameError, match="unknown text set 'tofo'"):
        LmDataConfig(data="tofo")
    for name in ("authors", "forgotten", "new"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of at least 1, found 0"):
            LmDataConfig(**{name: 0})
    with pytest.raises(ConfigurationError, match="forgotten=4 and authors=4"):
        LmDataConfig(authors=4, forgotten=4)
    with pytest.raises(ConfigurationError, match=r"at most 144 authors, .* 140 to learn and 5 new"):
        load_texts(LmDataConfig(authors=140, new=5))


def lines(count, name, **more):
    entries = [{"question": f"{name} {i}?", "answer": f"Yes {i}."} for i in range(count)]
    return "\n".join(json.dumps({**entry, **more}) for entry in entries) + "\n"


@pytest.fixture
def tofu(tmp_path):
    """The files of TOFU, with the same fields: 2 authors to forget, 5 to keep."""
    other = {"paraphrased_answer": "Surely.", "perturbed_answer": ["No.", "Never."]}
    files = {
        "forget01.json": lines(40, "Forget"),
        "forget01_perturbed.json": lines(40, "Forget", **other),
        "retain99.jsonl": lines(100, "Retain"),
        "retain_perturbed.json": lines(30, "Retain", **other),
        "world_facts_perturbed.json": lines(7, "World", perturbed_answer=["No."]),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def config(folder, **more):
    return LmDataConfig(data="tofu", folder=str(folder), **{"new": 1, **more})


def test_tofu_is_read_as_it_is_published(tofu):
    data = load_texts(config(tofu))
    assert [len(part) for part in (data.forget, data.retain, data.new)] == [40, 80, 20]
    assert data.forget[3].text == "Forget 3?"
    assert data.forget[3].right_answer == "Surely."
    assert data.forget[3].wrong == ("No.", "Never.")
    # The last authors of the retain set join later; only the first 30 questions are perturbed.
    assert data.new[0].text == "Retain 80?"
    assert [bool(q.wrong) for q in data.retain] == [True] * 30 + [False] * 50
    assert list(data.others) == ["world_facts"]
    assert data.others["world_facts"][0].right_answer == "Yes 0."


def test_fewer_authors_of_tofu_may_be_learnt(tofu):
    assert len(load_texts(config(tofu, authors=4)).retain) == 40
    assert len(load_texts(config(tofu, authors=4, new=2)).new) == 40
    with pytest.raises(ConfigurationError, match="authors above the 2 to forget"):
        load_texts(config(tofu, authors=2, forgotten=1))
    with pytest.raises(ConfigurationError, match="new below the 5 in 'retain99'"):
        load_texts(config(tofu, new=5))


def test_missing_and_broken_files_of_tofu_are_named(tofu):
    with pytest.raises(ConfigurationError, match=r"split 'forget01', .* found 'forget02'"):
        load_texts(config(tofu, split="forget02"))
    with pytest.raises(DataError, match=r"TOFU's file 'forget05\.json' or 'forget05\.jsonl'"):
        load_texts(config(tofu, split="forget05"))
    (tofu / "forget01_perturbed.json").write_text('\n{"question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"perturbed.json', line 2: .* 'answer', .*\(KeyError\)"):
        load_texts(config(tofu))
    (tofu / "forget01_perturbed.json").write_text("Who?\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: expected a JSON object"):
        load_texts(config(tofu))


@given(st.lists(st.sampled_from(["cat", "cow", "sat", "Otter", "a"]), min_size=1, max_size=9))
def test_words_come_back_whether_they_have_a_number_or_are_spelt(text):
    for size in (1, 3, 5):
        tokenizer = Tokenizer(["a cat , a cow sat", "Otter"], size=size)
        assert tokenizer.decode(tokenizer.encode(" ".join(text))) == text


def test_a_small_vocabulary_has_no_characters():
    assert Tokenizer(["b a", "b"]).names[5:] == ("b", "a")
    assert words("The author's 2nd: 'No!'") == [
        *("The", "author", "'", "s", "2nd", ":", "'", "No", "!", "'")
    ]


def test_only_the_answer_and_its_end_are_learnt():
    tokenizer = Tokenizer([each.text + each.answer for each in DATA.retain])
    sequences = Sequences.asked(tokenizer, DATA.retain[:9])
    for tokens, labels in zip(sequences.tokens.tolist(), sequences.labels.tolist(), strict=True):
        start, end = tokens.index(ANSWER) + 1, tokens.index(END) + 1
        assert tokens[0] == START
        assert labels[start:end] == tokens[start:end]
        assert set(labels[:start] + labels[end:]) <= {IGNORED}
        assert set(tokens[end:]) <= {PAD}


def test_batches_go_through_everything_before_they_repeat():
    tokenizer = Tokenizer(["a b c d e f g"])
    sequences = Sequences.of(tokenizer, [("a", each) for each in "bcdefg"])
    drawn = [
        tokens[:, 3].tolist()
        for tokens, _ in TextBatches(sequences, batch_size=3, batches=4, seed=1)
    ]
    assert [len(each) for each in drawn] == [3, 3, 3, 3]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(6, 12))
    again = TextBatches(sequences, batch_size=3, batches=4, seed=1)
    assert [tokens[:, 3].tolist() for tokens, _ in again] == drawn
