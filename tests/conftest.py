"""Settings of all tests."""

from __future__ import annotations

import matplotlib as mpl
from hypothesis import settings

mpl.use("Agg")

# The first example pays for imports and compiled code, and two workers share two cores, so a
# deadline for each example would fail on slow machines only.
settings.register_profile("aihwkit-lora", deadline=None)
settings.load_profile("aihwkit-lora")
