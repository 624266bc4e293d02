"""docs/how-to/many-machines.md: NNI's classes take its experiments, its arithmetic is right."""

import re
from pathlib import Path

import nni_node
import pytest
import torch
import yaml
from helpers.paths import ROOT
from nni.experiment.config import ExperimentConfig

from nni_haloc.experiments.check import check_experiment
from nni_haloc.inputs.models import build_model
from nni_haloc.utils.errors import SettingsError

PAGE = (ROOT / "docs" / "how-to" / "many-machines.md").read_text()
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
SERVICES_OF = {text: yaml.safe_load(text)["trainingService"] for text in FILES}
EXPERIMENTS = {
    service["platform"]: text for text, service in SERVICES_OF.items() if isinstance(service, dict)
}
SERVICES = (
    Path(nni_node.__path__[0])
    / "training_service"
    / "reusable"
    / "environments"
    / "environmentServiceFactory.js"
)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Return a folder with the run's files.

    It has what a file of the page takes for granted on the manager's machine.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()
    (tmp_path / "mnt").mkdir()
    torch.save(build_model("resnet20").state_dict(), tmp_path / "weights.pth")
    (tmp_path / "run.yml").write_text(
        "{model: {name: resnet20}, weights: weights.pth, budget: {fraction: 0.5},"
        " data: {name: folder, root: /data, size: 32}}"
    )
    return tmp_path


@pytest.mark.parametrize("platform", ["remote", "kubeflow", "frameworkcontroller", "openpai"])
def test_nni_and_haloc_check_take_the_experiments_of_the_page(code, platform):
    file = code / "haloc.yml"
    file.write_text(
        EXPERIMENTS[platform].replace(
            "localStorageMountPoint: /mnt/pai", f"localStorageMountPoint: {code / 'mnt'}"
        )
    )
    config = ExperimentConfig.load(file)
    config.validate()
    service = config.canonical_copy().json()["trainingService"]
    assert service["platform"] == platform
    assert service["trialCommand"] == "python3 -m nni_haloc.trial run.yml"
    if platform == "openpai":  # of which NNI's manager knows nothing
        with pytest.raises(SettingsError, match=r"platform: .*'openpai'.* has no such service$"):
            check_experiment(file)
    else:
        assert check_experiment(file) == "trials run run.yml, searching budget.fraction"


def test_the_page_shows_each_service_once():
    assert set(EXPERIMENTS) == {"remote", "kubeflow", "frameworkcontroller", "openpai"}


def test_nni_has_all_but_one_of_these_services():
    """The page says that OpenPAI has lost its service; NNI's own factory says the same."""
    known = set(re.findall(r"case '(\w+)'", SERVICES.read_text()))
    assert set(EXPERIMENTS) - known == {"openpai"}


def test_the_arithmetic_of_the_page():
    text = yaml.safe_load((ROOT / "examples" / "imagenet_resnet18" / "run.yml").read_text())
    search, tuning, share = (
        text["search"]["epochs"],
        text["finetune"]["epochs"],
        text["data"]["val_fraction"],
    )
    val = round(share * 1_281_167)
    train = 1_281_167 - val
    parts = [2.2 * search * train, tuning * train, (search + tuning) * val / 3, 2 * 50_000 / 3]
    for number in (
        f"{train:,}",
        f"{val:,}",
        *(f"| {part / 1e6:.1f} |" for part in parts[:3]),
        f"| {sum(parts) / 1e6:.1f} |",
    ):
        assert number in PAGE, number
    assert f"{2.9 * search * train / 1e6:.1f} million" in PAGE
    for steps, row in ((parts[0], "| search | "), (sum(parts), "| the whole trial | ")):
        hours = steps / (3600 * 8 * 1000 * 0.9)
        assert f"{row}{hours:.1f} hours, " in PAGE
        (first, all_) = re.search(
            re.escape(row) + r".* ([\d.]+) GPU-hours \| .* ([\d.]+) GPU-hours", PAGE
        ).groups()
        assert float(first) == pytest.approx(8 * hours, rel=0.01)
        assert float(all_) == pytest.approx(64 * hours, rel=0.01)
