"""`haloc settings`: every key of the schema with its meaning; an unknown one is told its like."""

import re

import pytest
from helpers.commands import haloc
from helpers.paths import DIGITS
from helpers.schema import FIELDS
from pydantic import create_model

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.reference import find_settings, list_settings, without_links
from nni_haloc.inputs.schema.section import Section
from nni_haloc.inputs.yaml_files import parse_yaml
from nni_haloc.utils.errors import SettingsError

SETTINGS = list(list_settings())


def test_every_key_of_the_schema_is_listed_once_with_a_meaning():
    keys = [setting.key.replace("[]", "") for setting in SETTINGS]
    assert sorted(keys) == sorted(".".join(place) for place in FIELDS)
    for setting in SETTINGS:
        assert setting.meaning.endswith("."), setting.key
        assert setting.values, setting.key


@pytest.mark.parametrize(
    ("key", "values", "default"),
    [
        ("search.lam", "number, 0 or more", "1"),
        ("search.lr", "number above 0", "0.02"),
        ("search.clip", "number above 0 or `null`", "10"),
        ("search.momentum", "number from 0, below 1", "0.9"),
        ("search.min_use", "number from 0 to 1", "0.95"),
        ("prune.sparsity", "number above 0, below 1", "0.3"),
        ("data.share", "number above 0, at most 1", "1"),
        ("data.workers", "integer from 0 to 1,024", "0"),
        ("seed", "integer from 0 to 4,294,967,295", "0"),
        ("threads", "integer from 1 to 1,024", ""),
        ("rank_space.kinds", "list of `conv`, `pointwise` or `linear`", "[conv, pointwise]"),
        (
            "rank_space.decomposition",
            "`warm_hooi`, `hosvd`, `hooi`, `data` or `auto`",
            "auto",
        ),
        (
            "cost.runtime",
            "`torch`, `torch-compile`, `onnxruntime`, `openvino`, `executorch` or `tensorrt`",
            "torch",
        ),
        ("budget.also[].table", "file", ""),
        ("data.in_memory", "`false`, `true` or `device`", "false"),
        ("weights", "file", "required"),
        ("prune", "section", ""),
    ],
)
def test_values_and_defaults_are_said_in_words(key, values, default):
    setting = next(setting for setting in SETTINGS if setting.key == key)
    assert (setting.values, setting.default) == (values, default)


def test_a_stage_of_another_package_explains_its_keys_the_same_way():
    class Rounding(Section):
        """How weights are rounded."""

        bits: int = 8
        """Bits that remain, see [files](reference/files.md)."""

    kind = create_model("Config", __base__=Section, round=(Rounding | None, None))
    section, setting = list_settings(kind)
    assert (section.key, section.meaning) == ("round", "How weights are rounded.")
    assert (setting.key, setting.default) == ("round.bits", "8")
    assert without_links(setting.meaning) == "Bits that remain, see files."


def test_a_section_is_found_with_its_keys():
    found = [setting.key for setting in find_settings("budget", SETTINGS)]
    assert found[:3] == ["budget", "budget.fraction", "budget.absolute"]
    assert [s.key for s in find_settings("search.lam", SETTINGS)] == ["search.lam"]


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("lam", "did you mean search.lam?"),
        ("serch.lam", "did you mean search.lam"),
        ("budget.fractoin", "did you mean budget.fraction"),
        ("search.", "did you mean search"),
        ("rnk_space", "did you mean rank_space"),
        ("", "haloc settings lists all"),
        ("x" * 10_000, "haloc settings lists all"),
        ("\n\x1b[31m", "haloc settings lists all"),
    ],
)
def test_an_unknown_key_is_one_line_with_the_nearest_ones(key, remedy):
    with pytest.raises(SettingsError, match=re.escape(remedy)) as caught:
        find_settings(key, SETTINGS)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_the_command_prints_one_key_or_all(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    one = haloc("settings", "search.lam")
    assert one.returncode == 0
    assert one.stdout.startswith("search.lam: number, 0 or more; default 1\n    How strongly")
    everything = haloc("settings").stdout
    assert one.stdout in everything
    assert max(map(len, everything.splitlines())) <= 60
    assert "](" not in everything


def test_the_command_refuses_an_unknown_key():
    done = haloc("settings", "lam")
    assert done.returncode == 2
    assert done.stderr == "haloc: 'lam': unknown key; did you mean search.lam?\n"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_a_default_that_is_told_is_the_default(setting):
    if setting.default in ("", "required") or "[]" in setting.key:
        return
    section, _, name = setting.key.rpartition(".")
    told = load_config(DIGITS, {setting.key: parse_yaml(setting.default, setting.key)})
    keys = getattr(told, section) if section else told
    assert getattr(keys, name) == type(keys).model_fields[name].default


def test_links_leave_no_remnants_and_names_stay_whole():
    assert without_links("cycles of an array ([predictors](a.md)).") == "cycles of an array."
    assert without_links("one of the [rules](r.md), or none") == "one of the rules, or none"
    text = haloc("settings").stdout
    assert "(predictors)" not in text
    assert "nni-haloc[energy]" in text
    for line in text.splitlines():
        assert not re.search(r"\w-$", line), line
