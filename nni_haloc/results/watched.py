"""Write the page of a run, once or again and again as long as the run is under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from nni_haloc.results.html_report import html_report
from nni_haloc.runs.folder import RunFolder, find_run, hold
from nni_haloc.runs.stages import all_stages
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.files import make_folder, whole
from nni_haloc.utils.locks import is_held
from nni_haloc.utils.log import logger

POLL = 1.0
"""Seconds between two looks at the run's files. The page is only written if one has changed."""
REFRESH = 5
"""Seconds after which a browser loads the page again."""


def write_page(path: str | Path, out: Path | None = None, refresh: int | None = None) -> Path:
    """Write the page of a run's folder.

    Args:
        path: the folder of a run, a search or a trial.
        out: the page (None: ``report.html`` in the folder).
        refresh: see `html_report`.

    Returns:
        The page.

    Raises:
        SettingsError: if a file can't be read, or the page can't be written; names it.
    """
    page, run = html_report(path, refresh=refresh), RunFolder(path)
    out = out or run.report
    inside = out.resolve().is_relative_to(run.path.resolve())
    # Beside a run that is under way nothing else is written: the page is of its own.
    alone = inside and not is_held(find_run(path, unfinished=True).path)
    try:
        make_folder(out.parent)
        with hold(run) if alone else nullcontext(), whole(out) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        expected = "expected a file that can be written"
        raise SettingsError(f"{out}: {expected}, found: {error.strerror}") from None
    return out


def watch_run(
    path: str | Path,
    out: Path | None = None,
    on_start: Callable[[Path], None] = lambda page: None,
) -> Path:
    """Write the page of a run anew whenever the run has got further, until it ends.

    Args:
        path: the folder of a run, a search or a trial.
        out: the page (None: ``report.html`` in the folder).
        on_start: is given the page when it is there for the first time.

    Returns:
        The page, which then no longer loads itself again.

    Raises:
        SettingsError: see `write_page`.
    """
    folder = find_run(path, unfinished=True)
    if not is_held(folder.path):
        logger.warning("%s: no process works here; the page is written once", folder)
    last, told = None, ""
    while is_held(folder.path):
        now = _state(folder)
        if now != last:
            try:
                page = write_page(path, out, REFRESH)
            except (ValueError, OSError) as error:
                if str(error) == told:  # a file may have gone while it was to be read: once
                    raise
                told = str(error)
            else:
                if last is None:
                    on_start(page)
                last, told = now, ""
        time.sleep(POLL)
    return write_page(path, out)


def _state(folder: RunFolder) -> list[tuple[int, int] | None]:
    """Return when each file that the page is made of was written, and its size."""
    files = [folder.search_file, folder.ranks, folder.metrics_file, folder.log]
    files += [stage.files(folder).history for stage in all_stages()]
    found: list[tuple[int, int] | None] = []
    for file in files:
        try:
            stat = file.stat()
            found.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append(None)
    return found
