"""Whether a person is forgotten: the whole protocol, beside models that never saw the person."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from aihwkit_lora.metering import Ledger
from aihwkit_lora.recipes.face_data import FaceImages
from aihwkit_lora.unlearning.verification import (
    ForgettingReport,
    RetrainedReferences,
    markdown,
    verify_forgetting,
)

if TYPE_CHECKING:
    from aihwkit_lora.recipes.face_recognition import Job

_SEEDS_APART = 1000
"""Between the seeds of a run and of its retrained models, which share data and split."""


def verify(job: Job, model: nn.Module, references: int) -> ForgettingReport:
    """Verify a model that has forgotten; leave ``forgetting.json`` and ``forgetting.md``.

    Args:
        job: The run that made it.
        model: As the stage ``forget`` left it; not changed.
        references: Models to train from scratch without the person, and to program; at least 1.
    """
    faces, forgotten = job.people, job.people.forgotten
    report = verify_forgetting(
        model,
        forget=_pair(faces.train.of(forgotten)),
        retain=_pair(faces.train.of(*faces.kept)),
        test=_pair(faces.test.of(*faces.kept)),
        forget_test=_pair(faces.test.of(forgotten)),
        retrained=RetrainedReferences(
            folder=job.folder.path / "retrained",
            key=dataclasses.asdict(job.config),
            build=job.build,
            retrain=lambda number: without_forgotten(job, number).learn().model,
            seeds=range(references),
            chip=job.chip,
        ),
        audit_reason="verification",
        ledger=Ledger(),
        seed=job.config.seed,
    )
    report.write(job.folder.path / "forgetting.json")
    (job.folder.path / "forgetting.md").write_text(markdown(report), encoding="utf-8")
    return report


def without_forgotten(job: Job, number: int) -> Job:
    """Make a job that never sees the person to forget, and starts from another seed.

    Args:
        job: Whose images and options to take.
        number: Of the retrained model, from 0.
    """
    config = dataclasses.replace(job.config, seed=job.config.seed + _SEEDS_APART * (number + 1))
    faces = dataclasses.replace(job.people, learnt=job.people.kept)
    return type(job)(config, faces, job.chip, job.folder)


def _pair(faces: FaceImages) -> tuple[Tensor, Tensor]:
    return faces.images, faces.labels
