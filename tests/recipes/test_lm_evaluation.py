"""What the examiner says about models whose answers are known."""

import pytest
import torch
from torch import nn

from aihwkit_lora.recipes.lm_data import LmDataConfig, Question, TextData, load_texts
from aihwkit_lora.recipes.lm_evaluation import SETS, ExactAnswers, Examiner
from aihwkit_lora.recipes.lm_tokens import ANSWER, END, Sequences, Tokenizer
from aihwkit_lora.recipes.lm_training import Answering, TaughtNPO
from aihwkit_lora.unlearning import objectives

DATA = load_texts(LmDataConfig(authors=6, forgotten=2, new=1))
EVERYTHING = (*DATA.learnt, *DATA.new)
TOKENIZER = Tokenizer(
    [text for q in EVERYTHING for text in (q.text, q.answer, q.paraphrase, *q.wrong)]
)
SURE = 30.0


class Knows(nn.Module):
    """Gives the answers it is taught, word by word; says nothing to other questions."""

    def __init__(self, pairs):
        super().__init__()
        self.next = {}
        for row in Sequences.of(TOKENIZER, pairs).tokens.tolist() if pairs else []:
            for place in range(row.index(ANSWER), row.index(END)):
                self.next[tuple(row[: place + 1])] = row[place + 1]

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, len(TOKENIZER))
        for row, line in enumerate(tokens.tolist()):
            for place in range(len(line)):
                after = self.next.get(tuple(line[: place + 1]))
                if after is not None:
                    logits[row, place, after] = SURE
        return logits


def answers(*parts):
    return [(question.text, question.answer) for part in parts for question in part]


@pytest.fixture
def examiner():
    return Examiner(DATA, TOKENIZER, longest=24)


def test_a_model_that_knows_everything(examiner):
    paraphrases = [(q.text, q.paraphrase) for q in EVERYTHING]
    # Where both wordings begin alike, the one taught last is given.
    model = Knows([*paraphrases, *answers(DATA.learnt, DATA.new)])
    found = examiner.learnt(model)
    assert found["learnt_accuracy"] == 1.0
    for name in ("forget", "retain", "world_facts"):
        assert found[f"{name}_accuracy"] == 1.0
        assert found[f"{name}_rouge_l"] == 1.0
        assert found[f"{name}_fact_accuracy"] == 1.0
    assert found["retain_probability"] == pytest.approx(1.0, abs=1e-6)


def test_a_model_that_knows_nothing_finds_right_and_wrong_the_same(examiner):
    model = Knows([])
    found = examiner.adapted(model, examiner.truth_ratios(model), new=True)
    for name in ("forget", "retain", "new"):
        assert found[f"{name}_accuracy"] == 0.0
        # Wrong titles have as many words as right ones, so all lengths agree.
        assert found[f"{name}_truth_ratio"] == pytest.approx(1.0)
        assert found[f"{name}_probability"] == pytest.approx(1 / len(TOKENIZER))
    assert found["world_facts_probability"] == pytest.approx(1 / 4)
    assert found["model_utility"] == 0.0
    assert found["forget_quality"] == 1.0


def test_forgetting_is_seen_where_it_happens(examiner):
    knows, forgot = Knows(answers(DATA.learnt)), Knows(answers(DATA.kept))
    before, after = (examiner.adapted(m, [], new=False) for m in (knows, forgot))
    assert (before["forget_accuracy"], after["forget_accuracy"]) == (1.0, 0.0)
    assert (before["retain_accuracy"], after["retain_accuracy"]) == (1.0, 1.0)
    assert "new_accuracy" not in after
    assert "forget_quality" not in after


def test_a_fact_in_other_words_is_a_fact_but_no_exact_answer(examiner):
    model = Knows([(q.text, q.paraphrase) for q in DATA.forget])
    found = examiner.learnt(model)
    assert found["forget_accuracy"] == 0.0
    assert found["forget_fact_accuracy"] == 1.0
    assert 0.0 < found["forget_rouge_l"] < 1.0


def test_exact_answers_are_what_the_model_writes(examiner):
    model = Knows(answers(DATA.retain[:10], DATA.forget[3:7]))
    for questions in (DATA.retain, DATA.forget):
        said = examiner.answers(model, questions)
        wanted = [TOKENIZER.decode(TOKENIZER.encode(question.answer)) for question in questions]
        right = [one == other for one, other in zip(said, wanted, strict=True)]
        assert examiner.exact(model, questions) == sum(right) / len(right)


def test_sweeps_see_the_set_of_each_exact_answer(examiner):
    tokens, labels, sets = examiner.sheet()
    model = ExactAnswers(Knows(answers(DATA.retain[:10], DATA.new)), labels, sets)
    chosen = model(tokens).argmax(dim=1)
    counts = {name: int((chosen[sets == n] == n).sum()) for n, name in enumerate(SETS)}
    assert counts == {"forget": 0, "retain": 10, "new": len(DATA.new)}
    assert set(chosen[sets == 0].tolist()) == {len(SETS)}


def test_sets_without_wrong_answers_have_no_truth_ratio():
    questions = tuple(Question(text=q.text, answer=q.answer) for q in DATA.retain)
    data = TextData(forget=questions[:4], retain=questions[4:], new=questions[:1])
    examiner = Examiner(data, TOKENIZER, longest=24)
    found = examiner.learnt(Knows(answers(questions)))
    assert not [key for key in found if "truth" in key or "fact" in key]
    assert examiner.truth_ratios(Knows([])) == []
    assert found["model_utility"] == pytest.approx(1.0, abs=1e-6)


def test_large_sets_are_judged_by_some_of_their_questions(examiner):
    some = Examiner(DATA, TOKENIZER, longest=24, judged=4)
    model = Knows(answers(DATA.retain[::8]))
    # Four authors of eight questions: every eighth is one that is known.
    assert some.learnt(model)["retain_rouge_l"] == 1.0
    assert some.learnt(model)["retain_accuracy"] == 1 / 8


def test_answering_weighs_parts_alike():
    batch = {
        "new": (torch.tensor([[1, 2, 3]]), torch.tensor([[-100, 2, 3]])),
        "replay": (torch.tensor([[1, 2, 3]] * 5), torch.tensor([[-100, -100, 3]] * 5)),
    }
    even = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4))
    nn.init.zeros_(even[1].weight)
    nn.init.zeros_(even[1].bias)
    loss = Answering(needs=frozenset({"new", "replay"})).loss(even, batch)
    torch.testing.assert_close(loss, 2 * torch.tensor(4.0).log())


def test_a_teacher_is_the_reference_that_an_adapter_leaves_out():
    torch.manual_seed(0)
    inputs, labels = torch.randint(9, (4, 5)), torch.randint(9, (4, 5))
    model, teacher = (nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 9)) for _ in range(2))
    taught = TaughtNPO(teacher=teacher, beta=0.5, retain_weight=0.0)
    batch = {"forget": (inputs, labels)}
    # 2/beta · mean log(1 + (p/p0)^beta), over whole sequences.
    logs = [
        torch.log_softmax(m(inputs), -1)[:, :-1].gather(2, labels[:, 1:, None]).sum(dim=(1, 2))
        for m in (model, teacher)
    ]
    expected = 2 / 0.5 * torch.log1p(((logs[0] - logs[1]) * 0.5).exp()).mean()
    torch.testing.assert_close(taught.loss(model, batch), expected)
    taught.loss(model, batch).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert taught.name == objectives.get("token_npo").name
