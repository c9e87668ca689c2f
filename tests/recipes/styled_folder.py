"""A folder of tiny photographs, ``style/object/*.jpg``."""

import numpy as np
from PIL import Image

STYLES = ("cubist", "ink", "pastel", "pixel")
OBJECTS = ("cat", "dog", "house")


def folder_of(path, *, count=5, styles=STYLES):
    generator = np.random.default_rng(0)
    for number, style in enumerate(styles):
        for item in OBJECTS:
            (path / style / item).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 20, (24, 32, 3)) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(
                    path / style / item / f"{index}.jpg", quality=95
                )
    return path
