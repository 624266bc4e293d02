"""A finished run's folder: its settings and networks, and further stages of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.inputs.config import earlier_of, parse_config, set_dotted
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import Figures, RunFolder, hold
from nni_haloc.runs.job import Job
from nni_haloc.runs.saved import load
from nni_haloc.runs.stages import further_stage, further_stages
from nni_haloc.runs.stages.stage import NetworkStage, Outcome, ignore
from nni_haloc.utils.errors import SettingsError, as_one_line


class Finished:
    """Read the folder of a finished run, or of one of its stages.

    Args:
        folder: the folder.
        data: whether the files that the settings name have to be there.
        factories: whether to import and call the model factory (``package.module:factory``) that
            the folder names: only for folders that you trust.
        stage: a stage whose section the settings must have; its defaults, where they have none.
        changes: dotted keys to values that take the place of the run's settings.
        places: what to call the place of a change that is wrong, by its key: ``--sparsity``.

    Raises:
        SettingsError: if it is not such a folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        data: bool = True,
        factories: bool = False,
        stage: NetworkStage | None = None,
        changes: Mapping[str, Any] | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.factories = RunFolder(folder), factories
        self.folder.check_holds_network()
        source, settings = _settings(self.folder)
        if isinstance(settings.get("data"), dict):  # the folder may be somebody else's
            settings["data"] = {**settings["data"], "download": False}
        if stage is not None:
            saved = settings.get(stage.section)
            settings[stage.section] = {**earlier_of(stage.section), **saved} if saved else {}
        for key, value in (changes or {}).items():
            set_dotted(settings, key, value)
        if stage is not None and isinstance(settings[stage.section], dict):
            fields = stage.settings.model_fields
            today = {key: fields[key].default for key in earlier_of(stage.section)}
            settings[stage.section] = {**today, **settings[stage.section]}
        self.config = parse_config(settings, source, files=data, places=places)

    @cached_property
    def job(self) -> Job:
        """The run's data and original network."""
        return Job(self.config, self.folder.path, factories=self.factories)

    def example(self, batch: int) -> Tensor:
        """Return a batch of random images ``(batch, C, H, W)``."""
        generator = torch.Generator().manual_seed(0)
        data = self.config.data
        shape = self.job.example.shape[1:] if data.name in DATA.foreign() else data.shape
        return torch.randn((batch, *shape), generator=generator)

    def calibration_images(self) -> Tensor:
        """Return training images, not augmented, to calibrate on.

        As many as the settings' section ``quantize`` says, else their ``rank_space``.
        """
        section = self.config.quantize or self.config.rank_space
        return self.job.splits.images("plain", section.calibration_images, self.config.seed)

    def networks(self) -> dict[str, nn.Module]:
        """Return ``original``, ``compressed`` (what the folder holds), and the further stages'.

        A stage's network stands under the name of its folder, in the order of the pipeline.
        """
        with as_one_line():
            original = self.original()
            load_weights(original, self.config.weights)
            stages = {
                name: load(folder.path, self.original())
                for name, folder in self.folder.stages().items()
            }
            return {"original": original.eval(), "compressed": self.network(), **stages}

    def network(self) -> nn.Module:
        """Return the folder's own network."""
        return load(self.folder.path, self.original())

    def original(self) -> nn.Module:
        """Return the original network, untrained."""
        model = self.config.model
        return build_model(model.name, model.arguments, factories=self.factories)


def apply_stage(
    folder: str | Path,
    name: str,
    changes: Mapping[str, Any],
    out: str | Path | None = None,
    *,
    factories: bool = False,
    resume: bool = False,
    places: Mapping[str, str] | None = None,
) -> Figures:
    """Apply a stage, such as ``prune``, to the network of a finished run's folder.

    Args:
        folder: folder of a finished run, or of one of its stages.
        name: the stage.
        changes: dotted keys to values that take the place of the run's settings.
        out: receives the stage's results; None: the stage's folder in that of the run.
        factories: see `Finished`.
        resume: whether to go on from the state of an interrupted stage of these settings.
        places: what to call the place of a change that is wrong; see `Finished`.

    Returns:
        The stage's figures, under the names that NNI gets.

    Raises:
        SettingsError: for a folder that is none of a finished run, settings that do not fit, and
            an ``out`` that the network comes from.
    """
    stage = further_stage(name)
    target = stage_folder(RunFolder(folder), name, out)
    if "scale" in changes:
        raise SettingsError(f"scale: only for a whole run; set {name}.epochs instead")
    finished = Finished(folder, factories=factories, stage=stage, changes=changes, places=places)
    job = finished.job
    stage.check(job)
    with hold(finished.folder, out), job.active():
        with as_one_line(SettingsError, str(folder)):
            network = job.laid_out(finished.network())
        before = Outcome(RankPlan.load(finished.folder.ranks), network)
        outcome = stage.run_in(job, before, target, ignore, resume)
    return stage.flatten(outcome.figures)


def stage_folder(folder: RunFolder, name: str, out: str | Path | None = None) -> RunFolder:
    """Return where a stage of ``folder`` is left.

    Without ``out`` that is the stage's folder in the run's, as in a run, where reports look for it:
    of an earlier stage's folder beside that; of a run's, or a later stage's, in it.

    Raises:
        SettingsError: if that is the folder itself, or the one that it is a stage of.
    """
    stage = further_stage(name)
    target = RunFolder(out or _run_of(folder, stage).path / stage.folder)
    inside = folder.path.resolve().is_relative_to(target.path.resolve())
    if inside and target.ranks.exists():
        raise SettingsError(f"--out: expected another folder than the run's, found {target}")
    return target


def _run_of(folder: RunFolder, stage: NetworkStage) -> RunFolder:
    """Return the run that ``folder`` is an earlier stage of than ``stage``; else ``folder``."""
    run, names = RunFolder(os.path.normpath(folder.path / "..")), [s.name for s in further_stages()]
    own = next(iter(folder.read_metrics()["stages"]), "")
    earlier = own in names[: names.index(stage.name)]
    return run if earlier and run.ranks.is_file() else folder


def _settings(folder: RunFolder) -> tuple[Path, dict[str, Any]]:
    """Return the settings of the run and the file that has them; a stage's run is its parent."""
    for place in (folder, RunFolder(folder.path.absolute().parent)):
        if settings := place.read_metrics()["config"]:
            return place.metrics_file, settings
    expected = "expected the settings of a finished run, found none; "
    remedy = "is the run finished?"
    if folder.metrics_file.is_file() and folder.holds_network:
        remedy = (
            "a folder that compress_model has saved holds the network alone: use it in Python "
            "(nni_haloc.load)"
        )
    raise SettingsError(f"{folder.metrics_file}: {expected}{remedy}")
