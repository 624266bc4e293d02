"""What an experiment that NNI has begun, or failed to begin, has left on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from nni_haloc.utils.errors import SettingsError

LIST = ".experiment"
"""NNI's own list of experiments, in the folder of all of them."""
_TAIL = 1 << 16
_ERROR = re.compile(r"(?:\[.*?\] )?ERROR:? (?:\([^)]*\) )?(.+)")
_RAISED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt|Exit)\b.*)")
_AT_THE_END = "during shutting down"
"""In errors of a manager that is being stopped, which have other causes."""
_LOGS = {
    "dispatcher.log": ("its tuner", _RAISED),
    "nnimanager.log": ("its manager", _ERROR),
    "nnictl_stderr.log": ("its manager", _RAISED),
    "experiment.log": ("nnictl", _ERROR),
}
"""NNI's logs, who writes them, and how the line that says what went wrong looks."""


def find_experiment(folder: Path, experiment: str) -> Path:
    """Return an experiment's own folder.

    Args:
        folder: where NNI keeps its experiments.
        experiment: the experiment's id.

    Raises:
        SettingsError: if there is none; names the likely one, or where it is.
    """
    own = folder / experiment
    if re.fullmatch(r"[\w-]+", experiment) and own.is_dir():
        return own
    known = sorted(path.name for path in _experiments(folder))
    entry = _listed(folder).get(experiment)
    where = f"experiment {experiment!r}: no such experiment in {folder}"
    if entry is not None:
        place = Path(str(entry.get("logDir", folder)))
        if place != folder and (place / experiment).is_dir():
            raise SettingsError(f"{where}; it is in {place}: --folder {place}")
        raise SettingsError(f"{where}: NNI lists it, and nothing else is left of it")
    if not folder.is_dir():
        raise SettingsError(f"{where}, which is no folder; name NNI's by --folder")
    if not known:
        raise SettingsError(f"{where}, which has none; nnictl create makes one")
    close = get_close_matches(experiment, known, 1)
    if close:
        raise SettingsError(f"{where}; did you mean {close[0]!r}?")
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    raise SettingsError(f"{where}; it has {', '.join(known[:8])}{more}")


def is_running(experiment: str) -> bool:
    """Tell whether an experiment's manager runs on this machine.

    Args:
        experiment: the experiment's id.
    """
    try:
        import psutil  # a package that NNI needs
    except ImportError:
        return False
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if ("--experiment-id", experiment) in pairwise(words):
            return True
    return False


def why_nothing(own: Path, reason: str) -> str:
    """Say on one line why an experiment has no results: it starts, or failed, or nothing is left.

    Args:
        own: the experiment's folder.
        reason: what its database lacks.
    """
    if is_running(own.name):
        return f"it is still starting ({reason}); ask again in a moment"
    errors = last_errors(own)
    if errors:
        return f"it never came up ({reason}); {'; '.join(errors)}"
    if (own / "log").is_dir():
        return f"it never came up ({reason}), and no log says why; nnictl create starts a new one"
    return f"nothing is left of it in {own} ({reason})"


def last_errors(own: Path) -> list[str]:
    """Return what an experiment's logs say last of what went wrong, by who says it.

    Args:
        own: the experiment's folder.
    """
    found: dict[str, str] = {}
    for name, (who, pattern) in _LOGS.items():
        lines = [
            match[1] for line in last_lines(own / "log" / name) if (match := pattern.match(line))
        ]
        lines = [line for line in lines if _AT_THE_END not in line]
        if lines and who not in found:
            found[who] = lines[-1].strip()[:300]
    return [f"{who}: {line}" for who, line in found.items()]


def last_lines(path: Path) -> list[str]:
    """Return the last lines of a log; none if it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _experiments(folder: Path) -> Iterator[Path]:
    """Yield the folders of a folder that are experiments'."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if not path.is_symlink() and any((path / part).is_dir() for part in ("log", "db")):
            yield path


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of NNI's list: that of the folder, or the one in the home folder."""
    for place in (folder, Path("~/nni-experiments").expanduser()):
        try:
            content = json.loads((place / LIST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if isinstance(value, dict)}
    return {}
