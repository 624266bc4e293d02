"""What nnictl runs: ``python3 -m nni_haloc.trial run.yml``, or ``... measure --spec spec.json``. The only file that reports to NNI."""

import json
import os
import sys

import nni

if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit("trialCommand: expected no torchrun: each process would ask for parameters; trainer.devices starts as many as it says")
    # First of all, before anything that takes time or may fail: the manager hands parameters out in the order in which it is asked, so a
    # trial that asks late, or dies before it asks, passes its parameters on to another. The trial's other processes must not ask at all.
    handed_on = os.environ.get("NNI_HALOC_PARAMETERS")
    PARAMETERS = json.loads(handed_on) if handed_on else nni.get_next_parameter() or {}
    os.environ["NNI_HALOC_PARAMETERS"] = json.dumps(PARAMETERS)

from pathlib import Path

from .compression import COSTS_FILE
from .config import load_config
from .log import log_to, logger
from .processes import is_first
from .yaml_files import ConfigError


def main(run_file: str, parameters: dict) -> int:
    """One trial: the run of ``run_file`` with the tuner's ``parameters`` (dotted keys of the file); returns the exit status."""
    folder = Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / "haloc"
    log_to(folder / "log.txt")
    try:
        config = load_config(run_file, parameters)
        from .checkpoint import UnusableCheckpoint
        from .run import run

        try:  # a trial that NNI starts again has its folder already
            metrics = run(config, folder, nni.report_intermediate_result, parameters, resume=True)
        except UnusableCheckpoint as error:
            logger.info("%s; starting anew", error)
            metrics = run(config, folder, nni.report_intermediate_result, parameters)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    if is_first():
        nni.report_final_result(metrics)
    return 0


def measure_share(arguments: list[str], parameters: dict) -> int:
    """One trial of an experiment that measures a cost table: options of `haloc measure`, by the tuner too (``part``); the exit status."""
    folder = Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / "haloc"
    log_to(folder / "log.txt")
    words = [word for key, value in parameters.items() for word in (f"--{key}", str(value))]
    from .measure import measure_main

    try:
        entries = measure_main([*arguments, *words, "--out", str(folder / COSTS_FILE)])
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 2
    nni.report_final_result({"default": entries})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        sys.exit(measure_share(sys.argv[2:], PARAMETERS))
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m nni_haloc.trial RUN.yml, or measure and options of `haloc measure`")
    sys.exit(main(sys.argv[1], PARAMETERS))
