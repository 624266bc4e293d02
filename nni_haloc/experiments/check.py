"""Check an NNI experiment before it is created: all that would fail in every trial."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_haloc.experiments.algorithms import (
    ADVISORS,
    Algorithm,
    check_classes,
    find_algorithms,
    nni_name,
    try_algorithms,
)
from nni_haloc.experiments.keys import as_sent, check_keys, spell_as_nni
from nni_haloc.experiments.program import check_program, check_script, trial_arguments
from nni_haloc.experiments.space import draw_examples, read_space
from nni_haloc.experiments.trials import check_measuring, check_settings, parameters_to_try
from nni_haloc.utils.errors import SettingsError, as_one_line

KEYS = ("trialCommand", "trainingService", "searchSpace", "searchSpaceFile")
"""Keys that only an experiment's file has."""
_MOST_FILES, _MOST_BYTES = 2000, 300 * 2**20
"""What NNI sends to another machine at most."""


def refuse_experiment(path: Path) -> None:
    """Raise `SettingsError` if a file is an NNI experiment's, not a run's settings."""
    from nni_haloc.inputs.yaml_files import read_yaml

    content = read_yaml(path)
    if isinstance(content, Mapping) and any(key in content for key in KEYS):
        raise SettingsError(
            f"{path}: this is an NNI experiment's file, not a run's settings: start it with "
            f"`nnictl create --config {path}`; `haloc check {path}` checks it first"
        )


def is_of_a_run(path: Path) -> bool:
    """Tell whether a file has a run's settings, not an NNI experiment's."""
    from nni_haloc.inputs.config import Config
    from nni_haloc.inputs.yaml_files import read_yaml

    content = read_yaml(path, exponents=False)
    return bool(set(content) & set(Config.model_fields)) and not any(key in content for key in KEYS)


def check_experiment(path: str | Path) -> str:
    """Check an NNI experiment's file and everything that its trials need.

    The keys are checked by NNI's own types; tuner and assessor are made as NNI makes them, and the
    tuner is asked for parameters. If the trials run ``nni_haloc.trial``, each parameter must be a
    setting of their run file; data, network, weights and cost tables are read, and some network
    must be within the budget. If they run on another machine, the settings' relative paths must be
    inside ``trialCodeDirectory``, which NNI sends there; absolute ones are that machine's, and what
    is not here is not looked at.

    Args:
        path: the experiment's file.

    Returns:
        A few words on what the trials run.

    Raises:
        HalocError: with one line on the first mistake.
    """
    path = Path(path)
    content = _read(path)
    here = _runs_here(path, content["trainingService"])
    space = read_space(path, content)
    samples = draw_examples(path, space)
    command = str(content["trialCommand"])
    arguments = trial_arguments(path, command)
    check_keys(path, content)
    check_classes(path, content)
    _check_services(path, content)
    code = _code(path, content, command, here)
    experiment = as_sent(path, content)
    _check_gpus(path, content)
    algorithms = find_algorithms(path, content, experiment)
    measures = arguments is not None and arguments[0] == "measure"
    first = try_algorithms(path, algorithms, space, _number_of_trials(experiment))
    _check_advisor(path, algorithms[0])
    if arguments is None:
        return f"trials run {command!r}"
    parameters = parameters_to_try(path, samples, first, algorithms[0])
    if measures:
        check_measuring(path, arguments[1:], parameters, code)
        return "trials measure a cost table"
    _refuse_minimizing(path, algorithms)
    run_file = code / arguments[0]
    if not run_file.is_file():
        raise SettingsError(
            f"{path}: trialCommand: {arguments[0]}: no such file in {code.resolve()}"
        )
    file = content.get("searchSpaceFile")
    where = f"{path}: searchSpace." if file is None else f"{path.parent / str(file)}: "
    check_settings(run_file, parameters, where, None if here else code)
    return f"trials run {arguments[0]}, searching {', '.join(parameters[0]) or 'nothing'}"


def _read(path: Path) -> dict[str, Any]:
    """Return what an experiment's file says, under NNI's names."""
    from nni_haloc.inputs.yaml_files import read_yaml

    if is_of_a_run(path):
        raise SettingsError(
            f"{path}: these are a run's settings, not an NNI experiment's file: "
            f"`haloc run {path}` runs them"
        )
    spelt = spell_as_nni(path, read_yaml(path, exponents=False))
    for key in ("trialCommand", "trainingService"):
        if not spelt.get(key):
            raise SettingsError(f"{path}: {key}: missing")
    return spelt


def _runs_here(path: Path, service: Any) -> bool:
    """Tell whether the trials run on this machine."""
    services = service if isinstance(service, list) else [service]
    if not all(isinstance(one, dict) and isinstance(one.get("platform"), str) for one in services):
        raise SettingsError(
            f"{path}: trainingService.platform: expected a name such as 'local', found {service!r}"
        )
    return all(one["platform"] == "local" for one in services)


def _check_services(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for several training services without what NNI needs beside them."""
    service = content["trainingService"]
    if isinstance(service, list):
        local = any(one["platform"] == "local" for one in service)
        for key, needed in (("nniManagerIp", True), ("sharedStorage", local)):
            if needed and not content.get(key):
                which = "a list with a local service" if key == "sharedStorage" else "a list"
                raise SettingsError(
                    f"{path}: {key}: missing; NNI needs it where trainingService is {which}"
                )


def _check_gpus(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for GPUs that are not here: NNI's manager ends without a trial."""
    service, gpus = content["trainingService"], content.get("trialGpuNumber")
    here = not isinstance(service, list) and service["platform"] == "local"
    if here and gpus and shutil.which("nvidia-smi") is None:
        raise SettingsError(
            f"{path}: trialGpuNumber: expected no GPU on a machine without NVIDIA's driver "
            f"(nvidia-smi), found {gpus}; leave the key out"
        )


def _code(path: Path, content: Mapping[str, Any], command: str, here: bool) -> Path:
    """Return the folder that the trials start in, once it and the program are looked at."""
    code = path.parent / os.path.expanduser(content.get("trialCodeDirectory") or ".")
    if not os.path.isdir(code):  # which any text may be given
        raise SettingsError(f"{path}: trialCodeDirectory: no such folder: {code}")
    check_script(path, command, code)
    if here:
        check_program(path, command, code)
    else:
        _check_size(path, code)
    return code


def _check_size(path: Path, code: Path) -> None:
    """Raise `SettingsError` if a folder is more than NNI sends to another machine."""
    if any(code.rglob(".nniignore")):
        return  # it says what is left out
    size = 0
    for number, file in enumerate(code.rglob("*"), 1):
        size += file.stat().st_size if file.is_file() else 0
        if number > _MOST_FILES or size > _MOST_BYTES:
            most = f"{_MOST_FILES} files and {_MOST_BYTES >> 20} MiB, which NNI sends at most"
            raise SettingsError(
                f"{path}: trialCodeDirectory: {code} has more than {most}; name what the trials "
                "do not need in a file .nniignore"
            )


def _number_of_trials(experiment: Mapping[str, Any]) -> int:
    """Return how many trials NNI begins at once, as far as that tells more than a few do."""
    return max(1, min(experiment["trialConcurrency"], experiment.get("maxTrialNumber") or 8, 8))


def _check_advisor(path: Path, tuner: Algorithm) -> None:
    """Raise `SettingsError` for an advisor of NNI's own that does not run, or without budgets."""
    if not tuner.advisor:
        return
    if not tuner.foreign:
        own = f"{ADVISORS}.{nni_name(tuner)}"
        ends = "NNI 3.0's own ends at the first result of a trial; expected"
        raise SettingsError(
            f"{path}: {tuner.key}: {ends} className: {own} and codeDirectory: . in the place of "
            f"name, found name: {tuner.name}"
        )
    with as_one_line(where=f"{path}: {tuner.key}"):
        _ = tuner.budgets


def _refuse_minimizing(path: Path, algorithms: Sequence[Algorithm]) -> None:
    """Raise `SettingsError` for what would look for the worst network: trials report top-1."""
    for algorithm in algorithms:
        if algorithm.optimize_mode == "minimize":
            chosen = "optimize_mode" in (algorithm.config.get("classArgs") or {})
            by = "" if chosen else f", the default of {algorithm.name}"
            raise SettingsError(
                f"{path}: {algorithm.key}.classArgs.optimize_mode: expected 'maximize', because "
                f"the trials report their top-1, found 'minimize'{by}"
            )
