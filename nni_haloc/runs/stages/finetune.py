"""The stage ``finetune``: recalibrate BatchNorm and train the compressed network."""

from __future__ import annotations

from typing import Any

from nni_haloc.inputs.schema.training import Finetune as Settings
from nni_haloc.runs.folder import Figures, RunFolder, Training
from nni_haloc.runs.identity import finetuning_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.kept import measured_of_budget
from nni_haloc.runs.limits import limits_of_plan
from nni_haloc.runs.stages.stage import Outcome, Report, Stage
from nni_haloc.runs.stages.training import train
from nni_haloc.utils.processes import is_first


class Finetune(Stage):
    """Train the network of the chosen ranks; it becomes the run's own result."""

    name = "finetune"
    settings = Settings
    title = "compressed"
    training_title = "fine-tuning"

    def run(self, job: Job, before: Outcome | None, report: Report, resume: bool) -> Outcome:
        """Train the network, or what an interrupted run left of it, and measure it."""
        assert before is not None
        section = self.settings_of(job.config)
        options: dict[str, Any] = {}
        if section.distill_features:
            options = {"teacher": job.model, "distill": section.distill}
            options |= {"layers": list(before.plan.ranks)}
            options |= {"feature_weight": section.distill_features}
        same = {**finetuning_identity(job.config), "ranks": before.plan.names}
        files = job.folder.finetuning
        network = train(
            job,
            before.network,
            section,
            files,
            same,
            report,
            title=self.training_title,
            resume=resume,
            **options,
        )
        outcome = Outcome(before.plan, network)
        if is_first():
            limits = limits_of_plan(job.config, before.plan, job.folder)
            latency = job.time(limits[0][1], compressed=network)
            outcome.original = {"latency_ms": latency["original"]}
            outcome.figures = {**job.score(network), **job.count(network)}
            outcome.figures["latency_ms"] = latency["compressed"]
            images_per_ms = job.config.cost.batch_size / latency["compressed"]
            outcome.figures["images_per_s"] = 1e3 * images_per_ms
            known = {"latency_ms": latency["compressed"]}
            outcome.figures |= measured_of_budget(
                limits,
                job.device,
                lambda metric: known[metric] if metric in known else job.energy(network),
                outcome.original,
            )
        job.save(network, before.plan)
        if is_first():
            outcome.figures["bytes"] = job.folder.weights.stat().st_size
        return outcome

    def files(self, folder: RunFolder) -> Training:
        """Return the folder's own fine-tuning."""
        return folder.finetuning

    def flatten(self, figures: Figures) -> Figures:
        """Return the figures under their own names: they are those of the run's result."""
        return dict(figures)
