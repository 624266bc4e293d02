"""Whatever stands in the place of a setting: it is a setting, or one line with its key."""

import copy
import math
import re
from functools import partial
from typing import get_args

import pytest
import torch
import yaml
from helpers.paths import DIGITS
from helpers.schema import FIELDS, fields
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nni_haloc.inputs.config import dump_config, load_config, parse_config, set_dotted
from nni_haloc.inputs.schema.budget import FurtherLimit
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.registry import Registry

KEYS = sorted(FIELDS)
NUMBERS = [
    0, 1, -1, 2**31, 2**32, 2**63, 2**64, 10**400, 10**5000, 1e39, 1e308, 1e-46, 5e-324,
    0.5, -0.0, math.inf, -math.inf, math.nan,
]  # fmt: skip
TEXTS = [
    "", "\0", "a\nb", "\x1b[31m", "é", "\ud800", "~nouser/at/all", "/" + "a" * 5000, "..",
    "cuda:99", "cuda:", "tpu", "meta", "../../x", "9" * 5000, "2026-13-45", "auto", "none",
]  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([n for n in NUMBERS if n < 10**1000 or n != n]),
    st.integers(),
    st.floats(),
    st.sampled_from(TEXTS),
    st.text(max_size=6),
    st.binary(max_size=3),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.fixture(autouse=True, scope="module")
def own_names_alone():
    """Do not look for other packages' names: that takes ten times as long as all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "_entry_points", lambda self: {})
        yield


CONTENT = yaml.safe_load(DIGITS.read_text())


def saved(changes):
    """Read settings as a run has saved them, with one changed: quicker than from their file."""
    content = copy.deepcopy(CONTENT)
    for key, value in changes.items():
        set_dotted(content, key, value)
    return parse_config(content, DIGITS, DIGITS.parent)


def read(key, value, load=saved):
    """Return the settings with one of them changed, or None where that is refused on one line."""
    try:
        config = load({".".join(key): value})
    except SettingsError as error:
        message = str(error)
        assert message.startswith((str(DIGITS), "rank_space: "))  # which may have its own file
        assert message.isprintable()
        assert len(message) <= 1000
        assert any(part in message for part in key)
        return None
    return config


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_any_number_or_text_is_a_setting_or_is_refused_on_one_line(key):
    for value in (*NUMBERS, *TEXTS, None, True, [], {}, b"x", [math.nan], {"a": math.inf}):
        read(key, value)


@given(st.sampled_from(KEYS), values)
@example(("budget",), 10**400)
@example(("rank_space",), "\0")
@example(("rank_space",), "~nouser/at/all")
@example(("rank_space", "pin"), {"a": 10**400})
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_is_a_setting_or_is_refused_on_one_line(key, value):
    config = read(key, value, partial(load_config, DIGITS))
    if config is not None:  # what a run keeps of it is read back
        kept = dump_config(config)
        assert parse_config(yaml.safe_load(yaml.safe_dump(kept)), "kept", files=False)


def kinds_of(field):
    return {field.annotation, *get_args(field.annotation)}


@pytest.mark.parametrize(
    ("key", "kind"),
    [(k, int if int in kinds_of(f) else float) for k, f in fields() if kinds_of(f) & {int, float}],
    ids=str,
)
def test_the_largest_number_of_each_setting_is_one_that_torch_takes(key, kind):
    """A factor is a finite float32 above 0, a count an integer of 32 bits."""
    low, high = 0, 1
    while read(key, kind(high)) is not None and high < 2**120:
        low, high = high, 4 * high
    assert high < 2**120, "there is no bound"
    if kind is int:
        assert key[-1] == "seed" or torch.tensor(low, dtype=torch.int32).item() == low
    else:
        assert torch.tensor(float(low), dtype=torch.float32).isfinite()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("budget", "2026-13-45", "budget.fraction: expected a fraction .*, found '2026-13-45'"),
        ("budget.absolute", 1e300, "budget.absolute: expected a number .*to 1e.18, found 1e.300"),
        ("search.lr", 1e39, "search.lr: expected a number from 1e-12 to 1e.30, found 1e.39"),
        ("search.lr", 1e-46, "search.lr: expected a number from 1e-12 to .*found 1e-46"),
        ("finetune.lr", math.inf, "finetune.lr: .*found inf"),
        ("search.temperature", 5e-324, "search.temperature: .*found 5e-324"),
        ("search.eta", 1e300, "search.eta: .*found 1e.300"),
        ("search.theta", 1e300, "search.theta: .*found 1e.300"),
        ("search.lam", math.nan, "search.lam: .*found nan"),
        ("search.epochs", 1e9, "search.epochs: .*found 1000000000$"),
        ("finetune.epochs", 10**12, "finetune.epochs: .*found 1000000000000"),
        ("data.batch_size", 10**15, "data.batch_size: .*found 1000000000000000"),
        ("data.workers", 10**9, "data.workers: .*found 1000000000"),
        ("data.size", 10**6, "data.size: .*found 1000000"),
        ("cost.batch_size", 2**63, "cost.batch_size: .*found 9223372036854775808"),
        ("threads", 10**14, "threads: .*less than or equal to 1024, found 100000000000000"),
        ("cost.threads", 10**14, "cost.threads: .*found 100000000000000"),
        ("trainer.accelerator", "tpu", "trainer.accelerator: .*'mps', found 'tpu'"),
        ("trainer.devices", 10**6, "trainer.devices: .*found 1000000"),
        ("trainer.num_nodes", 0, "trainer.num_nodes: .*found 0"),
        ("cost.device", "a b", "cost.device: expected the name of a device.*found 'a b'"),
        ("cost.device", "cuda:99999", "cost.device: expected the name of a device"),
        ("cost.device", "", "cost.device: expected the name of a device"),
        ("seed", 10**5000, "seed: .*found a number of more digits than Python writes"),
        ("seed", 2**32, "seed: .*found 4294967296"),
        ("rank_space.step", 10**9, "rank_space.step: expected a positive integer"),
        ("rank_space.pin", {"a": 10**9}, "rank_space.pin.a: expected a rank"),
        ("weights", "~nouser/x", "weights: ~nouser/x: Could not determine home"),
        ("weights", "a" * 300, "weights: 'aaa.*characters.: File name too long"),
        ("rank_space", "~nouser/x", "rank_space: ~nouser/x: Could not determine home"),
        ("rank_space", "a\0b", "rank_space: .*null"),
        ("model.arguments", {"x": math.nan}, "model.arguments: expected plain values"),
        ("model.arguments", {"x": b"x"}, "model.arguments: expected plain values"),
        ("data.arguments", {"x": math.inf}, "data.arguments: expected plain values"),
        ("no.such", 1, "no: unknown key"),
        ("x" * 100_000, 1, "unknown key"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_value_out_of_range_is_one_line_with_its_key(key, value, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_config(DIGITS, {key: value})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 1000


def test_names_of_devices_that_torch_knows_have_the_right_form():
    for name in ("cpu", "cuda", "cuda:1", "mps", "xpu:0", "hpu"):
        assert torch.device(name).type in name
        assert load_config(DIGITS, {"cost.device": name}).cost.device == name


def test_every_number_of_a_further_limit_is_bounded_too():
    for key in FurtherLimit.model_fields.keys() & {"absolute", "fraction"}:
        limit = {"metric": "params", key: 1e300}
        with pytest.raises(SettingsError, match=re.escape(f"budget.also.0.{key}: ")):
            load_config(DIGITS, {"budget.also": [limit]})
