"""Go on from what an earlier trial of the same experiment has left.

Hyperband and BOHB give the parameters of a trial to a new one that is longer. PBT names a folder
that a trial goes on from, and one in which it leaves what the next one needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nni_haloc.inputs.config import Config
from nni_haloc.inputs.tuned import BUDGET, LOAD, SAVE
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import Figures, RunFolder
from nni_haloc.runs.identity import search_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.saved import load
from nni_haloc.training.curves import EPOCH_COLUMNS, read
from nni_haloc.utils.errors import SettingsError, as_one_line, reason_of
from nni_haloc.utils.files import make_folder, read_json, whole, write_json
from nni_haloc.utils.log import logger

_CHOICE = "choice.json"
"""Beside a network that is handed on: what its ranks depend on."""


def take_up(folder: RunFolder, config: Config, parameters: Mapping[str, Any]) -> None:
    """Put into a trial's folder, if it is a new one, what an earlier trial has left for it.

    Args:
        folder: the trial's folder.
        config: the trial's settings.
        parameters: what the tuner gives the trial.
    """
    begun = folder.searching.checkpoint, folder.finetuning.checkpoint, folder.start
    if any(path.exists() for path in begun):
        return
    if BUDGET in parameters:
        shorter = _shorter(folder, parameters)
        if shorter is not None and config.trial_budget == "finetune.epochs":
            _take_shorter(folder, shorter, config)
    # PBT's first trials have nothing to go on from, and twice the same folder.
    if LOAD in parameters and parameters[LOAD] != parameters.get(SAVE):
        _take_start(folder, RunFolder(Path(parameters[LOAD])))


def known_points(folder: RunFolder) -> list[Figures]:
    """Return the points of the fine-tuning's curve that are in a folder already.

    A longer trial reports those of the shorter one, too: its curve then starts where all do.

    Args:
        folder: the trial's folder.
    """
    try:
        epochs, losses, top1 = read(folder.finetuning.history, EPOCH_COLUMNS).values()
    except SettingsError:  # there is none, or the fine-tuning begins anew with a warning
        return []
    points = zip(epochs, losses, top1, strict=True)
    return [{"default": t, **({"train_loss": loss} if e else {})} for e, loss, t in points]


def hand_on(folder: RunFolder, config: Config, parameters: Mapping[str, Any]) -> None:
    """Leave a finished trial's network in the folder that PBT names, for the trials after it.

    Args:
        folder: the trial's folder.
        config: the trial's settings.
        parameters: what the tuner gives the trial.

    Raises:
        SettingsError: if the folder can't be written to.
    """
    if SAVE not in parameters:
        return
    target = RunFolder(Path(parameters[SAVE]))
    with as_one_line(where=SAVE):
        make_folder(target.path)
        _copy(folder, target, [*_network(folder), *_facts(folder)])
        # Last: without it the rest counts for nothing.
        write_json(target.path / _CHOICE, _choice(config))


def started_plan(job: Job) -> tuple[RankPlan, nn.Module] | None:
    """Return the plan and the network that an earlier trial has left for this one.

    Args:
        job: the run's settings, data, network and folder.

    Returns:
        None where there are none, or where the ranks depend on other settings than now.
    """
    start = RunFolder(job.folder.start)
    if not start.path.exists():
        return None
    try:
        there, here = read_json(start.path / _CHOICE), _choice(job.config)
        if differ := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
            logger.info("%s has changed since the trial before: starting anew", differ[0])
            return None
        plan, network = RankPlan.load(start.ranks), load(start.path, job.model)
    except (OSError, ValueError) as error:
        logger.warning("%s; starting anew", reason_of(error))
        return None
    logger.info("going on from the network of the trial before")
    return plan, job.laid_out(network)


def _shorter(folder: RunFolder, parameters: Mapping[str, Any]) -> RunFolder | None:
    """Return the folder of the longest finished trial that is a shorter one of these parameters."""
    longest, found = 0.0, None
    trials = folder.path.absolute().parent.parent
    for path in sorted(trials.glob(f"*/{folder.path.name}")):
        try:
            theirs = RunFolder(path).read_metrics()["parameters"]
        except SettingsError:
            continue
        same = {**theirs, BUDGET: 0} == {**parameters, BUDGET: 0}
        if same and longest < theirs.get(BUDGET, 0) < parameters[BUDGET]:
            longest, found = theirs[BUDGET], RunFolder(path)
    return found


def _take_shorter(folder: RunFolder, shorter: RunFolder, config: Config) -> None:
    """Copy what a longer trial goes on from: the search, and a fine-tuning at a constant rate."""
    files = _facts(shorter)
    training = config.finetune.schedule == "constant" and shorter.finetuning.checkpoint.exists()
    if training:
        files += _network(shorter)
    elif not shorter.searching.checkpoint.exists():
        return
    # The states come last: without them a trial that is started again copies anew.
    states = [shorter.finetuning] if training else []
    states += [shorter.searching] if shorter.searching.checkpoint.exists() else []
    files += [file for state in states for file in (state.history, state.checkpoint)]
    what = "its fine-tuning" if training else "its search"
    logger.info("going on from %s, a shorter trial of these parameters: %s", what, shorter)
    _copy(shorter, folder, files)


def _take_start(folder: RunFolder, before: RunFolder) -> None:
    """Copy the network that the trial before has left, from which fine-tuning starts."""
    if not (before.path / _CHOICE).is_file():
        logger.warning("%s: no network in %s; starting anew", LOAD, before)
        return
    _copy(before, folder, _facts(before))
    part = folder.start.with_name("part")
    make_folder(part)
    _copy(before, RunFolder(part), [*_network(before), before.path / _CHOICE])
    part.rename(folder.start)


def _network(folder: RunFolder) -> list[Path]:
    return [folder.ranks, folder.weights, folder.model]


def _facts(folder: RunFolder) -> list[Path]:
    """Return the cost tables, and what is known of the layers and the search."""
    return [*sorted(folder.path.glob("costs*.json")), folder.layers, folder.search_file]


def _copy(source: RunFolder, target: RunFolder, files: Iterable[Path]) -> None:
    """Copy those of some files that are there, each in one step."""
    for file in files:
        if file.is_file():
            place = target.path / file.relative_to(source.path)
            make_folder(place.parent)
            with whole(place) as part:
                shutil.copyfile(file, part)


def _choice(config: Config) -> dict[str, Any]:
    """Return what ranks depend on; the memory format, which a run may settle itself, is not."""
    content = search_identity(config)
    content.pop("cost.memory_format", None)
    return content
