"""NNI's advisors: its own end at the first result, ours come to the second round."""

from importlib.util import find_spec

import nni
import pytest
from nni.algorithms.hpo import hyperband_advisor
from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
from nni.runtime.tuner_command_channel import CommandType

from nni_haloc.experiments import advisors

SPACE = {"finetune.lr": {"_type": "uniform", "_value": [0.01, 0.1]}}
NEEDS = [] if find_spec("ConfigSpace") and find_spec("statsmodels") else ["BOHB"]


@pytest.fixture
def started(monkeypatch):
    """Call with an advisor's class and arguments: it, and the trials that it sends its manager."""
    monkeypatch.setattr(MsgDispatcherBase, "__init__", lambda self: None)
    monkeypatch.setattr(hyperband_advisor, "_next_parameter_id", 0)

    def start(kind, earlier=None, **arguments):
        sent = []

        def send(self, command, data):
            if command is CommandType.NewTrialJob:
                sent.append(nni.load(data))

        monkeypatch.setattr(kind, "send", send)
        made = kind(**arguments)
        made.recovered_max_param_id = -1
        if earlier:
            made.handle_add_customized_trial(earlier)
        made.handle_initialize(SPACE)
        made.handle_request_trial_jobs(2)
        return made, sent

    return start


def end(advisor, trial, value):
    """Report a trial's result, and end it, as NNI's manager does."""
    number, job = trial["parameter_id"], f"job {trial['parameter_id']}"
    result = {"parameter_id": number, "value": nni.dump({"default": value}), "type": "FINAL"}
    advisor.handle_report_metric_data({**result, "trial_job_id": job, "sequence": 0})
    facts = {"trial_job_id": job, "event": "SUCCEEDED", "hyper_params": nni.dump(trial)}
    advisor.handle_trial_end(facts)


ARGUMENTS = {
    "Hyperband": {"R": 2, "eta": 2},
    "BOHB": {"min_budget": 1, "max_budget": 2, "eta": 2},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name in NEEDS, reason="needs ConfigSpace, statsmodels")
        )
        for name in ARGUMENTS
    ],
)
def test_the_better_of_two_trials_gets_a_longer_one(started, name):
    advisor, sent = started(getattr(advisors, name), **ARGUMENTS[name])
    assert [trial["parameters"]["TRIAL_BUDGET"] for trial in sent] == [1, 1]
    worse, better = sent
    end(advisor, worse, 0.5)
    end(advisor, better, 0.6)
    advisor.handle_request_trial_jobs(1)
    assert sent[2]["parameters"] == {**better["parameters"], "TRIAL_BUDGET": 2}


def test_nnis_own_ends_at_the_first_result(started):
    """So that a changed NNI shows itself: ours would then not be needed."""
    advisor, sent = started(hyperband_advisor.Hyperband, **ARGUMENTS["Hyperband"])
    with pytest.raises(TypeError, match="'<=' not supported"):
        end(advisor, sent[0], 0.5)


def test_after_a_resume_numbers_go_on_and_earlier_results_are_not_asked_for(started):
    earlier = [nni.dump({"parameter_id": f"0-1_0_{n}", "parameters": {}}) for n in range(3)]
    advisor, sent = started(advisors.Hyperband, earlier, **ARGUMENTS["Hyperband"])
    assert [trial["parameter_id"] for trial in sent] == ["0-1_0_3", "0-1_0_4"]
    end(advisor, {"parameter_id": "0-1_0_2"}, 0.5)
    assert len(sent) == 2
