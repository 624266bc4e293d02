"""What a tuner gives a trial beside settings: a budget, and folders to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BUDGET = "TRIAL_BUDGET"
"""How long a trial is to be, from NNI's Hyperband and BOHB."""
LOAD, SAVE = "load_checkpoint_dir", "save_checkpoint_dir"
"""Folders of NNI's PBT: what a trial goes on from, and where it leaves what the next one does."""
_EXACT = 2**53
"""Up to here every whole number is a float of its own."""


def as_settings(parameters: Mapping[str, Any], budget: str) -> dict[str, Any]:
    """Return the settings that a tuner's parameters set.

    Args:
        parameters: what the tuner gives a trial.
        budget: the setting that the trial's budget sets.

    Returns:
        Dotted keys and values. Whole numbers are integers, because NNI draws 2.0 from `quniform`
        and a setting of any kind of number takes 2; keys and values of ``arguments`` stay.

    Raises:
        ValueError: if the budget's setting is among the parameters, too.
    """
    settings = {}
    for key, value in parameters.items():
        if key == BUDGET:
            if budget in parameters:
                expected = f"expected no values, because {BUDGET} sets it (trial_budget)"
                raise ValueError(f"{budget}: {expected}, found {parameters[budget]!r}")
            key = budget
        if key not in (LOAD, SAVE):
            settings[key] = value if ".arguments." in key else _integer_if_whole(value)
    return settings


def _integer_if_whole(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    return int(value) if whole else value
