"""What the trials of an experiment are given, checked against the settings that they read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_haloc.experiments.algorithms import NOT_OF_SETTINGS, Algorithm
from nni_haloc.inputs.tuned import BUDGET
from nni_haloc.utils.errors import HalocError, InfeasibleBudget, SettingsError, brief

if TYPE_CHECKING:
    from nni_haloc.inputs.config import Config

Parameters = dict[str, Any]


def parameters_to_try(
    path: Path, samples: Mapping[str, Sequence[Any]], first: Sequence[Any], tuner: Algorithm
) -> list[Parameters]:
    """Return parameters that between them have every value that a tuner may draw.

    Args:
        path: the experiment's file.
        samples: values of each key of the search space (`draw_examples`).
        first: what the tuner gives the first trials.
        tuner: the tuner.

    Raises:
        SettingsError: if the tuner gives a trial something else than names and values.
    """
    if str(tuner.config.get("name")).lower() in ("batch", "batchtuner"):
        # the values of its one choice are the parameters, and the key is not among them
        changes = [value for values in samples.values() for value in values]
    else:
        start = {key: values[0] for key, values in samples.items()}
        start |= {BUDGET: tuner.budgets[-1]} if tuner.advisor else {}
        samples = {**samples, **({BUDGET: tuner.budgets} if tuner.advisor else {})}
        changes = [{**start, key: value} for key in samples for value in samples[key]] or [{}]
    for parameters in [*changes, *first]:
        if not isinstance(parameters, dict):
            expected = "expected settings and their values for a trial"
            found = f"{tuner.name} gives {brief(parameters)}"
            remedy = "; choose another, such as TPE" if tuner.name in NOT_OF_SETTINGS else ""
            raise SettingsError(f"{path}: {tuner.key}: {expected}, {found}{remedy}")
    # A value may be drawn outside the settings' ranges now and then; a name is wrong in all trials.
    added = {k: v for parameters in first for k, v in parameters.items() if k not in changes[0]}
    return [*changes, {**changes[0], **added}] if added else changes


def check_settings(
    run_file: Path, parameters: Sequence[Parameters], space: str, uploaded: Path | None = None
) -> None:
    """Read a run's settings with each of some parameters, and check the runs as far as can be.

    Args:
        run_file: the settings.
        parameters: what the trials are given.
        space: what messages call the search space, in front of a key of it.
        uploaded: the folder that NNI sends to another machine, if the runs are to be there.

    Raises:
        HalocError: with one line on the first mistake.
    """
    from nni_haloc.inputs.config import load_config

    places = {key: f"{space}{key}" for each in parameters for key in each}
    configs = [load_config(run_file, each, uploaded=uploaded, places=places) for each in parameters]
    from nni_haloc.runs.check import check_runs

    try:
        with _importable(run_file.parent, configs):
            check_runs(configs, elsewhere=uploaded is not None)
    except InfeasibleBudget as error:
        keys = [key for key in ("budget.fraction", "budget.absolute", "budget") if key in places]
        if not keys or not error.first or error.run is None:
            raise error.where(f"{run_file}: budget") from None
        value = parameters[error.run].get(keys[0])
        raise error.where(f"{places[keys[0]]}: {value}") from None
    except HalocError as error:
        raise type(error)(f"{run_file}: {error}") from None


def check_measuring(
    path: Path, arguments: Sequence[str], parameters: Sequence[Parameters], code: Path
) -> None:
    """Check the options of trials that measure a cost table.

    Args:
        path: the experiment's file.
        arguments: the options of ``haloc measure`` in its ``trialCommand``.
        parameters: what the trials are given: further options.
        code: the folder in which they run.

    Raises:
        SettingsError: if there is no such option, or no such specification.
    """
    from nni_haloc.costs.measure import measure_parser

    for each in parameters:
        words = [word for key, value in each.items() for word in (f"--{key}", str(value))]
        try:
            options = measure_parser().parse_args([*arguments, *words])
        except ValueError as error:
            raise SettingsError(f"{path}: trialCommand: haloc measure: {error}") from None
        if options.spec is not None and not (code / options.spec).is_file():
            made = "haloc spec makes one"
            raise SettingsError(
                f"{path}: trialCommand: --spec: no such file: {code / options.spec}; {made}"
            )


@contextmanager
def _importable(folder: Path, configs: Sequence[Config]) -> Iterator[None]:
    """Let a model's factory of one's own be imported from the trials' folder, as in a trial."""
    from nni_haloc.inputs.models import add_code, is_factory

    before = list(sys.path)
    if any(is_factory(config.model.name) for config in configs):
        add_code(folder)
    try:
        yield
    finally:
        sys.path[:] = before
