"""Letters rendered from matplotlib's fonts."""

import itertools

import pytest
import torch

from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.recipes.letters import LETTERS, TYPEFACES, Typeface, glyphs

SIZE = 20


@pytest.mark.parametrize("name", TYPEFACES.names())
def test_each_letter_is_drawn_once_centred_and_inside_the_margin(name):
    ink = glyphs(name, SIZE)
    assert ink.shape == (26, 1, 4 * SIZE, 4 * SIZE)
    assert ink.min() >= 0.0
    assert ink.max() <= 1.0
    for letter, (image,) in zip(LETTERS, ink, strict=True):
        rows, columns = (image > 0).any(dim=1).nonzero(), (image > 0).any(dim=0).nonzero()
        for inked in (rows, columns):
            first, last = int(inked.min()), int(inked.max())
            assert min(first, 4 * SIZE - 1 - last) >= 0.08 * 4 * SIZE, letter
            assert abs(first - (4 * SIZE - 1 - last)) <= 1, letter


def test_there_are_fourteen_typefaces_and_no_two_letters_look_the_same():
    drawn = {name: glyphs(name, SIZE) for name in TYPEFACES.names()}
    assert len(drawn) == 14
    everything = torch.cat(list(drawn.values())).flatten(1)
    distances = torch.cdist(everything, everything) + 1e9 * torch.eye(len(everything))
    # A missing character would be drawn as the same box for many letters.
    assert distances.min() > 1.0


def test_one_typeface_has_one_size():
    tall = {name: (glyphs(name, SIZE)[8, 0] > 0.5).any(dim=1).sum() for name in ("sans", "roman")}
    for name, height in tall.items():
        other = (glyphs(name, SIZE)[7, 0] > 0.5).any(dim=1).sum()
        assert abs(int(height) - int(other)) <= 2


def test_unknown_typefaces_and_bad_sizes_are_refused():
    with pytest.raises(UnknownNameError, match=r"unknown typeface 'fractur'\. Did you mean 'frak"):
        glyphs("fractur", SIZE)
    with pytest.raises(ConfigurationError, match="letters of at least 8 pixels, found size=7"):
        glyphs("sans", 7)
    with pytest.raises(ConfigurationError, match="'cmr10': expected 26 characters, found 3"):
        Typeface(font="cmr10", characters="ABC")


def test_alphabets_of_mathematics_have_no_gaps():
    for name, first in (("fraktur", "𝔄"), ("script", "𝒜"), ("double-struck", "𝔸")):
        characters = TYPEFACES.get(name).characters
        assert characters[0] == first
        assert len(set(characters)) == 26
    assert all(a != b for a, b in itertools.pairwise(TYPEFACES.get("fraktur").characters))
