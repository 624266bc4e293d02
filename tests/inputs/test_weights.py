"""Checkpoints as training programs write them: what loads is what was saved; the rest is a line."""

import argparse
import collections
import copy
import datetime
import decimal
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from helpers.networks import SmallNet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nni_haloc.inputs.weights import load_weights


def trained(kind=SmallNet, seed=1):
    """A network whose weights no other instance has."""
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for value in model.state_dict().values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.copy_(torch.randn(value.shape))
    return model


def assert_loads(path, saved, model=None):
    """The file's values are the saved ones, to the last digit."""
    model = SmallNet() if model is None else model
    load_weights(model, path)
    theirs = [value for value in saved.state_dict().values() if isinstance(value, torch.Tensor)]
    mine = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    assert len(mine) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def as_bytes(value):
    return value.reshape(-1).view(torch.uint8)


def refusal(path, model=None):
    """The one line that a file is refused with; the model is left as it was."""
    model = trained(seed=5) if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1200
    after = model.state_dict().items()
    assert all(torch.equal(as_bytes(a), as_bytes(before[name])) for name, a in after)
    return message.removeprefix(f"{path}: ")


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def optimizer_of(model):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


SAVED = trained()
STATE = SAVED.state_dict()
OTHER = trained(seed=2).state_dict()
PLAIN = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"), inner=argparse.Namespace(a=[1])),
    "space": types.SimpleNamespace(a=1),
    "best": np.float64(0.5),
    "accuracies": np.arange(3.0),
    "curve": [np.float32(1), np.int64(2), np.bool_(True)],
    "kind": np.dtype("float32"),
    "path": pathlib.PurePosixPath("a/b"),
    "when": datetime.datetime(2020, 1, 2),
    "took": datetime.timedelta(seconds=3),
    "version": torch.torch_version.TorchVersion("2.1.0"),
    "counts": collections.Counter("aab"),
    "meters": collections.defaultdict(list, loss=[1.0]),
    "last": collections.deque([1.0, 2.0], maxlen=5),
    "ordered": collections.OrderedDict(a=1),
    "id": uuid.UUID(int=3),
    "price": decimal.Decimal("1.5"),
    "names": {"a", "b"},
    "frozen": frozenset({1}),
    "steps": range(3),
    "complex": 1 + 2j,
    "bytes": b"abc",
    "big": 2**200,
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "rng": torch.get_rng_state(),
    "numpy rng": np.random.get_state(),
    "loss": torch.tensor(0.25),
}

LAYOUTS = {
    "a state dict": STATE,
    **{f"the key {key}": {key: STATE, "epoch": 3} for key in (
        "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module",
        "params", "weights", "student", "my_best_model",
    )},
    **{f"the prefix {prefix}": prefixed(STATE, prefix) for prefix in (
        "module.", "_orig_mod.", "model.", "backbone.", "net.", "module._orig_mod.",
        "model._orig_mod.", "_forward_module.model.", "some.other.wrapper.",
    )},
    "a moving average alone": {"ema": STATE, "epoch": 1},
    "its other names": {"model_ema": prefixed(STATE, "module.")},
    "timm": {"state_dict": STATE, "state_dict_ema": OTHER, "args": PLAIN["args"]},
    "the average first": {"state_dict_ema": OTHER, "state_dict": STATE},
    "BasicSR": {"params_ema": OTHER, "params": STATE},
    "Lightning": {
        "state_dict": {
            **prefixed(STATE, "model."),
            "criterion.weight": torch.ones(4),
            "train_acc.total": torch.tensor(3),
        },
        "hyper_parameters": {"lr": 0.1, "path": pathlib.Path("x")},
        "callbacks": {"x": {"best": torch.tensor(0.5), "dir": "a"}},
        "epoch": 2,
    },
    "with its average": {**prefixed(STATE, "model."), **prefixed(OTHER, "ema_model.")},
    "an averaged model": AveragedModel(SAVED).state_dict(),
    "two keys deep": {"checkpoint": {"model": {"state_dict": STATE}}},
    "a tuple, with the optimizer": (STATE, optimizer_of(trained())),
    "an optimizer first": {"optimizer": optimizer_of(trained()), "model": STATE},
    "parameters": SAVED.state_dict(keep_vars=True),
    "counted": {**STATE, "total_ops": torch.zeros(1), "norm.total_params": torch.ones(1)},
    "before counts of batches": {k: v for k, v in STATE.items() if "num_batches" not in k},
    "a part compiled": {re.sub("^body", "body._orig_mod", k): v for k, v in STATE.items()},
    "a part in parallel": {re.sub("^body", "body.module", k): v for k, v in STATE.items()},
    "the same twice": {"last": STATE, "best": STATE},
    "shared by keys": {"model": STATE, "state_dict": STATE},
    "plain data": {"model": STATE, **PLAIN},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "former"])
def test_every_layout_loads(tmp_path, layout, zipped):
    path = tmp_path / "weights.pt"
    torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=zipped)
    saved = SAVED
    if "counts of batches" in layout:
        saved = copy.deepcopy(SAVED)
        model = SmallNet()
        for name, value in saved.state_dict().items():
            if "num_batches" in name:
                value.copy_(model.state_dict()[name])
    assert_loads(path, saved)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),  # NumPy 1
        (b"PosixPath", b"WindowsPath"),
        (b"pathlib", b"pathlib._local"),  # Python 3.13
    ],
)
def test_plain_data_of_other_machines_loads(tmp_path, here, there):
    torch.save({"model": STATE, "value": np.float64(1), "path": pathlib.Path("a")}, tmp_path / "w")
    with (
        zipfile.ZipFile(tmp_path / "w") as old,
        zipfile.ZipFile(tmp_path / "w.pt", "w") as new,
    ):
        for name in old.namelist():
            data = old.read(name)
            assert here in data or not name.endswith("data.pkl")
            new.writestr(name, data.replace(here, there) if name.endswith("data.pkl") else data)
    assert_loads(tmp_path / "w.pt", SAVED)


@pytest.mark.parametrize("name", ["w.pt", "w.pth.tar", "w.ckpt", "w.bin", "w", "w.safetensors"])
def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert_loads(tmp_path / name, SAVED)
    if name != "w.safetensors":
        torch.save(STATE, tmp_path / name)
        assert_loads(tmp_path / name, SAVED)


keys = st.one_of(
    st.sampled_from(["state_dict", "model", "ema", "a.b", "", "é"]), st.text(max_size=5)
)
parts = st.sampled_from(["module", "_orig_mod", "model", "net", "stem", "body", "0", "x_y"])


@given(
    where=st.lists(keys, max_size=3),
    prefix=st.lists(parts, max_size=3),
    beside=st.dictionaries(keys, st.sampled_from([1, "a", None, [1.0], torch.ones(2)]), max_size=3),
    former=st.booleans(),
)
@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_keys_and_any_prefix_load(tmp_path, where, prefix, beside, former):
    content = prefixed(STATE, "".join(f"{part}." for part in prefix))
    for key in where:
        content = {**beside, key: content}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not former)
    assert_loads(tmp_path / "w.pt", SAVED)


@given(data=st.data(), prefix=st.sampled_from(["", "module.", "x."]))
@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_a_name_or_shape_that_differs_is_always_refused_by_its_name(tmp_path, data, prefix):
    state = dict(STATE)
    name = data.draw(st.sampled_from([name for name in state if "num_batches" not in name]))
    value = state.pop(name)
    change = data.draw(st.sampled_from(["gone", "renamed", "longer", "flat", "more"]))
    if change == "renamed":
        state[f"{name}2"] = value
    elif change == "longer":
        state[name] = torch.cat([value, value])
    elif change == "flat":
        state[name] = value.reshape(-1, 1, 1)
    elif change == "more":
        state |= {name: value, "another.weight": value}
    torch.save(prefixed(state, prefix), tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert message.startswith("does not fit the model: 1 ")
    assert ("another.weight" if change == "more" else name) in message


class Held(nn.Module):
    """A network inside another one."""

    def __init__(self):
        super().__init__()
        self.net = SmallNet()


@pytest.mark.parametrize("prefix", ["", "net.", "module.", "module.net.", "model.net."])
def test_a_prefix_of_the_models_own_may_be_lacking(tmp_path, prefix):
    torch.save(prefixed(STATE, prefix), tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", SAVED, Held())


def test_a_model_that_is_compiled_in_part_takes_plain_names(tmp_path):
    model = SmallNet()
    model.body = torch.compile(model.body)
    torch.save(STATE, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", SAVED, model)


def test_of_equally_plain_parts_that_fit_none_is_guessed(tmp_path):
    contents = [
        {"student": STATE, "teacher": OTHER},
        {**prefixed(STATE, "encoder_q."), **prefixed(OTHER, "encoder_k.")},
        [STATE, OTHER],
    ]
    for content in contents:
        torch.save(content, tmp_path / "w.pt")
        assert "fit the model; save a file of the one to load" in refusal(tmp_path / "w.pt")


def test_what_is_left_out_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("nni_haloc.utils.log.logger.propagate", True)
    torch.save(LAYOUTS["Lightning"], tmp_path / "w.pt")
    with caplog.at_level("INFO"):
        load_weights(SmallNet(), tmp_path / "w.pt")
        torch.save({"ema": STATE}, tmp_path / "w.pt")
        load_weights(SmallNet(), tmp_path / "w.pt")
    first, second = (record.getMessage() for record in caplog.records)
    assert "took ['state_dict'] model.*; left out names of others, 2 (criterion.weight, " in first
    assert "moving average" in second


def test_a_network_of_one_layer_is_not_found_in_a_larger_one(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    for model in (nn.Linear(12, 4), nn.Sequential(nn.Linear(12, 4))):
        assert "does not fit the model" in refusal(tmp_path / "w.pt", model)
    torch.save(prefixed(nn.Linear(12, 4).state_dict(), "fc."), tmp_path / "w.pt")
    load_weights(nn.Sequential(nn.Linear(12, 4)), tmp_path / "w.pt")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_tied_weights_are_in_a_safetensors_file_once(tmp_path):
    model = trained(Tied)
    save_model(model, str(tmp_path / "w.safetensors"))
    assert_loads(tmp_path / "w.safetensors", model, Tied())


class Extra(nn.Linear):
    """Has a state of its own."""

    def __init__(self):
        super().__init__(3, 2)
        self.extra = {"step": 0}
        self.register_buffer("index", torch.arange(3), persistent=False)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_and_buffers_that_are_no_longer_saved(tmp_path):
    saved, fresh = trained(Extra), Extra()
    saved.extra = {"step": 7}
    torch.save({**saved.state_dict(), "index": torch.arange(3)}, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", saved, fresh)
    assert fresh.extra == {"step": 7}


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_is_converted(tmp_path, kind):
    state = {k: v.to(kind) if v.is_floating_point() else v for k, v in STATE.items()}
    torch.save(state, tmp_path / "w.pt")
    model = SmallNet()
    load_weights(model, tmp_path / "w.pt")
    for name, value in model.state_dict().items():
        expected = STATE[name].numpy() if kind != torch.bfloat16 else STATE[name].bfloat16()
        expected = torch.as_tensor(expected).to(kind).float()
        torch.testing.assert_close(value.float(), expected)


YOUNG = {
    name: getattr(torch, name)
    for name in (
        "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
        "float8_e5m2fnuz", "float8_e8m0fnu", "complex32",
    )
    if hasattr(torch, name)
}  # fmt: skip
"""Numbers that torch's own kinds of storage do not know."""


def with_buffer(kind, values=(1, 2, 4, 8)):
    model = SmallNet()
    numbers = torch.tensor(values, dtype=torch.float32)
    model.register_buffer("extra", numbers.to(kind))
    model.register_buffer("same", model.extra[1:])
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*YOUNG, "complex64", "complex128", "bool", "bfloat16"])
@pytest.mark.parametrize("former", [True, False], ids=["former", "zip"])
def test_buffers_of_every_kind_of_numbers_load_or_are_named(tmp_path, kind, former):
    saved, model = with_buffer(getattr(torch, kind)), with_buffer(getattr(torch, kind), (0,) * 4)
    torch.save(saved.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=not former)
    if former and kind in YOUNG:  # torch itself can't read them
        message = refusal(tmp_path / "w.pt", model)
        assert re.search(f"can't read torch.{kind} from its former format; save .*again", message)
        return
    load_weights(model, tmp_path / "w.pt")
    assert model.extra.dtype == getattr(torch, kind)
    for name in ("extra", "same"):
        found, expected = getattr(model, name), saved.state_dict()[name]
        assert torch.equal(as_bytes(found), as_bytes(expected))


@pytest.mark.parametrize("kind", [kind for kind in YOUNG if kind[:8] in ("float8_e", "complex3")])
@pytest.mark.filterwarnings("ignore")
def test_a_buffer_of_few_bits_that_is_not_finite_is_named(tmp_path, kind):
    values = [1, math.nan, 2, 2]
    torch.save(with_buffer(YOUNG[kind], values).state_dict(), tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", with_buffer(YOUNG[kind]))
    assert "extra: expected finite numbers, found NaN or infinity" in message


UNTYPED = b"ctorch.storage\nUntypedStorage\n"
SIZE = b"\x8a\x05" + (10**11).to_bytes(5, "little")


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


FIRST, LAST = b"(" + text(b"storage"), text(b"0") + text(b"cpu")
MEMORY = {
    "called": UNTYPED + SIZE + b"\x85R",
    "made": UNTYPED + SIZE + b"\x85\x81",
    "called from memory": UNTYPED
    + b"q\0"
    + FIRST
    + b"h\0"
    + LAST
    + b"K\x04tQh\0"
    + SIZE
    + b"\x85R",
    "by the type alone": b"(" + text(b"module") + UNTYPED + LAST + b"K\x04tQ" + SIZE + b"\x85R",
    "as a value": UNTYPED,
    "in a record's place": FIRST + LAST[:6] + UNTYPED + text(b"cpu") + b"K\x04tQ",
    "in a tuple that is no record": FIRST + UNTYPED + LAST + b"K\x04t",
    "in a list": b"]" + UNTYPED + b"a",
    "by an old name": UNTYPED.replace(b"c", b"i", 1),
}
"""Pickles that would call the class of storage, or might, beside the one place that it has."""


@pytest.mark.parametrize("place", MEMORY)
def test_a_storage_stands_only_where_a_record_is_named(tmp_path, place):
    torch.save(STATE, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "w.pt", "w") as other,
    ):
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = b"\x80\x02}" + text(b"x") + MEMORY[place] + b"s."
            other.writestr(name, content)
    found = (
        "torch.storage.UntypedStorage"
        if place != "in a record's place"
        else "a reference to no record"
    )
    assert f"it holds {found}, neither" in refusal(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("record", ["data.pkl", "data/0", "version", "new"])
@pytest.mark.parametrize("change", [str, str.upper, str.title], ids=["same", "capital", "title"])
@pytest.mark.parametrize("first", [True, False])
def test_two_records_of_one_name_are_refused(tmp_path, record, change, first):
    torch.save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    folder = records[0][0].partition("/")[0]
    names = [f"{folder}/{record}", change(f"{folder}/{record}")]
    others = [(names[1], b"other")] if record != "new" else [(name, b"") for name in names]
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name, content in [*others, *records] if first else [*records, *others]:
            archive.writestr(name, content)
    message = refusal(tmp_path / "w.pt")
    assert "expected records of different names, found " in message
    assert all(name in message for name in names)


class Numbered(nn.Module):
    def __init__(self, numbers, kind):
        super().__init__()
        self.register_buffer("numbers", torch.arange(numbers).to(kind))
        self.register_buffer("others", torch.zeros(300))


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint64, torch.float32, torch.int8])
@pytest.mark.parametrize("share", [1, 3, 10**9])
def test_a_record_smaller_than_the_pickle_says_is_not_read_beyond_its_end(tmp_path, kind, share):
    # Of an untyped storage the pickle says the bytes, of others how many numbers.
    torch.save(Numbered(20, kind).state_dict(), tmp_path / "a.pt")
    written = 20 * kind.itemsize if kind in YOUNG.values() else 20
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "w.pt", "w") as other,
    ):
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                size = b"K" + bytes([written]) + b"t"
                assert content.count(size) == 1
                more = (share * written + share // 2).to_bytes(8, "little")
                content = content.replace(size, b"\x8a\x08" + more + b"t")
                content = content.replace(
                    b"K\x14\x85", b"K" + bytes([20 + share // 2 % 9]) + b"\x85"
                )
            other.writestr(name, content)
    if share == 1:
        load_weights(Numbered(20, kind), tmp_path / "w.pt")
        return
    message = refusal(tmp_path / "w.pt", Numbered(20, kind))
    assert f"record 0 has {20 * kind.itemsize} bytes, expected " in message


def normalised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))


def test_modules_that_rename_what_they_load_are_asked(tmp_path):
    """Weight normalisation had other names before torch 2.0."""
    saved = trained(normalised)
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in saved.state_dict().items()
    }
    assert "0.weight_g" in old
    torch.save({"state_dict": prefixed(old, "module.")}, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", saved, normalised())


def test_a_module_that_asks_for_its_version_gets_it(tmp_path):
    def make():
        return torchvision.models.mnasnet0_5(weights=None, num_classes=3)

    saved = trained(make)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors", saved, make())
    torch.save(nn.DataParallel(saved).state_dict(), tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", saved, make())


def test_old_names_of_densenets(tmp_path):
    def make():
        return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)

    saved = trained(make)
    old = {
        re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): value
        for name, value in saved.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(prefixed(old, "module."), tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", saved, make())


class Headed(nn.Module):
    """A network with torchvision's auxiliary heads, if it is built with them."""

    def __init__(self, heads):
        super().__init__()
        self.body = SmallNet()
        self.aux1 = nn.Linear(3, 2) if heads else None
        self.AuxLogits = nn.Sequential(nn.Linear(3, 2)) if heads else None


@pytest.mark.parametrize("inside", [False, True])
def test_auxiliary_heads_may_be_on_either_side_alone(tmp_path, caplog, monkeypatch, inside):
    monkeypatch.setattr("nni_haloc.utils.log.logger.propagate", True)
    with_heads, without = Headed(True), Headed(False)
    prefix = "module." if inside else ""
    with caplog.at_level("INFO"):
        torch.save(prefixed(with_heads.state_dict(), prefix), tmp_path / "w.pt")
        load_weights(without, tmp_path / "w.pt")
        assert {r.levelname for r in caplog.records} == {"INFO"}
        caplog.clear()
        torch.save(prefixed(trained(lambda: Headed(False)).state_dict(), prefix), tmp_path / "w.pt")
        before = with_heads.aux1.weight.clone()
        load_weights(with_heads, tmp_path / "w.pt")
    assert torch.equal(with_heads.aux1.weight, before)
    warned = sorted(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert len(warned) == 2
    assert "aux_logits: false" in warned[0]
    half = {k: v for k, v in with_heads.state_dict().items() if k != "aux1.bias"}
    torch.save(half, tmp_path / "w.pt")
    assert "aux1.bias" in refusal(tmp_path / "w.pt", with_heads)


def test_what_does_not_fit_names_the_prefix_and_the_remedy(tmp_path):
    state = {name: value for name, value in STATE.items() if name != "head.bias"}
    torch.save({"state_dict": prefixed(state, "module.backbone.")}, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt") == (
        "does not fit the model: 1 missing in the file: head.bias"
        " (of the file's part ['state_dict'] module.backbone.*);"
        " build the network that the file is of (model.name, model.arguments)"
    )


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*")
def test_a_quantized_tensor_beside_weights_that_do_not_fit_is_one_line(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)
    torch.save({**STATE, "q": quantized}, tmp_path / "w.pt")
    assert "1 not in the model: q" in refusal(tmp_path / "w.pt")


def test_another_number_of_classes_names_the_layer_and_both_shapes(tmp_path):
    torch.save(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", torchvision.models.squeezenet1_1(num_classes=3))
    assert "classifier.1.weight (7x512x1x1 in the file, 3x512x1x1 in the model)" in message
    assert message.endswith("built for 3? Then set model.arguments, such as num_classes: 7")


class Unknown:
    """A class of somebody's own."""


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO())


def zipped(path, compression=zipfile.ZIP_STORED, **files):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)


def compressed_again(path):
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def flipped(path):
    torch.save(STATE, path)
    data = bytearray(path.read_bytes())
    place = data.find(STATE["stem.weight"].numpy().tobytes())
    data[place + 5] ^= 1
    path.write_bytes(data)


def cut(save, share):
    def write(path):
        save(path)
        data = path.read_bytes()
        path.write_bytes(data[: round(share * len(data))])

    return write


def former(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def exported(path):
    program = torch.export.export(SAVED, (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, path)


FILES = {
    "a whole network": (lambda p: torch.save(SAVED, p), "helpers.networks.SmallNet.*state_dict"),
    "one under a key": (lambda p: torch.save({"model": SAVED}, p), "helpers.networks.SmallNet"),
    "one of the former format": (lambda p: former(SAVED, p), "helpers.networks.SmallNet"),
    "another class": (
        lambda p: torch.save({"model": STATE, "x": Unknown()}, p),
        r"test_weights.Unknown, neither a tensor nor plain data; save the weights alone: ",
    ),
    "a schedule": (
        lambda p: torch.save({"s": torch.optim.lr_scheduler.LambdaLR, "model": STATE}, p),
        "torch.optim.lr_scheduler.LambdaLR",
    ),
    "a number of bytes": (lambda p: torch.save({"x": bytearray(3), **STATE}, p), "bytearray"),
    "pickle protocol 4": (lambda p: torch.save(STATE, p, pickle_protocol=4), "pickle protocol 4"),
    "pickled": (lambda p: p.write_bytes(__import__("pickle").dumps({"a": 1})), "did not write"),
    "TorchScript": (
        lambda p: torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), str(p)),
        r"TorchScript.*torch.jit.load\(FILE\)\.state_dict\(\)",
    ),
    "torch.export": (exported, r"torch\.export; save its weights alone: "),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), r"NumPy arrays \(\.npz\)"),
    "npy": (lambda p: np.save(p.open("wb"), np.ones(2)), "NumPy array"),
    "h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "keras": (lambda p: zipped(p, config__json="{}", model__weights__h5=b"x"), "Keras"),
    "onnx": (lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99)), "ONNX"),
    "tflite": (lambda p: p.write_bytes(b"\x1c\0\0\0TFL3" + bytes(99)), "TensorFlow Lite"),
    "gguf": (lambda p: p.write_bytes(b"GGUF\x03" + bytes(99)), "GGUF"),
    "a web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>404"), "web page.*download"),
    "S3's error": (lambda p: p.write_text("<?xml version='1.0'?><Error/>"), "XML.*download"),
    "text": (lambda p: p.write_text("Not Found"), "text .'Not Found'"),
    "an index": (lambda p: p.write_text(json.dumps({"weight_map": {}})), "text"),
    "Git LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1"),
        "pointer of Git LFS.*git lfs pull",
    ),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "noise": (lambda p: p.write_bytes(bytes(range(255, 0, -1)) * 9), "not a file of weights"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "gzip.*unpack"),
    "tar": (tar, "tar archive; unpack"),
    "a zip archive": (lambda p: zipped(p, weights__pth=b"x"), r"did not write \(weights\.pth\)"),
    "compressed again": (compressed_again, "packed again"),
    "an empty zip archive": (lambda p: zipped(p), "empty zip"),
    "a bit flipped": (flipped, "damaged"),
    "cut in its values": (cut(lambda p: torch.save(STATE, p), 0.5), "damaged or cut off.*again"),
    "cut at its end": (cut(lambda p: torch.save(STATE, p), 0.99), "damaged or cut off"),
    "the former format, cut": (cut(lambda p: former(STATE, p), 0.7), "damaged or cut off"),
    "safetensors, cut": (cut(lambda p: save_file(STATE, p), 0.5), "damaged or cut off"),
    "safetensors, cut early": (cut(lambda p: save_file(STATE, p), 0.02), "cut off|not a file"),
    "a folder": (lambda p: p.mkdir(), "found a folder"),
    "a tensor": (lambda p: torch.save(torch.ones(3), p), "expected a state dict .*found a tensor"),
    "no tensors": (lambda p: torch.save({"a": 1, "b": {}}, p), "found the keys a, b; save"),
    "an empty dict": (lambda p: torch.save({}, p), "an empty dict"),
    "sparse": (lambda p: torch.save({**STATE, "head.weight": torch.eye(4, 12).to_sparse()}, p),
               "head.weight: expected a dense tensor, found one that is sparse"),
    "quantized": (
        lambda p: torch.save({**STATE, "head.weight": torch.quantize_per_tensor(
            STATE["head.weight"], 0.1, 0, torch.qint8)}, p),
        "head.weight: .*quantized",
    ),
    "without values": (
        lambda p: torch.save({k: v.to("meta") for k, v in STATE.items()}, p), "without values"
    ),
    "integers": (
        lambda p: torch.save({**STATE, "head.weight": STATE["head.weight"].to(torch.int8)}, p),
        "head.weight: expected numbers like torch.float32, found torch.int8",
    ),
    "complex numbers": (
        lambda p: torch.save({**STATE, "head.weight": STATE["head.weight"] + 0j}, p),
        "head.weight: expected numbers like torch.float32, found torch.complex64",
    ),
    "beyond float32": (
        lambda p: torch.save({**STATE, "head.weight": STATE["head.weight"].double() * 1e300}, p),
        "head.weight: expected finite numbers",
    ),
    "a number for a tensor": (
        lambda p: torch.save({**STATE, "head.weight": 1.0}, p), "head.weight .float in the file"
    ),
    "an odd name": (
        lambda p: torch.save({**STATE, "a\nb\x1b[31m": torch.ones(1)}, p), r"a\\nb\\x1b"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_what_cannot_be_loaded_is_one_line_that_says_why(tmp_path, kind):
    write, expected = FILES[kind]
    write(tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert re.search(expected, message), message


HOSTILE = """
import resource, sys, torch
from torch import nn
from nni_haloc.inputs.weights import load_weights

def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
wide = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 8))  # 17 MB
lazy = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 8))
state = model.state_dict()
huge = torch.zeros(1).expand(10**11)
contents = {
    "one": {**state, "0.bias": huge}, "beside": {"a": huge, **state}, "all": {"0.bias": huge},
    "two": {**state, "0.weight": torch.zeros(1).expand(10**6, 10**6)},
}
made = {"lazy": (lazy, {**state, "0.weight": torch.zeros(1).expand(64, 10**9)})}
made |= {name: (model, content) for name, content in contents.items()}
moments = {i: {"exp_avg": p + 1, "exp_avg_sq": p * 2} for i, p in enumerate(wide.parameters())}
files, folder = {}, sys.argv[1]
for zipped in (True, False):
    for name, (network, content) in made.items():
        files[f"{folder}/{name}-{zipped}.pt"] = network
        torch.save(content, f"{folder}/{name}-{zipped}.pt", _use_new_zipfile_serialization=zipped)
    content = {"model": wide.state_dict(), "optimizer": {"state": moments}}
    torch.save(content, f"{folder}/large-{zipped}.pt", _use_new_zipfile_serialization=zipped)
torch.save({"x": bytearray(1), **state}, f"{folder}/zeros.pt", _use_new_zipfile_serialization=False)
files[f"{folder}/zeros.pt"] = model
del content, moments
wide = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 8))
resource.setrlimit(resource.RLIMIT_AS, (size() + 2**27, resource.RLIM_INFINITY))
for file, network in files.items():
    try:
        load_weights(network, file)
    except ValueError as error:
        assert "\\n" not in str(error)
        print(str(error).removeprefix(folder))
own = sum(p.nbytes for p in wide.parameters())
for zipped in (True, False):
    # The file is 3 times the network, and is mapped or read; beside it there is room for one more.
    resource.setrlimit(resource.RLIMIT_AS, (size() + 4 * own, resource.RLIM_INFINITY))
    load_weights(wide, f"{folder}/large-{zipped}.pt")
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_shapes_are_compared_before_memory_is_taken(tmp_path):
    # Each of glibc's arenas reserves 64 MiB of addresses, whenever a further thread allocates.
    own = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)], capture_output=True, text=True, env=own
    )
    assert done.returncode == 0, done.stderr
    *refused, last = done.stdout.splitlines()
    assert last == "done"
    assert len(refused) == 11
    assert all("does not fit the model" in line or "bytearray" in line for line in refused), refused


def test_a_text_in_the_place_of_weights_is_quoted_by_its_first_line(tmp_path):
    (tmp_path / "w.pt").write_text("import torch\nfrom torch import nn\n")
    with pytest.raises(ValueError, match=r"w\.pt: the file is text \('import torch'\); expected"):
        load_weights(SmallNet(), tmp_path / "w.pt")
