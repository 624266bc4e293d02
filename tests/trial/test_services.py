"""A real experiment over several training services, and one whose trial takes too long.

In the slow suite, ``HALOC_SLOW=1``.
"""

import os

import pytest
import yaml
from helpers.nni_experiments import DIGITS, digits_code, finished, get

from nni_haloc.experiments.check import check_experiment

pytestmark = pytest.mark.skipif(
    not os.environ.get("HALOC_SLOW"), reason="slow: HALOC_SLOW=1 runs it"
)


def ended(tmp_path, **changes):
    """Run the digits example with some keys changed; return the states of its trials."""
    code = digits_code(tmp_path / "digits")
    space = {"budget.fraction": {"_type": "choice", "_value": [0.5]}}
    content = yaml.safe_load((DIGITS / "haloc.yml").read_text())
    content |= {"searchSpace": space, "maxTrialNumber": 1, **changes}
    (code / "haloc.yml").write_text(yaml.safe_dump(content))
    assert check_experiment(code / "haloc.yml").startswith("trials run run.yml")
    with finished(tmp_path, code / "haloc.yml") as (port, _):
        return [trial["status"] for trial in get(port, "trial-jobs")]


def test_trials_run_on_one_of_several_services(tmp_path):
    (tmp_path / "shared").mkdir()
    storage = {
        "storageType": "NFS",
        "localMounted": "usermount",
        "localMountPoint": str(tmp_path / "shared"),
        "remoteMountPoint": str(tmp_path / "shared"),
        "nfsServer": "127.0.0.1",
        "exportedDirectory": "/shared",
    }
    services = [{"platform": "local"}, {"platform": "local"}]
    found = ended(
        tmp_path, nniManagerIp="127.0.0.1", sharedStorage=storage, trainingService=services
    )
    assert found == ["SUCCEEDED"]


def test_a_trial_that_takes_longer_than_allowed_is_cancelled(tmp_path):
    assert ended(tmp_path, maxTrialDuration="3s") == ["USER_CANCELED"]
