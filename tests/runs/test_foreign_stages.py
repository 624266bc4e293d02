"""Stages of other packages: what they may not do, and what is left when they are gone."""

import json
import logging

import pytest
from helpers.paths import DIGITS

from nni_haloc import SettingsError
from nni_haloc.inputs.config import config_type, dump_config, load_config, parse_config
from nni_haloc.inputs.registries import STAGES
from nni_haloc.inputs.schema.section import Section
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.stages import all_stages, clear
from nni_haloc.runs.stages.stage import NetworkStage


class Digits(Section):
    digits: int = 2


def stage(**attributes):
    """Make a stage's class that does nothing."""
    body = {"name": "toy", "settings": Digits, "apply": lambda *_: None, **attributes}
    return type("Toy", (NetworkStage,), body)


@pytest.fixture
def added():
    before = dict(STAGES._added)
    yield STAGES.register("toy")
    STAGES._added.clear()
    STAGES._added.update(before)


def test_a_stage_without_a_folder_has_one_of_its_name_and_spares_the_runs_own(added, tmp_path):
    added(stage())
    for name in ("toy", "finetuning"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    clear(RunFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("folder", ["", ".", "..", "a/b", "/tmp", "search", "front"])
def test_a_stages_folder_is_one_plain_name_inside_the_runs(folder):
    with pytest.raises(ValueError, match="stage 'toy': expected a folder's plain name"):
        stage(folder=folder)


@pytest.mark.parametrize("name", ["", ".", "..", "a/../..", "/"])
def test_clearing_never_leaves_the_folder(tmp_path, name):
    inside = tmp_path / "run"
    inside.mkdir()
    for folder in (tmp_path, inside):
        (folder / "notes.txt").write_text("mine")
    RunFolder(inside).clear(name)
    assert all((folder / "notes.txt").exists() for folder in (tmp_path, inside))


def test_settings_of_a_stage_that_was_not_used_are_read_without_it(added):
    added(stage())
    content = dump_config(load_config(DIGITS))
    assert config_type().model_fields["toy"].default is None
    STAGES._added.clear()
    assert parse_config(json.loads(json.dumps(content)), "metrics.json").rule == "search"
    assert parse_config({**content, "toy": None}, "metrics.json").rule == "search"


def test_settings_of_a_stage_that_is_gone_say_so(added):
    added(stage())
    content = dump_config(load_config(DIGITS, {"toy.digits": 3}))
    assert content["toy"] == {"digits": 3}
    STAGES._added.clear()
    with pytest.raises(SettingsError, match="metrics.json: toy: no stage .*installed"):
        parse_config(content, "metrics.json")


def test_a_stage_that_is_registered_again_has_its_new_settings(added):
    class Other(Section):
        places: int = 1

    added(stage())
    assert load_config(DIGITS, {"toy.digits": 3}).toy.digits == 3
    added(stage(settings=Other))
    assert load_config(DIGITS, {"toy.places": 3}).toy.places == 3


def test_a_stage_that_cannot_be_imported_is_logged_and_left_out(monkeypatch, caplog):
    class Broken:
        value = "nowhere:Stage"

        def load(self):
            raise ModuleNotFoundError("No module named 'nowhere'")

    monkeypatch.setattr(STAGES, "_entry_points", lambda: {"broken": Broken()})
    monkeypatch.setattr(logging.getLogger("nni_haloc"), "propagate", True)
    assert "broken" not in [stage.name for stage in all_stages()]
    assert load_config(DIGITS).rule == "search"
    assert "stage 'broken': the entry point nowhere:Stage can't be loaded" in caplog.text


def test_a_budget_from_the_command_line_leaves_the_other_limits_as_they_are():
    also = [{"metric": "params", "fraction": 0.5}]
    config = load_config(DIGITS, {"budget.also": also, "budget": 0.4})
    assert (config.budget.fraction, config.budget.also[0].metric) == (0.4, "params")
