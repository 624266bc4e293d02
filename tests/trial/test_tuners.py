"""A real experiment with each of NNI's tuners and advisors, to its end.

Hyperband in CI, the others in the slow suite, ``HALOC_SLOW=1``.
"""

import os
from importlib.util import find_spec

import pytest
import yaml
from helpers.nni_experiments import DIGITS, digits_code, finished, folders, get

from nni_haloc.experiments.algorithms import ADVISORS
from nni_haloc.experiments.check import check_experiment
from nni_haloc.experiments.results import trial_results
from nni_haloc.inputs.config import set_dotted

SLOW = pytest.mark.skipif(not os.environ.get("HALOC_SLOW"), reason="slow: HALOC_SLOW=1 runs it")
MAXIMIZE = {"optimize_mode": "maximize"}
SETTINGS = {
    "rule": "uniform", "data.share": 0.1, "recalibration_batches": 1, "cost.batch_size": 1,
    "finetune.epochs": 1, "finetune.schedule": "constant",
}  # fmt: skip
SPACE = {
    "budget.fraction": {"_type": "choice", "_value": [0.5, 0.3]},
    "finetune.lr": {"_type": "uniform", "_value": [0.01, 0.05]},
}
LEARNING = {
    "finetune.lr": SPACE["finetune.lr"],
    "finetune.epochs": {"_type": "quniform", "_value": [1, 2, 1]},
}
BUDGETED = {"finetune.lr": SPACE["finetune.lr"]}
EACH = [{"budget.fraction": 0.5, "seed": 1}, {"finetune.lr": 0.01}]
CASES = {
    "TPE": (MAXIMIZE, SPACE, 2),
    "Random": ({}, LEARNING, 2),
    "GridSearch": ({}, SPACE, 2),
    "Evolution": ({**MAXIMIZE, "population_size": 2}, SPACE, 2),
    "Hyperband": ({**MAXIMIZE, "R": 2, "eta": 2}, BUDGETED, 3),
    "BOHB": ({**MAXIMIZE, "min_budget": 1, "max_budget": 2, "eta": 2}, BUDGETED, 3),
    "PBT": ({**MAXIMIZE, "population_size": 2}, LEARNING, 4),
    "Batch": ({}, {"combine_params": {"_type": "choice", "_value": EACH}}, 2),
}
FAST = ("Hyperband",)
BOHB = pytest.mark.skipif(
    not (find_spec("ConfigSpace") and find_spec("statsmodels")),
    reason="BOHB needs the packages ConfigSpace and statsmodels",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[*([] if name in FAST else [SLOW]), *([BOHB] if name == "BOHB" else [])]
        )
        for name in CASES
    ],
)
def test_an_experiment_comes_to_its_end(tmp_path, name):
    arguments, space, number = CASES[name]
    code = digits_code(tmp_path / "digits")
    run = yaml.safe_load((code / "run.yml").read_text())
    for key, value in SETTINGS.items():
        set_dotted(run, key, value)
    (code / "run.yml").write_text(yaml.safe_dump(run))
    content = yaml.safe_load((DIGITS / "haloc.yml").read_text())
    content |= {"searchSpace": space, "maxTrialNumber": number}
    own = {"className": f"{ADVISORS}.{name}", "codeDirectory": "."}
    chosen = own if name in ("Hyperband", "BOHB") else {"name": name}
    content["tuner"] = {**chosen, **({"classArgs": arguments} if arguments else {})}
    (code / "haloc.yml").write_text(yaml.safe_dump(content))
    assert check_experiment(code / "haloc.yml").startswith("trials run run.yml")
    with finished(tmp_path, code / "haloc.yml") as (port, experiment):
        trials = get(port, "trial-jobs")
        rows = trial_results(tmp_path / "nni-experiments", experiment)
        logs = [
            (folder / "log.txt").read_text() for folder in folders(tmp_path, experiment).values()
        ]
    assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * number
    assert all(0 <= row["default"] <= 1 for row in rows)
    if name in ("Hyperband", "BOHB"):
        assert sorted(row["TRIAL_BUDGET"] for row in rows) == [1, 1, 2]
        assert sum("going on from its fine-tuning" in log for log in logs) == 1
    if name == "PBT":
        assert sum("going on from the network of the trial before" in log for log in logs) == 2
    if name == "Batch":
        assert [row["seed"] for row in rows if "seed" in row] == [1]


@SLOW
def test_an_assessor_stops_a_trial_that_learns_nothing(tmp_path):
    """Two trials that learn, then one of the lowest ranks that does not.

    NNI 3.0 notes only after a trial's end that it has stopped it, and so calls it cancelled.
    """
    code = digits_code(tmp_path / "digits", epochs=6)
    content = yaml.safe_load((DIGITS / "haloc.yml").read_text())
    learning = {"finetune.lr": 0.02, "rule": "uniform", "finetune.schedule": "constant"}
    trials = [learning, {**learning, "seed": 1}]
    trials.append({**learning, "finetune.lr": 1e-8, "budget.fraction": 0.15})
    content |= {
        "searchSpace": {"combine_params": {"_type": "choice", "_value": trials}},
        "tuner": {"name": "Batch"},
        "assessor": {"name": "Medianstop", "classArgs": {**MAXIMIZE, "start_step": 2}},
        "maxTrialNumber": 3,
        "trialConcurrency": 1,
    }
    (code / "haloc.yml").write_text(yaml.safe_dump(content))
    check_experiment(code / "haloc.yml")
    with finished(tmp_path, code / "haloc.yml") as (port, _):
        found = [trial["status"] for trial in get(port, "trial-jobs")]
    assert found == ["SUCCEEDED", "SUCCEEDED", "USER_CANCELED"]
