"""Networks go to a hub and come back: a server of its endpoints stands here for it."""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires, version
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from helpers.paths import DIGITS
from helpers.short_runs import SETTINGS
from packaging.requirements import Requirement
from torch.utils.data import DataLoader, TensorDataset

import nni_haloc
from nni_haloc.inputs.config import load_config, parse_config
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs import hub
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.model_card import model_card, without_folders
from nni_haloc.runs.saved import save
from nni_haloc.utils.errors import HalocError, MissingPackage, SettingsError
from nni_haloc.utils.files import read_json

PLAN = RankPlan(
    {"block2.conv": (12, 12), "block3.conv": None, "block4.conv": (24, 16)},
    {"rule": "uniform", "metric": "macs", "budget": 500.0, "cost": 450.0, "original_cost": 1000.0},
)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NAMED = {"name": "digits_cnn", "arguments": {}}


class Hub(ThreadingHTTPServer):
    """A hub: repositories of files. The address of a commit has a sum of the files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.fetched, self.tokens = {}, [], set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def sha(self, repository):
        return sha1(repr(sorted(self.repositories[repository].items())).encode())


def sha1(content):
    return hashlib.sha1(content).hexdigest()


class Endpoints(BaseHTTPRequestHandler):
    """The endpoints that a push and a fetch ask, as far as they are asked."""

    def log_message(self, *words):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = urlsplit(self.path).path.strip("/").split("/")
        lines = [json.loads(line) for line in body.splitlines()]
        if "validate-yaml" in parts:
            self.answer({"errors": [], "warnings": []})
        elif parts[1:] == ["repos", "create"]:
            self.create(f"{lines[0]['organization']}/{lines[0]['name']}")
        elif "preupload" in parts:
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": f["path"], **plain} for f in lines[0]["files"]]})
        else:
            self.commit("/".join(parts[2:4]), lines)

    def create(self, name):
        if name.startswith("others/"):
            return self.answer({"error": "You don't have the rights"}, 403)
        self.server.repositories.setdefault(name, {})
        self.answer({"url": f"{self.server.address}/{name}"})

    def commit(self, name, lines):
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.sha(name)
        address = f"{self.server.address}/{name}/commit/{sha}"
        self.answer({"commitUrl": address, "commitOid": sha})

    def do_GET(self):
        parts = urlsplit(self.path).path.strip("/").split("/")
        is_file = parts[0] != "api"
        name = "/".join(parts[:2] if is_file else parts[2:4])
        files = self.server.repositories.get(name)
        if files is None:
            self.answer({"error": "Not found"}, 404, X_Error_Code="RepoNotFound")
        elif is_file:
            content = files["/".join(parts[4:])]
            self.server.fetched.append(parts[-1])
            tag = f'"{sha1(content)}"'
            self.answer(content, ETag=tag, X_Repo_Commit=self.server.sha(name))
        elif "tree" in parts:
            facts = {"type": "file", "oid": "0" * 40}
            self.answer([{"path": p, "size": len(c), **facts} for p, c in files.items()])
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": name, "sha": self.server.sha(name), "siblings": siblings})

    do_HEAD = do_GET


@pytest.fixture
def server():
    place = Hub()
    yield place
    place.shutdown()
    place.server_close()


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return build_model("digits_cnn").eval()


@pytest.fixture
def folder(digits, tmp_path):
    """A run's folder, with what a run leaves there and nobody else is to have."""
    place = tmp_path / "run"
    save(place, compress(digits, PLAN), PLAN, NAMED)
    content = {
        "model": {"name": "digits_cnn"},
        "weights": "/home/me/secret/digits.pth",
        "data": {"name": "digits", "score": "val"},
        "budget": {"fraction": 0.5},
    }
    config = parse_config(content, place / "run.yml", files=False).model_dump(mode="json")
    RunFolder(place).write_metrics(
        {
            "original": {"top1": 0.98, "macs": 1000, "params": 700, "latency_ms": 2, "images": 287},
            "finetune": {"top1": 0.97, "macs": 450, "params": 300, "latency_ms": 1.5},
        },
        config=config,
        timing={
            "runtime": "torch 2.9",
            "device": "a processor",
            "threads": 1,
            "input": [1, 1, 8, 8],
        },
        versions={"Python": "3.11", "nni-haloc": "0.2.0"},
    )
    (place / "search").mkdir()
    (place / "search" / "checkpoint.ckpt").write_bytes(b"state")
    (place / "log.txt").write_text("/home/me")
    return place


def test_a_network_goes_to_the_hub_and_comes_back(server, folder, digits, tmp_path):
    at = {"endpoint": server.address, "token": "hf_secret"}
    address = nni_haloc.push_to_hub(folder, "me/small", private=True, license="mit", **at)
    assert address == f"{server.address}/me/small/commit/{server.sha('me/small')}"
    assert server.tokens == {"Bearer hf_secret"}
    assert {*server.repositories["me/small"]} == {*hub.FILES, "README.md"} - {"costs.json"}
    assert not any(b"/home/me" in content for content in server.repositories["me/small"].values())
    expected = nni_haloc.load(folder)(X)
    cache = {"cache_dir": tmp_path / "cache"}
    network = nni_haloc.from_pretrained("me/small", **at, **cache)
    torch.testing.assert_close(network(X), expected, rtol=0, atol=0)
    assert not network.training
    assert {*server.fetched} == {*server.repositories["me/small"]} - {"README.md"}
    server.fetched.clear()
    again = nni_haloc.from_pretrained("me/small", digits, local_files_only=True, **cache)
    torch.testing.assert_close(again(X), expected, rtol=0, atol=0)
    assert not server.fetched


def test_a_second_push_leaves_nothing_of_the_first_network(server, folder, digits, tmp_path):
    nni_haloc.push_to_hub(folder, "me/small", endpoint=server.address, token="t")
    server.repositories["me/small"]["notes.txt"] = b"mine"
    other = tmp_path / "other"
    save(other, compress(digits, PLAN), PLAN)
    nni_haloc.push_to_hub(other, "me/small", endpoint=server.address, token="t")
    there = {*server.repositories["me/small"]}
    assert there == {"README.md", "ranks.json", "weights.safetensors", "notes.txt"}


def test_what_the_hub_refuses_is_one_line(server, folder, tmp_path):
    at = {"endpoint": server.address, "token": "t"}
    with pytest.raises(
        HalocError, match=r"^others/small: is the name right.*don't have the rights"
    ):
        nni_haloc.push_to_hub(folder, "others/small", **at)
    with pytest.raises(HalocError, match=r"^me/nothing: is the name right.*hf auth login") as error:
        nni_haloc.from_pretrained("me/nothing", cache_dir=tmp_path, **at)
    assert "\n" not in str(error.value)
    with pytest.raises(HalocError, match=r"^me/a name: .*[Rr]epo id"):
        nni_haloc.push_to_hub(folder, "me/a name", **at)
    server.shutdown()
    server.server_close()
    with pytest.raises(HalocError, match="^me/small: "):
        nni_haloc.push_to_hub(folder, "me/small", **at)
    with pytest.raises(SettingsError, match=r"no such folder; expected that of"):
        nni_haloc.push_to_hub(tmp_path / "empty", "me/small", **at)


def test_a_folder_is_loaded_without_a_hub(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    network = nni_haloc.from_pretrained(folder)
    torch.testing.assert_close(network(X), nni_haloc.load(folder)(X), rtol=0, atol=0)
    line = r"hub: needs the package huggingface_hub.*\(pip install 'nni-haloc\[hub\]'\)$"
    with pytest.raises(MissingPackage, match=line):
        nni_haloc.from_pretrained("me/small")
    with pytest.raises(MissingPackage, match=line):
        nni_haloc.push_to_hub(folder, "me/small")


@pytest.mark.parametrize("source", ["./gone", "/gone", "~/gone", "gone", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_name_is_no_such_folder(source):
    with pytest.raises(FileNotFoundError, match="no such folder; expected a folder or user/name"):
        nni_haloc.from_pretrained(source)


def test_code_that_a_folder_names_is_run_only_where_that_is_allowed(digits, tmp_path, monkeypatch):
    (tmp_path / "their_code.py").write_text(
        "from nni_haloc.inputs.models import build_model\ncalled = []\n\n\n"
        "def make():\n    called.append(1)\n    return build_model('digits_cnn')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    save(tmp_path / "run", compress(digits, PLAN), PLAN, {"name": "their_code:make"})
    for load in (nni_haloc.load, nni_haloc.from_pretrained):
        with pytest.raises(
            ValueError, match=r"code of your own; pass load\(folder, model\), or factories=True"
        ):
            load(tmp_path / "run")
        assert "their_code" not in sys.modules
        expected = load(tmp_path / "run", digits)(X)
        found = load(tmp_path / "run", factories=True)(X)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert sys.modules.pop("their_code").called == [1]


def header_and_text(card):
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_has_the_measured_figures_the_device_and_the_command(folder):
    header, text = header_and_text(model_card(folder, "me/small", "mit"))
    assert header["library_name"] == "nni-haloc"
    assert header["license"] == "mit"
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.97
    assert result["dataset"]["split"] == "validation"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["top-1", "98.00 %", "97.00 %", "-1.00 points"] in rows
    assert ["latency", "2 ms", "1.5 ms", "-25.0 %"] in rows
    assert ["MACs", "1 k", "450", "-55.0 %"] in rows
    assert ["parameters", "700", "300", "-57.1 %"] in rows
    assert "450 of 1 k macs (45.0 %), budget 500" in text
    assert "runtime torch 2.9, device a processor, threads 1, input [1, 1, 8, 8]" in text
    assert "Top-1 is of 287 validation images." in text
    assert 'nni_haloc.from_pretrained("me/small")\n' in text
    assert "haloc run run.yml --out FOLDER" in text


def test_the_settings_of_the_card_are_the_runs(folder):
    _, text = header_and_text(model_card(folder))
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["weights"] == "digits.pth"
    again = parse_config(settings, folder / "run.yml", files=False).model_dump(mode="json")
    assert without_folders(again) == without_folders(RunFolder(folder).read_metrics()["config"])


def test_a_stages_card_has_the_original_beside_it(folder, digits):
    stage = RunFolder(folder / "pruned")
    save(stage.path, compress(digits, PLAN), PLAN, NAMED)
    stage.write_metrics({"prune": {"top1": 0.5, "macs": 100}})
    _, text = header_and_text(model_card(stage.path))
    assert "| top-1 | 98.00 % | 50.00 % | -48.00 points |" in text


def test_a_readme_of_ones_own_is_the_card(server, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    nni_haloc.push_to_hub(folder, "me/small", endpoint=server.address, token="t")
    assert server.repositories["me/small"]["README.md"].endswith(b"# Mine\n")


def test_a_result_is_pushed_with_its_call_and_by_name_loads_without_the_network(
    server, digits, tmp_path
):
    images = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10), 16)
    result = nni_haloc.compress_model(digits, images, metric="macs", budget=0.6, epochs=0)
    call = "compress_model(model, train_loader, budget=0.6, metric='macs', epochs=0)"
    assert result.call == call
    at = {"endpoint": server.address, "token": "t"}
    result.push_to_hub("me/named", "digits_cnn", license="mit", **at)
    result.push_to_hub("me/plain", **at)
    _, text = header_and_text(server.repositories["me/named"]["README.md"].decode())
    assert f"result = {call}\n" in text
    assert "The network `digits_cnn`, with low-rank layers" in text
    assert f"device {result.timing['device']}" in text
    _, plain = header_and_text(server.repositories["me/plain"]["README.md"].decode())
    assert 'from_pretrained("me/plain", model)' in plain
    for name, model in {"named": None, "plain": digits}.items():
        network = nni_haloc.from_pretrained(f"me/{name}", model, cache_dir=tmp_path, **at)
        torch.testing.assert_close(network(X), result.model(X), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="pass the original network"):
        nni_haloc.from_pretrained("me/plain", cache_dir=tmp_path, **at)
    with pytest.raises(ValueError, match="name: expected the network that was compressed"):
        result.save(tmp_path / "wrong", "resnet20")
    assert not (tmp_path / "wrong").exists()


def test_the_hubs_package_and_nni_agree_on_filelock():
    own = [Requirement(text) for name in ("nni", "huggingface_hub") for text in requires(name)]
    filelock = [each for each in own if each.name == "filelock"]
    assert len(filelock) == 2
    assert all(each.specifier.contains(version("filelock")) for each in filelock)


def test_a_run_has_all_that_its_card_says(tmp_path):
    changes = {**SETTINGS, "rule": "uniform", "finetune.epochs": 1}
    config = load_config(DIGITS, changes)
    nni_haloc.run(config, tmp_path)
    header, text = header_and_text(model_card(tmp_path, "me/run"))
    figures = RunFolder(tmp_path).read_metrics()["stages"]
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(
        figures["finetune"]["top1"]
    )
    timing = read_json(tmp_path / "metrics.json")["timing"]
    assert timing["threads"] == 1
    assert timing["input"] == [config.cost.batch_size, 1, 8, 8]
    assert f"device {timing['device']}, " in text
    assert "Ranks were chosen by `uniform`" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["rule"] == "uniform"
    assert settings["weights"] == "digits.safetensors"
    assert str(DIGITS.parent) not in text


@pytest.mark.parametrize("place", [".", "pruned"])
def test_a_folder_of_an_earlier_version_has_a_card_too(place):
    old = Path(__file__).parent / "old_run"
    _, text = header_and_text(model_card(old / place))
    assert "| MACs | 1.494 M |" in text
    assert "haloc run run.yml" in text
