"""Making a job changes nothing outside of it; what `active` sets is put back."""

import gc
import logging
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.paths import DIGITS

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run
from nni_haloc.utils.errors import SettingsError

CHANGES = {
    "rule": "uniform",
    "seed": 7,
    "threads": 2,
    "data.share": 0.1,
    "finetune.epochs": 1,
    "recalibration_batches": 2,
    "search.epochs": 1,
    "rank_space.calibration_images": 16,
    "cost.batch_size": 2,
}


def plain(value):
    """Make numpy's and torch's states comparable."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def outside():
    """Return all that a job could change outside of itself."""
    gc.collect()
    loggers = {
        name: (
            logger.level,
            logger.disabled,
            logger.propagate,
            logger.filters[:],
            logger.handlers[:],
        )
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    return {
        "torch's random state": plain(torch.get_rng_state()),
        "numpy's random state": plain(np.random.get_state()),
        "Python's random state": random.getstate(),
        "threads": torch.get_num_threads(),
        "precision of products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "environment": dict(os.environ),
        "current folder": os.getcwd(),
        "path": sys.path[:],
        "filters of warnings": warnings.filters[:],
        "loggers": loggers,
        "root logger": (logging.root.level, logging.root.handlers[:], logging.root.filters[:]),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
        "hooks": (sys.excepthook, sys.unraisablehook),
    }


def differences(before, after):
    """Return what differs; loggers that imports have added since do not count."""
    added = after["loggers"].keys() - before["loggers"].keys()
    after["loggers"] = {k: v for k, v in after["loggers"].items() if k not in added}
    return {key: (value, after[key]) for key, value in before.items() if value != after[key]}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Import all that a run imports late, which may change a logger or a filter."""
    run(load_config(DIGITS, CHANGES), tmp_path_factory.mktemp("imported"))


@pytest.fixture
def config():
    return load_config(DIGITS, CHANGES)


def test_making_a_job_changes_nothing_outside_and_makes_no_folder(config, tmp_path):
    before = outside()
    job = Job(config, tmp_path / "out")
    job.at(config, tmp_path / "other")
    job.loader("train", shuffle=True)
    job.count(job.model)
    assert differences(before, outside()) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_not_trained_is_the_seeds_and_changes_nothing(config, tmp_path):
    before = outside()
    one, two = (Job(config, tmp_path, trained=False).model for _ in range(2))
    other = Job(config.model_copy(update={"seed": 8}), tmp_path, trained=False).model
    assert differences(before, outside()) == {}
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_active_sets_folder_threads_and_seeds_and_puts_them_back(config, tmp_path):
    job, before = Job(config, tmp_path / "out"), outside()
    with job.active():
        assert (tmp_path / "out").is_dir()
        assert torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "high"
        drawn = torch.rand(3), np.random.rand(3), random.random()
        torch.manual_seed(7)
        build_model("digits_cnn")  # what the job has drawn before
        assert torch.equal(drawn[0], torch.rand(3))
        assert drawn[1].tolist() == np.random.RandomState(7).rand(3).tolist()
        assert drawn[2] == random.Random(7).random()
    assert differences(before, outside()) == {}


def test_a_block_that_fails_puts_everything_back_too(config, tmp_path):
    job, before = Job(config, tmp_path), outside()
    with pytest.raises(KeyboardInterrupt), job.active():
        raise KeyboardInterrupt
    assert differences(before, outside()) == {}


def test_a_block_draws_the_same_whatever_was_drawn_before(config, tmp_path):
    job, drawn = Job(config, tmp_path), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with job.active():
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("rule", ["uniform", "search"])
def test_a_whole_run_leaves_everything_as_it_was(config, tmp_path, rule):
    run(config.model_copy(update={"rule": rule}), tmp_path / "first")  # imports
    before = outside()
    run(config.model_copy(update={"rule": rule}), tmp_path / "second")
    assert differences(before, outside()) == {}


def test_a_job_at_other_settings_leaves_the_first_one_alone(config, tmp_path):
    job = Job(config, tmp_path)
    kept = dict(vars(job))
    other = job.at(config.model_copy(update={"seed": 9}), tmp_path / "other")
    assert vars(job) == kept
    assert (other.config.seed, other.folder.path) == (9, tmp_path / "other")
    assert (other.model, other.splits) == (job.model, job.splits)


def test_a_pattern_that_matches_no_layer_is_refused_before_the_data_are_read(
    config, tmp_path, monkeypatch
):
    def read(data):
        raise AssertionError("the data were read")

    space = config.rank_space.model_copy(update={"exclude": ["blck1.conv"]})
    monkeypatch.setattr("nni_haloc.runs.job.load_data", read)
    wrong = (
        r"^rank_space\.exclude: no layer .* matches 'blck1.conv'; .*did you mean 'block1.conv'\?$"
    )
    with pytest.raises(SettingsError, match=wrong):
        Job(config.model_copy(update={"rank_space": space}), tmp_path)


def test_a_pin_of_a_layer_that_is_not_searched_names_the_setting(config, tmp_path):
    space = config.rank_space.model_copy(update={"pin": {"classifier": 4}})
    wrong = r"^rank_space\.pin: .* matches 'classifier'; classifier: kind 'linear'"
    with pytest.raises(SettingsError, match=wrong):
        Job(config.model_copy(update={"rank_space": space}), tmp_path)
