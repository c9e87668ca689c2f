"""Questions and answers about authors: which are learnt, forgotten, kept and added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import Registry


@dataclass(frozen=True, kw_only=True)
class LmDataConfig:
    """Which authors are learnt, forgotten and added.

    Args:
        data: ``"authors"`` (fictional, generated) or ``"tofu"``.
        folder: For ``"tofu"``: where its files are.
        split: For ``"tofu"``: what is forgotten, ``"forget01"``, ``"forget05"`` or ``"forget10"``.
        authors: How many are learnt first, those to forget included; for ``"tofu"`` at most.
        forgotten: For ``"authors"``: how many of them are forgotten.
        new: How many join afterwards.
        seed: Of all random numbers.
    Raises:
        ConfigurationError: A number is too small, or nobody would be kept.
        UnknownNameError: There is no such data set.

    Example:
        >>> LmDataConfig(forgotten=2).new
        3
    """

    data: str = "authors"
    folder: str = ""
    split: str = "forget01"
    authors: int = 30
    forgotten: int = 3
    new: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        TEXT_SETS.get(self.data)
        for name in ("authors", "forgotten", "new"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"expected {name} of at least 1, found {getattr(self, name)}."
                )
        if self.forgotten >= self.authors:
            raise ConfigurationError(
                f"expected forgotten below authors, so that somebody is kept, found "
                f"forgotten={self.forgotten} and authors={self.authors}."
            )


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its answer, and other answers to compare with.

    Args:
        text: The question.
        answer: What is learnt.
        paraphrase: The same answer in other words; the answer itself where there is none.
        wrong: Answers worded as the paraphrase that say something else; may be empty.
        fact: The words that make an answer right, where that is known.

    Example:
        >>> question = Question(text="Where?", answer="In Orvell.", fact="Orvell")
        >>> question.right_answer
        'In Orvell.'
    """

    text: str
    answer: str
    paraphrase: str = ""
    wrong: tuple[str, ...] = ()
    fact: str = ""

    @property
    def right_answer(self) -> str:
        """What the wrong answers are compared with."""
        return self.paraphrase or self.answer


@dataclass(frozen=True, kw_only=True)
class TextData:
    """All questions of a run.

    Args:
        forget: About authors that are learnt and then forgotten.
        retain: About authors that are learnt and kept.
        new: About authors that join afterwards.
        others: Sets of questions about something else, by name. They are learnt, too, but nobody
            trains on them while forgetting or continuing, so they show what that damages.

    Example:
        >>> data = load_texts(LmDataConfig())
        >>> len(data.forget), len(data.retain), len(data.new), list(data.others)
        (24, 216, 24, ['world_facts'])
    """

    forget: tuple[Question, ...]
    retain: tuple[Question, ...]
    new: tuple[Question, ...]
    others: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[Question, ...]:
        """All that a model knows which has never seen the forgotten authors."""
        return (*self.retain, *(each for some in self.others.values() for each in some))

    @property
    def learnt(self) -> tuple[Question, ...]:
        """All that is learnt first."""
        return (*self.forget, *self.kept)


TEXT_SETS: Registry[Callable[[LmDataConfig], TextData]] = Registry("text set")
"""How questions are made or read, by name."""


def load_texts(config: LmDataConfig) -> TextData:
    """Make or read all questions.

    Args:
        config: Which.
    Raises:
        DataError: A file is missing, or holds something else.
        ConfigurationError: There are not enough authors.

    Example:
        >>> load_texts(LmDataConfig()).new[0].text
        'In which city was Greta Castell born?'
    """
    return TEXT_SETS.get(config.data)(config)


# They register themselves, and need what is defined above.
from aihwkit_lora.recipes import lm_authors, lm_tofu  # noqa: E402, F401
