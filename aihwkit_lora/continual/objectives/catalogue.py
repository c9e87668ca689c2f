"""The registry of continual objectives."""

from __future__ import annotations

from aihwkit_lora.continual.objectives.objective import ContinualObjective
from aihwkit_lora.unlearning.objectives.catalogue import Catalogue

_OBJECTIVES = Catalogue[ContinualObjective]("continual objective")
register, get = _OBJECTIVES.register, _OBJECTIVES.get
names, table = _OBJECTIVES.names, _OBJECTIVES.table
