"""Trials that go on from others: longer ones of Hyperband and BOHB, the generations of PBT."""

import nni
import pytest
from helpers.paths import DIGITS
from nni.assessor import AssessResult
from safetensors.torch import load_file

from nni_haloc.experiments.algorithms import Algorithm, _made
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.job import Job
from nni_haloc.trial import main
from nni_haloc.utils.log import log_to

SHORT = {
    "data.share": 0.2, "cost.batch_size": 1, "recalibration_batches": 2, "rule": "uniform",
    "search.epochs": 1, "rank_space.calibration_images": 32, "rank_space.step": 4,
    "search.start": "uniform", "finetune.epochs": 1,
    "finetune.schedule": "constant", "finetune.lr": 0.02,
}  # fmt: skip


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Call with a trial's name and parameters: its folder, what it reported, and its log."""

    def time(self, costs=None, **networks):
        return {**dict.fromkeys(networks, 1.0), **({"original": 2.0} if costs else {})}

    monkeypatch.setattr(Job, "time", time)  # most of the time that these trials would take

    def run(name, *, experiment="experiment", **parameters):
        sent = []
        budget = parameters.get("trial_budget", "finetune.epochs")
        drawn = [budget] if "TRIAL_BUDGET" in parameters else []
        for kind in ("intermediate", "final"):
            monkeypatch.setattr(nni, f"report_{kind}_result", sent.append)
        folder = RunFolder(tmp_path / experiment / name / "haloc")
        fixed = {key: value for key, value in SHORT.items() if key not in drawn}
        with log_to(folder.log):
            assert main(str(DIGITS), fixed | parameters, folder) == 0
        return folder, sent, folder.log.read_text()

    return run


def curve(sent):
    """What a trial reported before its final result."""
    return [point["default"] for point in sent[:-1]]


@pytest.mark.parametrize("rule", ["uniform", "search"])
def test_a_longer_trial_at_a_constant_rate_is_one_that_was_never_ended(trial, rule, tmp_path):
    other = {"rule": rule, "seed": 1, "TRIAL_BUDGET": 2}
    folder = RunFolder(tmp_path / "experiment" / "other" / "haloc")
    folder.path.mkdir(parents=True)
    folder.write_metrics({}, parameters=other)
    shorter, *_ = trial("shorter", rule=rule, TRIAL_BUDGET=1.0)
    longer, sent, log = trial("longer", rule=rule, TRIAL_BUDGET=3)
    whole, straight, _ = trial("whole", experiment="another", rule=rule, TRIAL_BUDGET=3)
    assert f"going on from its fine-tuning, a shorter trial of these parameters: {shorter}" in log
    assert "fine-tuning: 1 of 3 epochs are done" in log
    assert longer.weights.read_bytes() == whole.weights.read_bytes()
    assert [point["default"] for point in sent[:-1]] == pytest.approx(curve(straight), rel=1e-5)
    assert len(curve(straight)) == 1 + 3
    assert sent[-1]["default"] == straight[-1]["default"]


def test_at_another_rate_a_longer_trial_takes_the_search_alone(trial):
    settings = {"rule": "search", "finetune.schedule": "onecycle"}
    trial("shorter", **settings, TRIAL_BUDGET=1)
    longer, sent, log = trial("longer", **settings, TRIAL_BUDGET=2)
    whole, straight, _ = trial("whole", experiment="another", **settings, TRIAL_BUDGET=2)
    assert "going on from its search" in log
    assert "search: 1 of 1 epochs are done" in log
    assert longer.weights.read_bytes() == whole.weights.read_bytes()
    assert sent[:-1] == straight[:-1]


def test_the_settings_file_names_what_the_budget_sets(trial):
    settings = {"trial_budget": "search.epochs", "rule": "search", "finetune.epochs": 0}
    _, _, log = trial("one", **settings, TRIAL_BUDGET=2)
    assert "search 2 epochs, fine-tuning 0 epochs" in log


def test_a_generation_of_pbt_goes_on_from_the_network_of_the_one_before(trial, tmp_path):
    zero, one, two = (str(tmp_path / "population" / "0" / step) for step in "012")
    first, *_ = trial("first", load_checkpoint_dir=zero, save_checkpoint_dir=zero)
    settings = {"finetune.epochs": 0, "recalibration_batches": 0, "finetune.lr": 0.5}
    second, _, log = trial("second", **settings, load_checkpoint_dir=zero, save_checkpoint_dir=one)
    assert "going on from the network of the trial before" in log
    ours, theirs = load_file(second.weights), load_file(first.weights)
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert RunFolder(one).weights.read_bytes() == second.weights.read_bytes()
    *_, log = trial(
        "third", **{"budget.fraction": 0.5}, load_checkpoint_dir=one, save_checkpoint_dir=two
    )
    assert "budget.fraction has changed since the trial before: starting anew" in log
    *_, log = trial("fourth", load_checkpoint_dir=str(tmp_path / "gone"), save_checkpoint_dir=two)
    assert "load_checkpoint_dir: no network in" in log


ASSESSORS = {
    "Medianstop": {"start_step": 3},
    "Curvefitting": {"epoch_num": 8, "start_step": 6, "threshold": 0.95},
}


@pytest.fixture
def reported(trial):
    """The points of a good trial, and of one that learns nothing after a search that did."""
    settings = {"finetune.epochs": 8, "recalibration_batches": 1}
    bad = {"rule": "search", "search.epochs": 4, "budget.fraction": 0.06, "finetune.lr": 1e-6}
    return [curve(trial(str(own), **settings | own)[1]) for own in ({}, bad)]


@pytest.mark.filterwarnings("ignore")  # Curvefitting tries curves that don't fit
def test_assessors_stop_the_trial_that_they_should_and_no_other(reported):
    """NNI's assessors compare points place by place, so a curve means one thing all along."""
    good, bad = reported
    assert len(good) == len(bad) == 1 + 8
    assert max(bad) < 0.9 * good[-1]
    for name, arguments in ASSESSORS.items():
        assessor = _made(Algorithm("assessor", {"name": name, "classArgs": arguments}))
        stopped = []
        for trial, points in {"first": good, "as good": good, "bad": bad}.items():
            histories = [
                [{"default": point} for point in points[:number]]
                for number in range(1, 1 + len(points))
            ]
            verdicts = [assessor.assess_trial(trial, history) for history in histories]
            assessor.trial_end(trial, AssessResult.Bad not in verdicts)
            if AssessResult.Bad in verdicts:
                stopped.append((trial, 1 + verdicts.index(AssessResult.Bad)))
        assert stopped == [("bad", arguments["start_step"])]
