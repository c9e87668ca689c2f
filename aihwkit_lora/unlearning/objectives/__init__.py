"""What training an unlearning adapter minimises: one small object each, found by name.

They turn outputs away from what was forgotten; the arrays stay as they are. Importing this package
is cheap: it takes torch only.
"""

from aihwkit_lora.unlearning.objectives import (
    ascent,
    diffusion,
    hidden,
    preference,
    relabelling,
    teacher,
    tokens,
)
from aihwkit_lora.unlearning.objectives.catalogue import get, names, register, table
from aihwkit_lora.unlearning.objectives.negation import apply_negation_
from aihwkit_lora.unlearning.objectives.objective import Batch, ForgetRetain, Objective
from aihwkit_lora.unlearning.objectives.sparsity import block_norms, group_lasso, prune_unused_

DEFAULT = "npo"
"""Name of the objective to take if nothing speaks for another; bounded."""

__all__ = [
    "DEFAULT",
    "Batch",
    "ForgetRetain",
    "Objective",
    "apply_negation_",
    "ascent",
    "block_norms",
    "diffusion",
    "get",
    "group_lasso",
    "hidden",
    "names",
    "preference",
    "prune_unused_",
    "register",
    "relabelling",
    "table",
    "teacher",
    "tokens",
]
