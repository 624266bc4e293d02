"""Choose ranks and train networks, as rows of a study do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.choose_ranks import ChooseRanks
from nni_haloc.runs.stages.stage import ignore
from nni_haloc.runs.stages.training import train
from nni_haloc.training.finetuning import accuracy

HERE = Path(__file__).parent
FILES = {"resnet20": "run.yml", "vgg16": "vgg16.yml"}
"""What the rows of each network share."""


def chosen(job: Job) -> tuple[RankPlan, nn.Module]:
    """Choose ranks as the settings say; return the plan and its network."""
    with job.active():
        outcome = ChooseRanks().run(job, None, ignore, resume=False)
    return outcome.plan, outcome.network


def trained(job: Job, network: nn.Module) -> dict[str, Any]:
    """Fine-tune a network in place; return its part of a row.

    ``val`` lists the validation accuracies, the first one after recalibration alone.
    """
    curve: list[float] = []
    started = time.monotonic()
    with job.active():
        train(
            job,
            network,
            job.config.finetune,
            job.folder.finetuning,
            {},
            lambda metrics, place: curve.append(metrics["default"]),
            title="fine-tuning",
        )
        val, test = (accuracy(network, job.loader(split))[0] for split in ("val", "test"))
    return {
        "val_top1": val,
        "test_top1": test,
        "val": curve,
        "epochs": job.config.finetune.epochs,
        "train_s": time.monotonic() - started,
    }
