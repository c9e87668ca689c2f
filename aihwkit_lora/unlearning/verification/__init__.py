"""Verification: is it forgotten, compared with what, and what would bring it back?"""

from aihwkit_lora.unlearning.verification.attacks import RelearnAttack
from aihwkit_lora.unlearning.verification.criteria import Criteria
from aihwkit_lora.unlearning.verification.protocol import verify_forgetting
from aihwkit_lora.unlearning.verification.references import Retrained, RetrainedReferences
from aihwkit_lora.unlearning.verification.report import Finding, ForgettingReport, Verdict
from aihwkit_lora.unlearning.verification.verdict import markdown, print_verdict

__all__ = [
    "Criteria",
    "Finding",
    "ForgettingReport",
    "RelearnAttack",
    "Retrained",
    "RetrainedReferences",
    "Verdict",
    "markdown",
    "print_verdict",
    "verify_forgetting",
]
