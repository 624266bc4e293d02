"""What a user of Python sees of NNI's and Lightning's advice: nothing."""

import logging
import subprocess
import sys
import warnings

import pytest

from nni_haloc.costs.analytic import mac_table
from nni_haloc.search import evaluator
from nni_haloc.search.strategy import Haloc
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.quiet import CONFIGURED_TWICE, LOGS, quiet

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from nni_haloc import Classification, Haloc, RankSpace, Recipe, finetune, mac_table
from nni.nas.experiment import NasExperiment
from nni_haloc.utils.quiet import quiet

model = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
)
x, y = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
train, val = (DataLoader(TensorDataset(x, y), 16, shuffle=shuffle) for shuffle in (True, False))

def search():
    costs = mac_table(model, x[:1])
    strategy = Haloc(costs, budget=0.5)
    evaluator = Classification(train, val, Recipe(2), enable_progress_bar=False)
    experiment = NasExperiment(RankSpace(model, x[:1], costs, calibration=x), evaluator, strategy)
    experiment.run()
    experiment.stop()
    return strategy.network()

with quiet():
    network = search()
for loader in (val, None):
    finetune(network, train, Recipe(1), loader, enable_progress_bar=False)
print("=== without quiet")
search()
"""


def test_a_search_and_a_fine_tuning_in_python_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # NNI keeps a list of experiments in the home folder
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    inside, _, outside = done.stdout.partition("=== without quiet\n")
    assert inside == ""
    assert "Experiment is completed." in outside  # NNI's own steps, each said once
    assert not any(word in outside for word in ("WARNING", "ERROR", "training_service"))
    assert len(outside.splitlines()) < 12


def test_only_what_is_listed_is_silent_and_only_within_the_block(recwarn):
    name, message, level = LOGS[-1]
    logger, heard = logging.getLogger(name), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with quiet():
            logger.log(level, "%s", message)
            logger.log(level, "something else")
            logger.log(level + 10, message)
            warnings.warn("it does not have many workers, it says", UserWarning, stacklevel=1)
            with pytest.warns(UserWarning, match="another"):
                warnings.warn("another", UserWarning, stacklevel=1)
        logger.log(level, message)
    finally:
        logger.removeHandler(handler)
    assert heard == ["something else", message, message]
    assert logger.filters == []
    assert not recwarn.list
    with pytest.warns(UserWarning, match="many workers"):
        warnings.warn("it does not have many workers, it says", UserWarning, stacklevel=1)


def test_nni_is_silent_about_its_own_default_for_as_long_as_a_strategy_lives(net, images):
    logger = logging.getLogger(CONFIGURED_TWICE[0])
    before = list(logger.filters)
    strategy = Haloc(mac_table(net, images[:1]), 0.5)
    assert len(logger.filters) == len(before) + 1
    del strategy
    assert logger.filters == before


def test_the_old_name_of_the_evaluator_makes_the_same_and_says_so(loaders):
    with pytest.warns(DeprecationWarning, match=r"now the class nni_haloc\.Classification$"):
        old = evaluator.classification(*loaders, Recipe(3), enable_progress_bar=False)
    assert isinstance(old, evaluator.Classification)
    assert isinstance(old, evaluator.Lightning)
    assert old.trainer.max_epochs == 3
    named = {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}  # NNI's names for them
    new = evaluator.Classification(**named, recipe=Recipe(2), enable_progress_bar=False)
    assert (new.train_dataloaders, new.val_dataloaders) == tuple(loaders)
    assert new.trace_kwargs["recipe"] == Recipe(2)
