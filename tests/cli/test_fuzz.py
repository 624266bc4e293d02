"""Hostile files raise the project's own errors, on one line that names the file; none runs code.

Some dozens of cases each; ``HALOC_SLOW=1`` makes it more than ten thousand in all.
"""

import argparse
import copy
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.paths import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from nni_haloc.costs.device.measured_file import read_measurements, subject
from nni_haloc.costs.device.spec import Specification
from nni_haloc.costs.table import CostTable
from nni_haloc.experiments.check import check_experiment
from nni_haloc.inputs.classes import class_names
from nni_haloc.inputs.config import load_config, load_space
from nni_haloc.inputs.weights import load_weights
from nni_haloc.inputs.yaml_files import read_search_space
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.saved import load
from nni_haloc.training import checkpoint
from nni_haloc.training import curves as history
from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.files import read_json

DIGITS = ROOT / "examples" / "digits"
CASES = 700 if os.environ.get("HALOC_SLOW") else 60
FUZZED = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)

odd = st.sampled_from(
    [
        "",
        "..",
        "../../x",
        "/etc/passwd",
        "\0",
        "a\nb",
        "\ud800".encode("utf-8", "replace").decode(),
        "dense",
        "r0",
        "r16x",
        "1e3",
        "é" * 300,
    ]
)
numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**64, 10**400, -1, 0.5, 1e308, float("nan"), float("inf")]),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, odd, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(odd, st.text(max_size=8)), inner, max_size=3),
    ),
    max_leaves=8,
)


def places(content, here=()):
    """The paths of all values in a document."""
    yield here
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*here, key))


@st.composite
def changed(draw, valid):
    """A valid document with one to three of its values replaced, taken out, or put in."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(
            st.sampled_from([place for place in places(content) if place] or [(None,)])
        )
        home = content
        for key in way:
            home = home[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if last is None:
            return draw(values)
        if what == "remove":
            del home[last]
        elif what == "add" and isinstance(home, dict):
            home[draw(st.one_of(odd, st.text(max_size=8)))] = draw(values)
        else:
            home[last] = draw(values)
    return content


@st.composite
def damaged(draw, valid):
    """Bytes with some of them changed, cut off, or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["flip", "cut", "insert"]))
        if what == "flip" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[at:]
        else:
            data[at:at] = draw(st.binary(max_size=9))
    return bytes(data)


def refused_or_read(read, file, errors=(ValueError, OSError)):
    """What ``read`` gives, or None where it refuses the file, on one line that names it."""
    found, message = None, ""
    try:
        found = read(file)
    except errors as error:
        message = str(error)
        assert_one_line(message, file)
    return found


def assert_one_line(message, file):
    assert "\n" not in message, message
    assert str(getattr(file, "parent", file)) in message, (
        message
    )  # or another file there, which this one names
    assert len(message) < 2000


@pytest.fixture(autouse=True)
def nothing_else_is_written(tmp_path, monkeypatch):
    """A case that leaves a file beside its own fails."""
    (tmp_path / "case").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("case", "elsewhere")] == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


RUN = yaml.safe_load((DIGITS / "run.yml").read_text()) | {
    "weights": str(DIGITS / "digits.safetensors"),
    "rank_space": {
        "step": 4,
        "dense": True,
        "exclude": ["fc*"],
        "pin": {"conv1": 4},
        "kinds": ["conv"],
    },
    "trainer": {"devices": 1},
    "recalibration_batches": 10,
    "preset": None,
}


@given(changed(RUN))
@FUZZED
def test_settings(tmp_path, content):
    file = tmp_path / "case" / "run.yml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="replace")
    refused_or_read(load_config, file, (HalocError,))


@given(damaged((DIGITS / "run.yml").read_bytes()))
@FUZZED
def test_settings_that_are_damaged(tmp_path, data):
    file = tmp_path / "case" / "run.yml"
    file.write_bytes(data)
    refused_or_read(load_config, file, (HalocError,))


@given(changed(RUN["rank_space"]))
@FUZZED
def test_a_rank_space(tmp_path, content):
    file = tmp_path / "case" / "space.yml"
    file.write_text(yaml.safe_dump(content))
    refused_or_read(load_space, file, (HalocError,))


lines = st.lists(
    st.sampled_from(
        [
            *(DIGITS / "run.yml").read_text().splitlines(),
            "search: {epochs: 2, epochs: 2}",
            "  epochs: 1e3x",
            "x: &x {lam: 2}",
            "  <<: *x",
            "seed: " + "9" * 5000,
            "threads: 0x" + "f" * 400,
            "budget: 2026-13-45",
            "---",
            "\t- a",
            "  lr: .nan",
            "  lam: !!binary YQ==",
            "rank_space: [",
            "? {a: 1}",
            "%YAML 1.1",
            "a: \0",
        ]
    ),
    max_size=25,
)


@given(lines)
@FUZZED
def test_settings_of_any_lines(tmp_path, lines):
    file = tmp_path / "case" / "run.yml"
    file.write_text("\n".join(lines))
    refused_or_read(load_config, file, (HalocError,))


EXPERIMENT = yaml.safe_load((DIGITS / "haloc.yml").read_text())


@given(changed(EXPERIMENT))
@example(EXPERIMENT | {"searchSpace": {}, "trainingService": [None]})
@FUZZED
def test_an_experiment(tmp_path, content):
    file = tmp_path / "case" / "haloc.yml"
    file.write_text(yaml.safe_dump(content))
    file.with_name("run.yml").write_text(yaml.safe_dump(RUN))
    refused_or_read(check_experiment, file, (HalocError,))


PLAN = {
    "version": 1,
    "ranks": {"stem": [4, 2], "body.0": "dense", "point": [3]},
    "chosen_by": {"metric": "macs", "cost": 3},
}


@given(content=changed(PLAN))
@FUZZED
def test_a_plan(tmp_path, net, content):
    file = tmp_path / "case" / "ranks.json"
    file.write_text(json.dumps(content))
    plan = refused_or_read(RankPlan.load, file)
    if plan is not None:
        refused_or_read(lambda _: restructure(net, plan), "the plan's")


LAYERS = {
    "version": 1,
    "layers": {
        "stem": {"kind": "conv", "sensitivities": {"dense": 0.0, "r4x2": 0.5, "r2": None}},
        "point": {"kind": "pointwise", "pinned": True, "sensitivities": {"r3": 0.1}},
        "head": {"left_alone": "frozen"},
    },
}


@given(content=changed(LAYERS))
@FUZZED
def test_what_is_known_of_layers(tmp_path, content):
    file = tmp_path / "case" / "layers.json"
    file.write_text(json.dumps(content))
    known = refused_or_read(KnownLayers.load, file)
    if known is not None:
        known.save(file)
        assert KnownLayers.load(file) == known


@given(data=damaged("cat\ndog\nétoile\n".encode()))
@FUZZED
def test_a_file_of_classes(tmp_path, data):
    file = tmp_path / "case" / "classes.txt"
    file.write_bytes(data)
    names = refused_or_read(class_names, file)
    assert names is None or len(set(names)) == len(names) > 0


COSTS = {
    "version": 1, "metric": "latency_ms", "unit": "milliseconds", "fixed": 1.0, "network": [3.0],
    "identity": {"where": "alone", "geometry": {"stem": "0"}},
    "costs": {"stem": {"dense": 2.0, "r4": 1.0}}, "spread": {"stem": {"dense": 0.1}},
    "runs": {"stem": {"dense": [2.0], "r4": [1.0, 2.0]}},
}  # fmt: skip


@given(content=changed(COSTS))
@FUZZED
def test_a_cost_table(tmp_path, content):
    file = tmp_path / "case" / "costs.json"
    file.write_text(json.dumps(content))
    table = refused_or_read(CostTable.load, file)
    if table is not None:
        assert table.original > 0
    refused_or_read(
        lambda path: read_measurements(path, {"where": "alone", "geometry": {"stem": "0"}}), file
    )


@given(data=damaged(b"layer,candidate,latency_ms\nstem,dense,2.0\nstem,r4,1.5\nnetwork,,3.5\n"))
@FUZZED
def test_a_table_of_ones_own(tmp_path, data):
    file = tmp_path / "case" / "costs.csv"
    file.write_bytes(data)
    refused_or_read(CostTable.load, file)


LAYER = {
    "kind": "conv",
    "in_channels": 3,
    "out_channels": 8,
    "shapes": [[1, 3, 8, 8]],
    "bias": True,
    "kernel": [3, 3],
    "padding": [1, 1],
}
SPEC = {
    "version": 1, "model": "net", "input": [1, 3, 8, 8], "program": None,
    "layers": {"stem": {"dense": 0, "r4": 1}},
    "entries": [
        {"layer": LAYER, "rank": None, "onnx": None},
        {"layer": LAYER, "rank": [4, 4], "onnx": "AAAA"},
    ],
}  # fmt: skip


@given(content=changed(SPEC))
@FUZZED
def test_a_specification(tmp_path, content):
    file = tmp_path / "case" / "spec.json"
    file.write_text(json.dumps(content))
    spec = refused_or_read(Specification.load, file)
    if spec is not None:
        subject(spec)


@given(
    data=damaged(
        b"iteration,train_loss,approach_loss,expected_cost,expected_params\n0,2.3,0.1,300,40\n1,2.2,0.1,290,39\n"
    )
)
@FUZZED
def test_a_history(tmp_path, data):
    file = tmp_path / "case" / "history.csv"
    file.write_bytes(data)
    refused_or_read(history.read, file, (HalocError,))


def torch_file(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


LINEAR = nn.Linear(3, 2).state_dict()
TRAINING = {"model": LINEAR, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}


@pytest.mark.parametrize(
    ("suffix", "valid"),
    [
        (".safetensors", save(LINEAR)),
        (".pt", torch_file(LINEAR)),
        (".th", torch_file(TRAINING, zipped=False)),
        (".pth", pickle.dumps([1])),
    ],
    ids=["safetensors", "zip", "former", "pickle"],
)
@given(data=st.data())
@FUZZED
def test_weights(tmp_path, suffix, valid, data):
    file = tmp_path / "case" / f"weights{suffix}"
    file.write_bytes(data.draw(damaged(valid)))
    refused_or_read(lambda path: load_weights(nn.Linear(3, 2), path), file)


def with_pickle(archive, data):
    """A file of torch's with another pickle in it, and right check sums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


def pickle_of(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


@given(data=damaged(pickle_of(torch_file(TRAINING))))
@FUZZED
def test_weights_whose_pickle_is_damaged(tmp_path, data):
    file = tmp_path / "case" / "weights.pt"
    file.write_bytes(with_pickle(torch_file(TRAINING), data))
    refused_or_read(lambda path: load_weights(nn.Linear(3, 2), path), file)


@given(content=changed({"state_dict": {"weight": [1.0], "bias": {"x": 1}}}))
@FUZZED
def test_weights_that_are_something_else(tmp_path, content):
    file = tmp_path / "case" / "weights.pt"
    file.write_bytes(torch_file(content))
    assert refused_or_read(lambda path: load_weights(nn.Linear(3, 2), path), file) is None


LAYOUT = {
    "state_dict": {"module.weight": "weight", "module.bias": "bias", "criterion.alpha": "bias"},
    "ema": {"weight": "bias", "bias": "weight"},
    "epoch": 3,
}


def with_tensors(content):
    if isinstance(content, dict):
        return {key: with_tensors(value) for key, value in content.items()}
    return LINEAR.get(content, content) if isinstance(content, str) else content


@given(content=changed(LAYOUT))
@FUZZED
def test_weights_in_a_changed_layout(tmp_path, content):
    """What is loaded is what was saved under those names; all else is refused."""
    file, layer = tmp_path / "case" / "weights.pt", nn.Linear(3, 2)
    file.write_bytes(torch_file(with_tensors(content)))
    before = copy.deepcopy(layer.state_dict())
    refused_or_read(lambda path: load_weights(layer, path), file)
    found = layer.state_dict()
    for expected in (before, LINEAR):
        if all(torch.equal(found[name], expected[name]) for name in found):
            return
    raise AssertionError(content)


@given(content=changed({"name": "digits_cnn", "arguments": {"classes": 10}}))
@FUZZED
def test_a_models_name(tmp_path, content):
    folder = tmp_path / "case"
    (folder / "model.json").write_text(json.dumps(content))
    (folder / "ranks.json").write_text(json.dumps({"version": 1, "ranks": {}, "chosen_by": {}}))
    (folder / "weights.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    assert refused_or_read(load, folder) is None


@given(data=damaged(torch_file({"nni_haloc": {"facts": {"identity": {}}}, "epoch": 1})))
@FUZZED
def test_a_checkpoint(tmp_path, data):
    file = tmp_path / "case" / "checkpoint.ckpt"
    file.write_bytes(data)
    refused_or_read(checkpoint.read, file, (HalocError,))


class Payload:
    """What an unpickler would run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_of_weights_runs(tmp_path, zipped):
    mark = str(tmp_path / "case" / "mark")
    data = pickle.dumps({"weight": Payload(mark)})
    if zipped:
        data = with_pickle(torch_file(LINEAR), data)
    for name in ("weights.pt", "weights.pth", "checkpoint.ckpt"):
        file = tmp_path / "case" / name
        file.write_bytes(data)
        assert refused_or_read(lambda path: load_weights(nn.Linear(3, 2), path), file) is None
        assert refused_or_read(checkpoint.read, file) is None
    assert not Path(mark).exists()


@pytest.mark.parametrize("key", ["a\nb", "a\x1b[31mb", "a\u2028b", "x" * 5000])
def test_a_key_of_any_kind_leaves_the_message_on_one_short_line(tmp_path, key):
    file = tmp_path / "case" / "space.yml"
    file.write_text(yaml.safe_dump({key: 1}), encoding="utf-8")
    with pytest.raises(HalocError, match="unknown key|\\.\\.\\.$") as caught:
        load_space(file)
    assert_one_line(str(caught.value), file)
    assert str(caught.value).isprintable()


LAUGHS = "".join(
    f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.mkdir [mark]",
        f"a: &a [x]\n{LAUGHS}model: {{name: digits_cnn, arguments: {{x: *i}}}}",
        f"a: &a [x]\n{LAUGHS}rank_space: {{pin: {{conv1: *i}}}}",
        "rank_space: {pin: {conv1: &a [*a]}}",
        "rank_space: &a {pin: *a}",
        "[" * 1500,
        "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    ],
    ids=[
        "tag",
        "billion laughs",
        "billion laughs as a rank",
        "list in itself",
        "mapping in itself",
        "open brackets",
        "depth",
    ],
)
def test_yaml_that_is_a_trap(tmp_path, text):
    file = tmp_path / "case" / "run.yml"
    file.write_text(text)
    assert refused_or_read(load_config, file, (HalocError,)) is None
    assert refused_or_read(check_experiment, file, (HalocError,)) is None


METRICS = {
    "version": 2,
    "stages": {"original": {"top1": 0.5, "macs": 10}, "finetune": {"top1": 0.4, "macs": 5}},
    "config": {"model": {"name": "digits_cnn"}}, "parameters": {}, "versions": {"torch": "2"},
}  # fmt: skip
SPACE = {"search.lam": {"_type": "choice", "_value": [1, 2]}}
READERS = {
    "ranks.json": (PLAN, RankPlan.load),
    "costs.json": (COSTS, CostTable.load),
    "spec.json": (SPEC, Specification.load),
    "metrics.json": (METRICS, lambda file: RunFolder(file.parent).metrics()),
    "space.json": (SPACE, read_search_space),
    "any.json": ({"a": {"b": [1, 2.5]}}, read_json),
}
"""Files in JSON: a valid content of each, and what reads it."""


def repeated(draw, content):
    """JSON text in which a key of one object may be there twice."""
    if isinstance(content, list):
        return "[" + ",".join(repeated(draw, item) for item in content) + "]"
    if not isinstance(content, dict):
        return json.dumps(content)
    rows = [f"{json.dumps(key)}: {repeated(draw, value)}" for key, value in content.items()]
    if rows and draw(st.integers(0, 3)) == 0:
        rows.insert(draw(st.integers(0, len(rows))), draw(st.sampled_from(rows)))
    return "{" + ",\n".join(rows) + "}"


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@FUZZED
def test_json_with_keys_twice(tmp_path, name, data):
    """It is read if, and only if, no key is there twice."""
    content, read = READERS[name]
    file = tmp_path / "case" / name
    text = repeated(data.draw, content)
    file.write_text(text)
    found = refused_or_read(read, file)
    assert (found is not None) == (text.count(":") == json.dumps(content).count(":"))


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@FUZZED
def test_json_that_is_damaged(tmp_path, name, data):
    content, read = READERS[name]
    file = tmp_path / "case" / name
    file.write_bytes(data.draw(damaged(json.dumps(content, indent=1).encode())))
    refused_or_read(read, file)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_json_that_is_deep(tmp_path, depth):
    for name, read in (
        ("ranks.json", RankPlan.load),
        ("costs.json", CostTable.load),
        ("spec.json", Specification.load),
    ):
        file = tmp_path / "case" / name
        file.write_text('{"version": 1, "ranks": ' + "[" * depth + "]" * depth + "}")
        assert refused_or_read(read, file) is None
