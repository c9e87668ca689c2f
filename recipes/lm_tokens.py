"""Text as numbers: words of a fixed vocabulary; all others are spelt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aihwkit_lora.recipes.lm_data import Question

PAD, START, ANSWER, END, UNKNOWN = range(5)
"""Numbers of the five tokens that are no text."""

IGNORED = -100
"""Label of a position whose token is not learnt."""

_SPECIAL = ("<pad>", "<start>", "<answer>", "<end>", "<unknown>")
_INSIDE = "##"


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks.

    Args:
        text: Any.

    Example:
        >>> words("The father was a baker.")
        ['The', 'father', 'was', 'a', 'baker', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text)


class Tokenizer:
    """Words to numbers and back.

    The most frequent words have a number each. Another word is spelt: its first character, then
    the others as ``##c``. A character that occurs nowhere is ``<unknown>``. Where all words have a
    number, there are no characters.

    Args:
        texts: What the vocabulary is made of.
        size: Most words to have.

    Example:
        >>> tokenizer = Tokenizer(["a cat sat", "a cow"], size=3)
        >>> tokenizer.decode(tokenizer.encode("a cat sat low"))
        ['a', 'cat', 'sat', '<unknown>ow']
    """

    def __init__(self, texts: Iterable[str], size: int = 2000) -> None:
        found = Counter(word for text in texts for word in words(text))
        common = [word for word, _ in found.most_common(size)]
        pieces: list[str] = []
        if len(found) > size:
            letters = sorted({letter for word in found for letter in word})
            pieces = [*letters, *(_INSIDE + letter for letter in letters)]
        self.names = tuple(dict.fromkeys([*_SPECIAL, *common, *pieces]))
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, text: str) -> list[int]:
        """Turn a text into numbers."""
        return [number for word in words(text) for number in self._word(word)]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Turn numbers into words."""
        found: list[str] = []
        for number in numbers:
            name = self.names[number]
            if name.startswith(_INSIDE) and found:
                found[-1] += name.removeprefix(_INSIDE)
            else:
                found.append(name)
        return found

    def _word(self, word: str) -> list[int]:
        if word in self._numbers:
            return [self._numbers[word]]
        pieces = (word[:1], *(_INSIDE + letter for letter in word[1:]))
        return [self._numbers.get(piece, UNKNOWN) for piece in pieces]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Questions with answers, as a causal model reads them.

    Each is ``<start> question <answer> answer <end>``.

    Args:
        tokens: Shape ``(n, t)``, with ``<pad>`` behind the end.
        labels: What is learnt, not shifted: the answer and its end; −100 elsewhere. Same shape.

    Example:
        >>> sequences = Sequences.of(Tokenizer(["who ? Ada"]), [("who ?", "Ada")])
        >>> sequences.tokens.tolist(), sequences.labels.tolist()
        ([[1, 5, 6, 2, 7, 3]], [[-100, -100, -100, -100, 7, 3]])
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Sequences:
        """Encode pairs of a question and an answer.

        Args:
            tokenizer: The vocabulary.
            pairs: At least one.
        """
        prompts = [prompt(tokenizer, question) for question, _ in pairs]
        answers = [[*tokenizer.encode(answer), END] for _, answer in pairs]
        rows = [[*before, *after] for before, after in zip(prompts, answers, strict=True)]
        hidden = [[IGNORED] * len(before) for before in prompts]
        labels = [[*before, *after] for before, after in zip(hidden, answers, strict=True)]
        return cls(tokens=padded(rows, PAD), labels=padded(labels, IGNORED))

    @classmethod
    def asked(cls, tokenizer: Tokenizer, questions: Sequence[Question]) -> Sequences:
        """Encode questions with the answers that are learnt.

        Args:
            tokenizer: The vocabulary.
            questions: At least one.
        """
        return cls.of(tokenizer, [(each.text, each.answer) for each in questions])


def prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """What an answer follows.

    Args:
        tokenizer: The vocabulary.
        question: Its text.

    Example:
        >>> prompt(Tokenizer(["who ?"]), "who ?")
        [1, 5, 6, 2]
    """
    return [START, *tokenizer.encode(question), ANSWER]


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of numbers as a matrix.

    Args:
        rows: At least one.
        filler: What short rows end in.

    Example:
        >>> padded([[1, 2], [3]], filler=0)
        tensor([[1, 2],
                [3, 0]])
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


class TextBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Draw batches, seeded: all sequences in a random order, then all again in another.

    Args:
        sequences: What to draw from.
        batch_size: Sequences of a batch, at least 1.
        batches: How many.
        seed: Of the orders.

    Example:
        >>> sequences = Sequences.of(Tokenizer(["a b"]), [("a", "b"), ("b", "a"), ("a", "a")])
        >>> [len(tokens) for tokens, _ in TextBatches(sequences, batch_size=2, batches=3, seed=0)]
        [2, 2, 2]
    """

    def __init__(self, sequences: Sequences, *, batch_size: int, batches: int, seed: int) -> None:
        self.sequences, self.batch_size = sequences, batch_size
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        count, wanted = len(self.sequences), self.batches * self.batch_size
        orders = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
        for index in torch.cat(orders)[:wanted].split(self.batch_size):
            yield self.sequences.tokens[index], self.sequences.labels[index]


def loader(batches: TextBatches) -> DataLoader[tuple[Tensor, Tensor]]:
    """Hand batches to Lightning as they are.

    Args:
        batches: Already made; they are in memory, so there are no workers.
    """
    return DataLoader(batches, batch_size=None)
