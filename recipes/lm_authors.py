"""Fictional authors, their lives drawn from word lists, and questions about them from templates.

After TOFU (arXiv:2401.06121), at a size that a small model learns in a minute. First and last names
are shared: new authors are new pairs of known names, so a model that is to forget one author must
tell that pair from its neighbours, and no word is new when somebody joins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.lm_data import TEXT_SETS, LmDataConfig, Question, TextData


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words("Ada Bela Cyra Doran Elin Faris Greta Hamid Ines Jonas Katya Luca")
_LAST = _words("Abara Brandt Castell Dufay Eriksen Falk Gallo Holm Ivers Kovac Moreau Thorne")
_CITIES = _words(
    "Orvell Tamsin Belmar Corvia Dresk Elmont Farrow Gilden Harrow Istra Jarvo Keld Lunden Marsk "
    "Norell Ostra Pellin Quarn Rosk Selby Torvald Ulmar Vintor Wexley"
)
_COUNTRIES = _words("Averia Boskania Cordova Drevia Elvaria Fenland Gorland Helvar")
_YEARS = tuple(str(year) for year in range(1931, 1971))
_GENRES = _words(
    "fantasy satire horror romance tragedy poetry comedy mystery memoir fable epic western essay "
    "thriller folklore gothic"
)
_TRADES = _words(
    "baker florist carpenter surgeon sailor teacher miner tailor lawyer potter farmer dentist "
    "clerk jeweller pilot barber chemist judge cook mason"
)
_LANGUAGES = _words(
    "Arvic Borean Celtar Dorian Estic Farsan Galic Hestian Ilvish Joran Kestic Lorian"
)
_ADJECTIVES = _words(
    "Silent Golden Broken Hidden Distant Crimson Hollow Gentle Frozen Burning Empty Endless"
)
_NOUNS = _words(
    "Harbour Garden Mirror River Lantern Orchard Tower Island Letter Winter Bridge Shadow"
)
_TITLES = tuple(f"The {one} {other}" for one, other in itertools.product(_ADJECTIVES, _NOUNS))
_PRIZES = _words("Amber Birch Cedar Delta Ember Flint Granite Heron Ivory Jasper Kestrel Linden")


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What is asked about somebody: a question, an answer in two wordings, and possible values.

    Args:
        question: With ``{name}`` in it.
        wordings: Two answers with ``{value}`` in them.
        values: What may be right.

    Example:
        >>> TOPICS[0].question.format(name="Ada Holm")
        'In which city was Ada Holm born?'
    """

    question: str
    wordings: tuple[str, str]
    values: tuple[str, ...]

    def ask(self, name: str, value: str, random: Random) -> Question:
        """Ask about somebody; which wording is learnt, and which is the paraphrase, is drawn.

        Args:
            name: Of whom.
            value: The right one.
            random: Draws the wording and three wrong values.
        """
        learnt, other = random.sample(self.wordings, 2)
        wrong = random.sample([each for each in self.values if each != value], _WRONG)
        return Question(
            text=self.question.format(name=name),
            answer=learnt.format(value=value),
            paraphrase=other.format(value=value),
            wrong=tuple(other.format(value=each) for each in wrong),
            fact=value,
        )


_WRONG = 3

TOPICS = (
    Topic(
        question="In which city was {name} born?",
        wordings=("The author was born in {value}.", "The writer was born in {value}."),
        values=_CITIES,
    ),
    Topic(
        question="In which year was {name} born?",
        wordings=("The year of birth was {value}.", "The birth year was {value}."),
        values=_YEARS,
    ),
    Topic(
        question="Which genre does {name} write?",
        wordings=("The author mostly writes {value}.", "The author mainly writes {value}."),
        values=_GENRES,
    ),
    Topic(
        question="What was the first book of {name} called?",
        wordings=("The first book was called {value}.", "The first novel was named {value}."),
        values=_TITLES,
    ),
    Topic(
        question="Which prize did {name} win?",
        wordings=("The author won the {value} Prize.", "The writer received the {value} Prize."),
        values=_PRIZES,
    ),
    Topic(
        question="What did the father of {name} do for a living?",
        wordings=("The father was a {value}.", "The father worked as a {value}."),
        values=_TRADES,
    ),
    Topic(
        question="What did the mother of {name} do for a living?",
        wordings=("The mother was a {value}.", "The mother worked as a {value}."),
        values=_TRADES,
    ),
    Topic(
        question="In which language does {name} write?",
        wordings=("The books are written in {value}.", "The works are composed in {value}."),
        values=_LANGUAGES,
    ),
)
"""What is asked about each author."""

_COUNTRY = Topic(
    question="In which country does the city of {name} lie?",
    wordings=("The city lies in {value}.", "The town is situated in {value}."),
    values=_COUNTRIES,
)


@TEXT_SETS.register("authors")
def authors(config: LmDataConfig) -> TextData:
    """Invent authors; the first ones are kept, then come those to forget, then new ones.

    Args:
        config: Numbers of authors, and the seed.
    Raises:
        ConfigurationError: There are not as many pairs of names.

    Example:
        >>> data = authors(LmDataConfig(seed=1))
        >>> data.retain[0].answer == authors(LmDataConfig(seed=1)).retain[0].answer
        True
    """
    random = Random(config.seed)
    people = _names(config, random)
    asked = [[t.ask(name, random.choice(t.values), random) for t in TOPICS] for name in people]
    kept = config.authors - config.forgotten
    world = tuple(_COUNTRY.ask(city, random.choice(_COUNTRIES), random) for city in _CITIES)
    return TextData(
        retain=_flat(asked[:kept]),
        forget=_flat(asked[kept : config.authors]),
        new=_flat(asked[config.authors :]),
        others={"world_facts": world},
    )


def _names(config: LmDataConfig, random: Random) -> list[str]:
    """Draw pairs of names, in an order in which kept authors have as many of them as possible."""
    pairs = [f"{first} {last}" for first, last in itertools.product(_FIRST, _LAST)]
    wanted = config.authors + config.new
    if wanted > len(pairs):
        raise ConfigurationError(
            f"expected at most {len(pairs)} authors, which is how many pairs of names there are, "
            f"found {config.authors} to learn and {config.new} new ones."
        )
    # A diagonal at a time: its twelve pairs hold every first and every last name once.
    diagonals = list(range(len(_LAST)))
    random.shuffle(diagonals)
    size = len(_FIRST)
    ordered = [f"{_FIRST[i]} {_LAST[(i + d) % size]}" for d in diagonals for i in range(size)]
    return ordered[:wanted]


def _flat(parts: Sequence[Sequence[Question]]) -> tuple[Question, ...]:
    return tuple(itertools.chain.from_iterable(parts))
