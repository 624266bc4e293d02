"""The program that nnictl runs: ``python3 -m nni_haloc.trial run.yml``, or ``... measure OPTIONS``.

It is the only file that reports to NNI.
"""

import json
import os
import sys

import nni

if __name__ == "__main__":
    PARENT = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        why = "each process would ask for parameters; trainer.devices starts as many as it says"
        sys.exit(f"trialCommand: expected no torchrun: {why}")
    # Ask before anything that takes time or may fail: the manager hands parameters out in the order
    # in which it is asked. A trial that asks late, or dies before it asks, passes its parameters on
    # to another. The trial's other processes must not ask at all.
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

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import add_code, is_factory
from nni_haloc.inputs.tuned import BUDGET
from nni_haloc.runs.folder import RunFolder
from nni_haloc.utils.errors import (
    HalocError,
    UnusableCheckpoint,
    as_one_line,
    out_of_memory,
    printable,
    reason_of,
)
from nni_haloc.utils.files import read_json, write_json
from nni_haloc.utils.interruption import end_by_signal, stoppable
from nni_haloc.utils.locks import hold_folder
from nni_haloc.utils.log import log_to, logger
from nni_haloc.utils.processes import is_first


class Reports:
    """Report a trial's results to NNI, each once, also if NNI starts the trial again.

    A result is noted in a file after it was sent. If the trial is killed between the two, it sends
    the result twice, which adds one equal point to a curve. Noted before, the result would be
    missing, and a trial without a final result counts for nothing.

    Args:
        path: the file.
        identity: plain values that the results depend on; with others, all are sent anew.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        self.path, self.identity = (
            path,
            hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        )
        self.intermediate, self.final_sent = 0, False
        try:
            noted = read_json(path)
            if noted["identity"] == self.identity:
                self.intermediate, self.final_sent = (
                    int(noted["intermediate"]),
                    bool(noted["final"]),
                )
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing is noted before the first start
        nni.trial.overwrite_intermediate_seq(self.intermediate)

    def point(self, metrics: dict[str, float], place: int) -> None:
        """Send the point of the curve at ``place``, unless it was sent before."""
        if place >= self.intermediate:
            self._send(nni.report_intermediate_result, metrics)
            self.intermediate = place + 1
            self._note()

    def final(self, metrics: dict[str, Any]) -> None:
        """Send the final result, unless it was sent before."""
        if not self.final_sent:
            self._send(nni.report_final_result, metrics)
            self.final_sent = True
            self._note()

    def _send(self, send: Callable[[dict[str, Any]], None], metrics: dict[str, Any]) -> None:
        try:
            send(metrics)
        except OSError as error:  # that of requests is one
            name = type(error).__name__
            goes_on = "`nnictl resume` goes on from the last epoch"
            raise HalocError(f"NNI's manager does not answer ({name}); {goes_on}") from None

    def _note(self) -> None:
        content = {
            "identity": self.identity,
            "intermediate": self.intermediate,
            "final": self.final_sent,
        }
        with as_one_line(HalocError):
            write_json(self.path, content)


def main(run_file: str, parameters: dict, folder: RunFolder) -> int:
    """Run one trial.

    Args:
        run_file: the settings.
        parameters: what the tuner sets: dotted keys of the settings to values.
        folder: receives the results.

    Returns:
        The exit status.
    """
    try:
        config = load_config(run_file, parameters)
        if is_factory(config.model.name):  # it may lie beside the file
            add_code(Path(run_file).parent)
        reports = Reports(folder.reported, config.model_dump(mode="json"))
        metrics = _run(config, parameters, folder, reports)
        if is_first():
            for name, value in metrics.items():
                logger.info("%s: %.6g", name, value)
            reports.final(metrics)
    except (HalocError, OSError) as error:
        logger.error("%s", reason_of(error))
        return 2
    except Exception as error:
        if line := out_of_memory(error):
            logger.error("%s", line)
            return 2
        raise
    return 0


def _run(config: Any, parameters: dict, folder: RunFolder, reports: Reports) -> dict[str, float]:
    """Run a trial from where it, or one before it, has come to; return its final figures."""
    from nni_haloc.runs.earlier import hand_on, known_points, take_up
    from nni_haloc.runs.run import RESULT, run

    def report(stage: str, figures: dict[str, float], place: int) -> None:
        # NNI's assessors compare the curves of trials place by place, and take the last point for
        # what the whole comes to. So the curve is of one network: the result, as it is fine-tuned.
        if stage == RESULT:
            reports.point(figures, place)

    if is_first():
        take_up(folder, config, parameters)
        again = BUDGET in parameters and config.objective.kind == "metric"
        for place, point in enumerate(known_points(folder) if again else []):
            reports.point(point, place)
    try:  # a trial that NNI starts again has its folder already
        metrics = run(config, folder.path, report, parameters, resume=True)
    except UnusableCheckpoint as error:
        from nni_haloc.training.checkpoint import REMEDY

        logger.info("%s; starting anew", str(error).removesuffix(REMEDY))
        metrics = run(config, folder.path, report, parameters)
    if is_first():
        hand_on(folder, config, parameters)
    return metrics


def measure_share(arguments: list[str], parameters: dict, folder: RunFolder) -> int:
    """Run one trial of an experiment that measures a cost table.

    Args:
        arguments: options of `haloc measure`.
        parameters: further ones, which the tuner sets, such as ``part``.
        folder: receives ``costs.json``.

    Returns:
        The exit status.
    """
    words = [word for key, value in parameters.items() for word in (f"--{key}", str(value))]
    from nni_haloc.costs.measure import measure_main

    try:
        entries = measure_main([*arguments, *words, "--out", str(folder.costs)])
        Reports(folder.reported, [arguments, words]).final({"default": entries})
    except (ValueError, OSError) as error:
        logger.error("%s", reason_of(error))
        return 2
    return 0


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it has ended.

    A trial whose manager was killed would otherwise work on beside the one that is resumed.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # at once, as a power cut would: files are whole at any time

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if "NNI_PLATFORM" in os.environ:
        _end_with(PARENT)
    if sys.argv[1:2] != ["measure"] and len(sys.argv) != 2:
        usage = "python3 -m nni_haloc.trial RUN.yml, or measure and options of `haloc measure`"
        sys.exit(f"usage: {usage}")
    FOLDER = RunFolder(Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / "haloc")
    try:
        with ExitStack() as LOG:  # the log is closed before Python takes `logging` apart
            try:
                LOG.enter_context(log_to(FOLDER.log))
                # A shell may keep this trial's earlier process alive, which does not see its
                # manager die then.
                LOG.enter_context(hold_folder(FOLDER.path, wait=True))
            except (HalocError, OSError) as error:
                sys.exit(printable(reason_of(error)))
            LOG.enter_context(stoppable("trial", lambda: f"{FOLDER} keeps what was finished"))
            if sys.argv[1] == "measure":
                sys.exit(measure_share(sys.argv[2:], PARAMETERS, FOLDER))
            sys.exit(main(sys.argv[1], PARAMETERS, FOLDER))
    except SystemExit as END:
        end_by_signal(END.code)  # else NNI takes a trial that it has stopped for one that failed
        raise
