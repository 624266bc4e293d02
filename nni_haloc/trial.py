"""What nnictl runs: ``python3 -m nni_haloc.trial run.yml``, or ``... measure --spec spec.json``. The only file that reports to NNI."""

import json
import os
import sys

import nni

from nni_haloc.utils.errors import HalocError, UnusableCheckpoint

if __name__ == "__main__":
    PARENT = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit(
            "trialCommand: expected no torchrun: each process would ask for parameters; trainer.devices starts as many as it says"
        )
    # First of all, before anything that takes time or may fail: the manager hands parameters out in the order in which it is asked, so a
    # trial that asks late, or dies before it asks, passes its parameters on to another. The trial's other processes must not ask at all.
    handed_on = os.environ.get("NNI_HALOC_PARAMETERS")
    PARAMETERS = json.loads(handed_on) if handed_on else nni.get_next_parameter() or {}
    os.environ["NNI_HALOC_PARAMETERS"] = json.dumps(PARAMETERS)

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nni_haloc.inputs.config import load_config
from nni_haloc.runs.folder import COSTS_FILE
from nni_haloc.utils.errors import SettingsError, reason_of
from nni_haloc.utils.files import write_json
from nni_haloc.utils.log import log_to, logger
from nni_haloc.utils.processes import is_first

LOCK_FILE, REPORTED_FILE = "trial.lock", "reported.json"


class Reports:
    """What a trial tells NNI: each result once, though a trial that NNI starts again comes by some of them a second time.

    A result is noted in ``path`` after it went out. Killed between the two, the trial sends it twice, which is the same point once more in
    a curve; noted before, it would be missing, and a trial whose final result is missing counts for nothing. ``identity``: plain values
    that the results depend on; with others, all are sent anew. Raises `SettingsError` where NNI does not answer.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        self.path, self.identity = (
            path,
            hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        )
        self.intermediate, self.final_sent = 0, False
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            if noted["identity"] == self.identity:
                self.intermediate, self.final_sent = (
                    int(noted["intermediate"]),
                    bool(noted["final"]),
                )
        except (OSError, ValueError, KeyError, TypeError):
            pass  # of a first start
        nni.trial.overwrite_intermediate_seq(self.intermediate)

    def point(self, metrics: dict[str, float], place: int) -> None:
        """The point of the curve at ``place``, unless it went out before."""
        if place >= self.intermediate:
            self._send(nni.report_intermediate_result, metrics)
            self.intermediate = place + 1
            self._note()

    def final(self, metrics: dict[str, Any]) -> None:
        if not self.final_sent:
            self._send(nni.report_final_result, metrics)
            self.final_sent = True
            self._note()

    def _send(self, send: Callable[[dict[str, Any]], None], metrics: dict[str, Any]) -> None:
        try:
            send(metrics)
        except OSError as error:  # that of requests is one
            raise SettingsError(
                f"NNI's manager does not answer ({type(error).__name__}); `nnictl resume` goes on from the last epoch"
            ) from None

    def _note(self) -> None:
        content = {
            "identity": self.identity,
            "intermediate": self.intermediate,
            "final": self.final_sent,
        }
        try:
            write_json(self.path, content)
        except OSError as error:
            raise SettingsError(reason_of(error)) from None


def main(run_file: str, parameters: dict, folder: Path) -> int:
    """One trial: the run of ``run_file`` with the tuner's ``parameters`` (dotted keys of the file); returns the exit status."""
    try:
        config = load_config(run_file, parameters)
        reports = Reports(folder / REPORTED_FILE, config.model_dump(mode="json"))
        from nni_haloc.runs.run import run

        try:  # a trial that NNI starts again has its folder already
            metrics = run(config, folder, reports.point, parameters, resume=True)
        except UnusableCheckpoint as error:
            logger.info("%s; starting anew", error)
            metrics = run(config, folder, reports.point, parameters)
        if is_first():
            reports.final(metrics)
    except (HalocError, OSError) as error:
        logger.error("%s", reason_of(error))
        return 2
    return 0


def measure_share(arguments: list[str], parameters: dict, folder: Path) -> int:
    """One trial of an experiment that measures a cost table: options of `haloc measure`, by the tuner too (``part``); the exit status."""
    words = [word for key, value in parameters.items() for word in (f"--{key}", str(value))]
    from nni_haloc.costs.measure import measure_main

    try:
        entries = measure_main([*arguments, *words, "--out", str(folder / COSTS_FILE)])
        Reports(folder / REPORTED_FILE, [arguments, words]).final({"default": entries})
    except (ValueError, OSError) as error:
        logger.error("%s", reason_of(error))
        return 2
    return 0


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it: a trial whose manager was killed would work on beside the one resumed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # at once, as a power cut would: files are whole at any time

    threading.Thread(target=watch, daemon=True).start()


def _alone(folder: Path) -> FileLock:
    """Wait until no other process works in the trial's folder, then hold it: one that a shell keeps going does not see its manager die."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: waiting for this trial's earlier process to end", folder)
        lock.acquire()
    return lock


if __name__ == "__main__":
    if "NNI_PLATFORM" in os.environ:
        _end_with(PARENT)
    if sys.argv[1:2] != ["measure"] and len(sys.argv) != 2:
        sys.exit(
            "usage: python3 -m nni_haloc.trial RUN.yml, or measure and options of `haloc measure`"
        )
    FOLDER = Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / "haloc"
    LOG = ExitStack()
    try:
        LOG.enter_context(log_to(FOLDER / "log.txt"))
        HELD = _alone(FOLDER) if is_first() else None
    except (HalocError, OSError) as error:
        sys.exit(str(error))
    sys.exit(
        measure_share(sys.argv[2:], PARAMETERS, FOLDER)
        if sys.argv[1] == "measure"
        else main(sys.argv[1], PARAMETERS, FOLDER)
    )
