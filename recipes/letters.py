"""Letters in many typefaces, rendered from the fonts that matplotlib ships."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.registry import Registry

LETTERS = string.ascii_uppercase
"""The objects: 26 capital letters."""

# Where Unicode has older code points for a letter, the mathematical alphabets leave a gap.
_FRAKTUR = dict(zip("CHIRZ", "ℭℌℑℜℨ", strict=True))
_SCRIPT = dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ", strict=True))
_DOUBLE_STRUCK = dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ", strict=True))

_OVERSAMPLING = 4
_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Typeface:
    """Where the 26 letters of a typeface are.

    Args:
        font: Name of a font file of matplotlib, without its ending.
        characters: What is drawn for A to Z.
    Raises:
        ConfigurationError: These are not 26 characters.

    Example:
        >>> Typeface(font="DejaVuSans").characters[:3]
        'ABC'
    """

    font: str
    characters: str = LETTERS

    def __post_init__(self) -> None:
        if len(self.characters) != len(LETTERS):
            raise ConfigurationError(
                f"typeface of '{self.font}': expected 26 characters, found {len(self.characters)}."
            )


def _alphabet(first: int, exceptions: Mapping[str, str]) -> str:
    return "".join(exceptions.get(c, chr(first + i)) for i, c in enumerate(LETTERS))


TYPEFACES: Registry[Typeface] = Registry("typeface")
"""All typefaces by name: the styles."""

for _name, _typeface in {
    "sans": Typeface(font="DejaVuSans"),
    "oblique": Typeface(font="DejaVuSans-Oblique"),
    "slanted": Typeface(font="DejaVuSans-BoldOblique"),
    "bold": Typeface(font="DejaVuSerif-Bold"),
    "roman": Typeface(font="STIXGeneral"),
    "bold-roman": Typeface(font="STIXGeneralBol"),
    "computer-modern": Typeface(font="cmr10"),
    "monospace": Typeface(font="DejaVuSansMono-Bold"),
    "typewriter": Typeface(font="cmtt10"),
    "fraktur": Typeface(font="STIXGeneral", characters=_alphabet(0x1D504, _FRAKTUR)),
    "script": Typeface(font="STIXGeneral", characters=_alphabet(0x1D49C, _SCRIPT)),
    "double-struck": Typeface(font="STIXGeneral", characters=_alphabet(0x1D538, _DOUBLE_STRUCK)),
    "calligraphic": Typeface(font="cmsy10"),
    "italic": Typeface(font="DejaVuSerif-Italic"),
}.items():
    TYPEFACES.add(_name, _typeface)


@cache
def glyphs(typeface: str, size: int) -> Tensor:
    """Draw a typeface's letters, centred, as large as its widest or tallest letter allows.

    Args:
        typeface: Name of a typeface.
        size: Height and width of the images that will be made, in pixels; at least 8.
    Returns:
        Ink from 0 to 1, shape ``(26, 1, 4 · size, 4 · size)``: four times as fine as the images.
    Raises:
        UnknownNameError: There is no such typeface.
        ConfigurationError: The size is below 8.

    Example:
        >>> glyphs("sans", 20).shape
        torch.Size([26, 1, 80, 80])
    """
    if size < 8:
        raise ConfigurationError(f"expected letters of at least 8 pixels, found size={size}.")
    face, fine = TYPEFACES.get(typeface), _OVERSAMPLING * size
    # The largest letter fits the image less its margins.
    largest = max(max(_ink(face, c, fine)[1].shape) for c in face.characters)
    points = int(fine * fine * (1 - 2 * _MARGIN) / largest)
    return torch.stack([_centred(_ink(face, c, points)[1], fine) for c in face.characters])[:, None]


def _ink(face: Typeface, character: str, points: int) -> tuple[int, Tensor]:
    from PIL import Image, ImageDraw

    font = _font(face.font, points)
    canvas = Image.new("L", (4 * points, 4 * points))
    ImageDraw.Draw(canvas).text((points, points), character, fill=255, font=font)
    left, top, right, bottom = canvas.getbbox() or (0, 0, 0, 0)
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return top, pixels.view(4 * points, 4 * points)[top:bottom, left:right] / 255


def _centred(ink: Tensor, size: int) -> Tensor:
    height, width = ink.shape
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(ink, (left, size - width - left, top, size - height - top))


@cache
def _font(name: str, points: int):  # type: ignore[no-untyped-def]
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(file), points)
