"""The stage ``pretrain``: train the original network where there are no weights yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_model

from nni_haloc.inputs.config import Config
from nni_haloc.inputs.schema.training import Train as Settings
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import Figures, RunFolder, Training, hold
from nni_haloc.runs.identity import section_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.plausibility import warn_of_doubts
from nni_haloc.runs.stages.stage import Outcome, Report, Stage, ignore
from nni_haloc.runs.stages.training import recipe_of, trainer_of
from nni_haloc.training import checkpoint
from nni_haloc.training.checkpoint import EpochCheckpoint
from nni_haloc.training.finetuning import finetune
from nni_haloc.utils.errors import Diverged, SettingsError
from nni_haloc.utils.files import whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first
from nni_haloc.utils.wrapped import unwrapped


class Pretrain(Stage):
    """Train the original network from its initialisation, and write the settings' ``weights``.

    It is a command of its own, `haloc train`: a run begins with the trained network.
    """

    name = "pretrain"
    section = "train"
    settings = Settings
    title = "original"
    training_title = "training"
    in_run = False

    def run(self, job: Job, before: Outcome | None, report: Report, resume: bool) -> Outcome:
        """Train the job's network, which must not be trained yet."""
        config, section = job.config, self.settings_of(job.config)
        loader, val = job.loader("train", shuffle=True), job.loader("val")
        facts: dict[str, Any] = {"seed": config.seed}
        for key in ("model", "train", "data"):
            facts[key] = section_identity(getattr(config, key), key)
        path = self.files(job.folder).checkpoint
        state, done = EpochCheckpoint(path, {"identity": facts}, loader, val), 0
        if resume := resume and path.exists():
            saved = checkpoint.read(path, checkpoint.REMEDY)
            checkpoint.check_same(path, saved["identity"], facts)
            done = saved["epochs"]
            logger.info("training: %d of %d epochs are done: %s", done, section.epochs, path)

        def on_epoch(epoch: int, metrics: Figures) -> None:
            top1 = metrics["val_top1"]
            logger.info("training epoch %d: %s", epoch + 1, job.top1_line(top1))
            report({"default": top1, "train_loss": metrics["train_loss"]}, epoch)

        options = trainer_of(job, section.precision, state, self.training_title)
        options["compile"] = section.compile
        if done < section.epochs:
            options["logger"] = job.logger(path.parent, self.training_title)
        start = path if resume else None
        try:
            finetune(job.model, loader, recipe_of(section), val, on_epoch, start, **options)
        except Diverged as error:
            raise Diverged(f"{self.section}: {error}") from None
        figures = job.score(job.model) if is_first() else {}
        return Outcome(RankPlan({}), job.model, figures)

    def files(self, folder: RunFolder) -> Training:
        """Return the folder itself, which holds this training alone."""
        return folder.training


def training_folder(config: Config) -> Path:
    """Return where the state and the log of the training are: beside the file that it makes."""
    out = Path(config.weights)
    return out.parent / f"{out.stem}-training"


def train_original(config: Config, *, resume: bool = False) -> Figures:
    """Train the settings' network by their section ``train``, and write the file ``weights``.

    Args:
        config: the settings.
        resume: whether to go on from the state that an interrupted training left in
            `training_folder`.

    Returns:
        The accuracies of the trained network; nothing in all processes but the first.

    Raises:
        SettingsError: if the file is there already, or is none of safetensors.
        UnusableCheckpoint: if the state is of other settings.
        Diverged: if the training diverges.
    """
    out = Path(config.weights)
    if out.suffix != ".safetensors":
        expected = "expected the name of a .safetensors file to be written"
        raise SettingsError(f"weights: {expected}, found {out}")
    if out.exists():
        raise SettingsError(f"weights: {out} already exists; delete it or name another file")
    job = Job(config, training_folder(config), trained=False)
    with hold(job.folder), job.active():
        outcome = Pretrain().run(job, None, ignore, resume)
        if not is_first():
            return {}
        with whole(out) as part:
            save_model(unwrapped(outcome.network), str(part))
        warn_of_doubts({"original": {**outcome.figures, **job.guessing(config.data.score)}})
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in outcome.figures.items())
    logger.info("%s: %s", out, shown)
    return outcome.figures
