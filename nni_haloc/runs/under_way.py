"""How far a run is that has not ended, as its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nni_haloc.runs.folder import SEARCH_VERSION, RunFolder
from nni_haloc.runs.stages import all_stages
from nni_haloc.training import checkpoint, curves
from nni_haloc.utils.errors import HalocError, SettingsError
from nni_haloc.utils.files import read_json, read_text
from nni_haloc.utils.locks import is_held

_LOG_LINES = 10


@dataclass(frozen=True)
class UnderWay:
    """A run that has not ended.

    Attributes:
        running: whether a process works in the folder now; else it was interrupted.
        training: what is trained (``search``, ``fine-tuning``); empty before, between and after.
        done: finished epochs of that training.
        epochs: how many it will have; None where that is not known.
        search: content of ``search.json`` where the search has not finished, else empty.
        log: the last lines of the run's log.
    """

    running: bool
    training: str
    done: int
    epochs: int | None
    search: Mapping[str, Any]
    log: str

    def __str__(self) -> str:
        if not self.training:
            return ""
        of = "" if self.epochs is None else f" of {self.epochs}"
        return f"{self.training}, {self.done}{of} epochs done"


def look(folder: RunFolder) -> UnderWay | None:
    """Return how far the run of a folder is, or None if it has ended.

    Raises:
        SettingsError: if a file of the folder is damaged; the message names it.
    """
    running, search = is_held(folder.path), _unfinished_search(folder)
    training: tuple[str, int, int | None] | None = None
    if search:
        training = "search", len(search["curve"]), search["epochs"]
    elif folder.ranks.is_file():
        training = _unfinished_training(folder)
    interrupted = training is not None or not folder.ranks.is_file()
    if not running and not interrupted:
        return None
    return UnderWay(running, *(training or ("", 0, None)), search, _end_of_log(folder))


def _unfinished_search(folder: RunFolder) -> dict[str, Any]:
    """Return ``search.json`` of a search that has not finished; empty where there is none."""
    if not folder.search_file.is_file():
        return {}
    content = read_json(folder.search_file, "search", SEARCH_VERSION)
    if content.get("finished", True) is not False:
        return {}
    kinds = {"curve": list, "epochs": int, "layers": dict, "limits": list}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise SettingsError(f"{folder.search_file}: {key}: expected a {kind.__name__}")
    return content


def _unfinished_training(folder: RunFolder) -> tuple[str, int, int | None] | None:
    """Return title, finished epochs and number of epochs of a training without figures yet."""
    figures, found = folder.metrics(), None
    for stage in all_stages():
        files = stage.files(folder)
        if stage.name in figures or not stage.in_run or not stage.training_title:
            continue
        if stage.name == "search" or not files.history.is_file():
            continue
        done = int(curves.read(files.history, curves.EPOCH_COLUMNS)["epoch"][-1])
        of = None
        try:
            saved = checkpoint.read(files.checkpoint)
            of = int(saved["identity"][stage.section]["epochs"])
            done = min(done, saved["epochs"])  # an epoch is done when its state is kept
        except (HalocError, KeyError, TypeError, ValueError):
            pass  # before the first epoch there is no checkpoint
        found = stage.training_title, done, of
    return found


def _end_of_log(folder: RunFolder) -> str:
    try:
        return "\n".join(read_text(folder.log).splitlines()[-_LOG_LINES:])
    except (OSError, ValueError):
        return ""
