"""NNI's remote training service: an SSH server of our own on this machine.

Its keys, home and port are thrown away.
"""

import getpass
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.nni_experiments import digits_code, finished, free_port, get, wait_for, with_budgets
from helpers.paths import ROOT
from safetensors.torch import save_file

from nni_haloc.experiments.check import check_experiment
from nni_haloc.experiments.results import trial_folders, trial_results
from nni_haloc.inputs.models import build_model
from nni_haloc.runs.saved import load
from nni_haloc.utils.errors import HalocError

SSHD = shutil.which(
    "sshd", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
)
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("scp")),
    reason="no SSH server here (Debian: openssh-server, openssh-client)",
)


@pytest.fixture
def machine(tmp_path):
    """Another machine, as far as NNI can tell: an entry of ``machineList``, and its home."""
    folder, home = tmp_path / "sshd", tmp_path / "there"
    folder.mkdir()
    home.mkdir()
    for name in ("host", "user"):
        # PEM: what every reader of keys knows
        words = [
            "ssh-keygen",
            "-q",
            "-t",
            "rsa",
            "-b",
            "2048",
            "-m",
            "PEM",
            "-N",
            "",
            "-f",
            str(folder / name),
        ]
        subprocess.run(words, check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    port = free_port()
    # pip without an index: NNI upgrades itself on the other machine, which here is this one. The
    # file server's folder is the home, as it is where the home is the user's own.
    here = {
        "HOME": home,
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",
    }
    variables = " ".join(f"{key}={value}" for key, value in here.items() if value)
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder / 'host'}\nPidFile {folder / 'pid'}\n"
        f"AuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"Subsystem sftp internal-sftp -d {home}\nSetEnv {variables}\n"
    )
    with subprocess.Popen(
        [SSHD, "-D", "-f", str(folder / "config"), "-E", str(folder / "log")]
    ) as server:
        try:
            wait_for(lambda: (folder / "pid").exists() or server.poll() is not None, 20)
            assert server.poll() is None, (folder / "log").read_text()
            entry = {
                "host": "127.0.0.1",
                "port": port,
                "user": getpass.getuser(),
                "sshKeyFile": str(folder / "user"),
            }
            yield {**entry, "pythonPath": str(Path(sys.executable).parent)}, home
        finally:
            server.terminate()


@needs_sshd
def test_a_remote_trial_finds_what_it_needs_and_its_results_come_back(tmp_path, machine):
    entry, there = machine
    code = digits_code(tmp_path / "digits")
    service = {"platform": "remote", "machineList": [entry]}
    file = with_budgets(
        code / "remote.yml", [0.5], nniManagerIp="127.0.0.1", trainingService=service
    )
    assert check_experiment(file) == "trials run run.yml, searching budget.fraction"
    here = tmp_path / "here"
    here.mkdir()
    with finished(here, file) as (port, number):
        (trial,) = get(port, "trial-jobs")
        assert trial["status"] == "SUCCEEDED"
        metrics = get(port, "metric-data")
    assert [m["type"] for m in metrics] == ["PERIODICAL"] * 3 + ["FINAL"]
    (row,) = trial_results(here / "nni-experiments", number)
    assert row["budget.fraction"] == 0.5
    assert row["macs"] <= 0.5 * 1493632

    (left,) = there.glob(f"nni-experiments/{number}/environments/*/trials/*/haloc")
    assert not list(here.rglob("ranks.json"))
    (fetch,) = trial_folders(here / "nni-experiments", number).values()
    words = ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path / 'known'}"]
    subprocess.run(
        fetch.replace("scp", " ".join(["scp", "-q", *words]), 1),
        shell=True,
        cwd=here,
        check=True,
        timeout=60,
    )
    fetched = here / row["trial"]
    for name in ("ranks.json", "weights.safetensors", "metrics.json"):
        assert (fetched / name).read_bytes() == (left / name).read_bytes()
    load(fetched)
    stages = json.loads((fetched / "metrics.json").read_text())["stages"]
    assert stages["finetune"]["top1"] == row["default"]


REMOTE = """
searchSpace:
  budget.fraction: {_type: choice, _value: [0.5]}
trialCommand: python3 -m nni_haloc.trial run.yml
trialCodeDirectory: code
trialConcurrency: 1
tuner: {name: GridSearch}
trainingService:
  platform: remote
  machineList: [{host: 192.0.2.2, user: alice, password: secret}]
nniManagerIp: 192.0.2.1
"""
LOCAL = "trainingService: {platform: local}"
RUN = """
model: {name: resnet20}
weights: weights.safetensors
data: {name: folder, root: /images/of/that/machine, size: 32}
rank_space: space.yml
budget: {fraction: 0.5}
"""


@pytest.fixture
def experiment(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    save_file(build_model("resnet20").state_dict(), code / "weights.safetensors")
    (tmp_path / "outside.yml").write_text("kinds: [conv]")
    (code / "space.yml").write_text("kinds: [conv]")
    (code / "run.yml").write_text(RUN)
    (tmp_path / "haloc.yml").write_text(REMOTE)
    return tmp_path / "haloc.yml"


def test_what_an_absolute_path_names_is_the_other_machines(experiment):
    assert check_experiment(experiment) == "trials run run.yml, searching budget.fraction"
    run = experiment.parent / "code" / "run.yml"
    run.write_text(
        RUN.replace("space.yml", "/spaces/there.yml").replace("weights.saf", "~/weights.saf")
    )
    assert check_experiment(experiment) == "trials run run.yml, searching budget.fraction"
    experiment.write_text(REMOTE.partition("trainingService")[0] + LOCAL)
    with pytest.raises(HalocError, match=r"no such file"):
        check_experiment(experiment)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "space.yml",
            "../outside.yml",
            r"rank_space: .*outside\.yml is outside .*code, the folder that is sent to the other "
            "machine$",
        ),
        (
            "weights.saf",
            "../weights.saf",
            r"weights: .*weights\.safetensors is outside .*code, the folder that is sent",
        ),
        ("/images/of", "images/of", r"data\.root: no such file or folder: .*code/images/of"),
    ],
)
def test_what_is_not_sent_to_the_other_machine_is_named(experiment, old, new, message):
    run = experiment.parent / "code" / "run.yml"
    run.write_text(RUN.replace(old, new))
    with pytest.raises(HalocError, match=message):
        check_experiment(experiment)


def test_the_digits_example_for_another_machine_is_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(HalocError, match=r"remote\.yml: NNI refuses it: .* a valid SSH key file"):
        check_experiment(ROOT / "examples" / "digits" / "remote.yml")
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()
    assert "searching budget.fraction" in check_experiment(
        ROOT / "examples" / "digits" / "remote.yml"
    )
