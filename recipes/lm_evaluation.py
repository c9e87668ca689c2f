"""Examining a language model: what it answers, and how likely right and wrong answers are to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aihwkit_lora.recipes.lm_data import Question, TextData
from aihwkit_lora.recipes.lm_metrics import (
    answer_probability,
    choice_probability,
    forget_quality,
    model_utility,
    rouge_l_recall,
    truth_ratio,
    truthfulness,
)
from aihwkit_lora.recipes.lm_model import answer_greedily
from aihwkit_lora.recipes.lm_tokens import IGNORED, Sequences, Tokenizer, prompt, words
from aihwkit_lora.unlearning.objectives.terms import token_nll

SETS = ("forget", "retain", "new")
"""Sets of questions that sweeps over chips look at."""

_AT_ONCE = 128


class Examiner:
    """Measures what a model knows.

    Args:
        data: All questions.
        tokenizer: The vocabulary.
        longest: Most tokens of question and answer together.
        judged: Of each set at most this many questions, evenly spread, are judged by more than
            whether their answer is exact; the forgotten ones all are.
    """

    def __init__(
        self, data: TextData, tokenizer: Tokenizer, *, longest: int, judged: int = 48
    ) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.longest, self.judged = longest, judged

    def learnt(self, model: nn.Module, truth_ratios: Sequence[float] = ()) -> dict[str, float]:
        """Metrics of a model that has learnt all but the new authors.

        Args:
            model: From tokens to logits.
            truth_ratios: See :meth:`adapted`.
        Returns:
            The same, and the fraction of exact answers to all that is learnt.
        """
        return {
            "learnt_accuracy": self.exact(model, self.data.learnt),
            **self.adapted(model, truth_ratios, new=False),
        }

    def adapted(
        self, model: nn.Module, truth_ratios: Sequence[float], *, new: bool
    ) -> dict[str, float]:
        """Metrics of a model that has forgotten some authors.

        Args:
            model: From tokens to logits.
            truth_ratios: Of a model that has never seen these authors; empty if there are none.
            new: Whether new authors have been learnt.
        Returns:
            Fractions of exact answers, TOFU's metrics on each set, and forget quality.
        """
        metrics = self.known(model) | self._set(model, "forget", self.data.forget)
        if truth_ratios:
            metrics["forget_quality"] = forget_quality(self.truth_ratios(model), truth_ratios)
        if new:
            metrics |= self._set(model, "new", self.data.new)
        return metrics

    def known(self, model: nn.Module) -> dict[str, float]:
        """TOFU's metrics on all sets but the forgotten one, and utility over them.

        Args:
            model: From tokens to logits.
        """
        metrics = self._set(model, "retain", self.data.retain)
        for name, questions in self.data.others.items():
            metrics |= self._set(model, name, questions, choice=True)
        parts = ("_probability", "_rouge_l", "_truthfulness")
        values = [value for key, value in metrics.items() if key.endswith(parts)]
        return {**metrics, "model_utility": model_utility(values)}

    def sheet(self) -> tuple[Tensor, Tensor, Tensor]:
        """Questions about forgotten, kept and new authors, as the sweeps over chips take them.

        Returns:
            Tokens and labels, shape ``(n, t)``, and the number of the set in :data:`SETS`,
            shape ``(n,)``.
        """
        sets = [self.data.forget, self.data.retain, self.data.new]
        sequences = Sequences.asked(self.tokenizer, [each for some in sets for each in some])
        numbers = [number for number, some in enumerate(sets) for _ in some]
        return sequences.tokens, sequences.labels, torch.tensor(numbers)

    @torch.no_grad()
    def exact(self, model: nn.Module, questions: Sequence[Question]) -> float:
        """Fraction of questions that are answered word for word, taking the likeliest tokens.

        A model gives such an answer if, and only if, each token of it is the likeliest after the
        ones before; so one pass is enough.

        Args:
            model: From tokens to logits.
            questions: At least one.
        """
        pairs = [(question.text, question.answer) for question in questions]
        right = [_exact(logits, labels) for logits, labels in self._logits(model, pairs)]
        return int(torch.cat(right).sum()) / len(questions)

    def truth_ratios(self, model: nn.Module) -> list[float]:
        """Truth ratios on the forgotten questions that have wrong answers.

        Args:
            model: From tokens to logits.
        """
        questions = [question for question in self.data.forget if question.wrong]
        ratios: list[float] = self._truth_ratios(model, questions).tolist() if questions else []
        return ratios

    def answers(self, model: nn.Module, questions: Sequence[Question]) -> list[list[str]]:
        """Let a model write answers, always by the likeliest token.

        Args:
            model: From tokens to logits.
            questions: At least one.
        Returns:
            Words of each answer.
        """
        prompts = [prompt(self.tokenizer, question.text) for question in questions]
        parts = [prompts[start : start + _AT_ONCE] for start in range(0, len(prompts), _AT_ONCE)]
        with _evaluating(model):
            # One place is left for the end token.
            found = [answer_greedily(model, part, longest=self.longest - 1) for part in parts]
        return [self.tokenizer.decode(answer) for part in found for answer in part]

    def _set(
        self, model: nn.Module, name: str, questions: Sequence[Question], *, choice: bool = False
    ) -> dict[str, float]:
        judged = questions if name == "forget" else _spread(questions, self.judged)
        compared = [question for question in judged if question.wrong]
        metrics = {
            f"{name}_accuracy": self.exact(model, questions),
            f"{name}_probability": float(self._probabilities(model, judged).mean()),
            **{f"{name}_{key}": value for key, value in self._written(model, judged).items()},
        }
        if compared:
            ratios = self._truth_ratios(model, compared)
            metrics[f"{name}_truth_ratio"] = float(ratios.median())
            metrics[f"{name}_truthfulness"] = float(truthfulness(ratios).mean())
        if choice and compared:
            metrics[f"{name}_probability"] = self._choice(model, compared)
        return metrics

    def _written(self, model: nn.Module, questions: Sequence[Question]) -> dict[str, float]:
        """Let the model write answers: overlap with the right ones, and facts they hold."""
        answers = self.answers(model, questions)
        pairs = list(zip(questions, answers, strict=True))
        rouge = [rouge_l_recall(_plain(words(q.answer)), _plain(found)) for q, found in pairs]
        metrics = {"rouge_l": sum(rouge) / len(rouge)}
        facts = [_holds(found, words(q.fact)) for q, found in pairs if q.fact]
        if facts:
            metrics["fact_accuracy"] = sum(facts) / len(facts)
        return metrics

    def _probabilities(self, model: nn.Module, questions: Sequence[Question]) -> Tensor:
        return self._likely(model, [(q.text, q.answer) for q in questions])

    def _truth_ratios(self, model: nn.Module, questions: Sequence[Question]) -> Tensor:
        right, wrong = self._compared(model, questions)
        return torch.stack(
            [truth_ratio(one[None], some[None])[0] for one, some in zip(right, wrong, strict=True)]
        )

    def _choice(self, model: nn.Module, questions: Sequence[Question]) -> float:
        right, wrong = self._compared(model, questions)
        chosen = [
            choice_probability(one[None], some[None])
            for one, some in zip(right, wrong, strict=True)
        ]
        return float(torch.cat(chosen).mean())

    def _compared(
        self, model: nn.Module, questions: Sequence[Question]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Probabilities of the paraphrased answers, and of the wrong ones of each question."""
        right = self._likely(model, [(q.text, q.right_answer) for q in questions])
        wrong = self._likely(model, [(q.text, each) for q in questions for each in q.wrong])
        return right, wrong.split([len(q.wrong) for q in questions])

    @torch.no_grad()
    def _likely(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Tensor:
        found = [token_nll(logits, labels) for logits, labels in self._logits(model, pairs)]
        return torch.cat([answer_probability(sums, counts) for sums, counts in found])

    def _logits(
        self, model: nn.Module, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        with _evaluating(model):
            for start in range(0, len(pairs), _AT_ONCE):
                part = Sequences.of(self.tokenizer, pairs[start : start + _AT_ONCE])
                yield model(part.tokens), part.labels


class ExactAnswers(nn.Module):
    """A language model seen as a classifier: of each question, its set if the answer is exact.

    That is what sweeps over noisy or drifted chips look at.

    Args:
        model: From tokens to logits.
        labels: Of the questions, shape ``(n, t)``.
        sets: Number of each question's set, shape ``(n,)``.

    Example:
        >>> from aihwkit_lora.recipes.lm_model import CausalTransformer, LmShape
        >>> model = CausalTransformer(LmShape(vocabulary=9, length=3, width=8, depth=1))
        >>> tokens = torch.tensor([[1, 5, 3], [1, 6, 3]])
        >>> ExactAnswers(model, torch.full((2, 3), IGNORED), torch.tensor([0, 2]))(tokens)
        tensor([[1., 0., 0., 0.],
                [0., 0., 1., 0.]])
    """

    def __init__(self, model: nn.Module, labels: Tensor, sets: Tensor) -> None:
        super().__init__()
        self.model, self.labels, self.sets = model, labels, sets

    def forward(self, tokens: Tensor) -> Tensor:
        """Tell the set, or that the answer is another one.

        Args:
            tokens: Of all questions, shape ``(n, t)``.
        Returns:
            Shape ``(n, sets + 1)``, 1 in one column and 0 in the others.
        """
        chosen = torch.where(_exact(self.model(tokens), self.labels), self.sets, len(SETS))
        return (chosen[:, None] == torch.arange(len(SETS) + 1)).float()


def _exact(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each token of an answer is the likeliest one, shape ``(n,)``."""
    ahead = labels[:, 1:]
    return ((logits[:, :-1].argmax(dim=-1) == ahead) | (ahead == IGNORED)).all(dim=1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _spread[T](values: Sequence[T], most: int) -> Sequence[T]:
    if len(values) <= most:
        return values
    return [values[place * len(values) // most] for place in range(most)]


def _plain(found: Sequence[str]) -> list[str]:
    """Words in lower case, without punctuation."""
    return [word.lower() for word in found if word[0].isalnum()] or ["."]


def _holds(found: Sequence[str], fact: Sequence[str]) -> bool:
    size = len(fact)
    return any(list(found[i : i + size]) == list(fact) for i in range(len(found) - size + 1))
