"""What one search iteration costs, by counted operations: the same on every machine."""

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from nni_haloc.costs.analytic import mac_table
from nni_haloc.inputs.models import build_model
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training.finetuning import finetune
from nni_haloc.training.recipe import Recipe

QUIET = {"enable_progress_bar": False}


class Few(AllowedRanks):
    """Dense and ``step`` ranks."""

    def candidates(self, spec):
        ranks = AllowedRanks().candidates(spec)[1:]
        return [None, *(ranks[int((i + 0.5) * len(ranks) / self.step)] for i in range(self.step))]


class Operations(pl.Callback):
    """Floating-point operations of convolutions and matrix products in each batch."""

    def __init__(self):
        self.counted = []

    def on_train_batch_start(self, *_):
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_train_batch_end(self, *_):
        self.counter.__exit__(None, None, None)
        self.counted.append(self.counter.get_total_flops())


def operations(train, model, images, labels):
    counter = Operations()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(
            copy.deepcopy(model),
            DataLoader(TensorDataset(images, labels), 32),
            Recipe(1, 0.01),
            counter,
        )
    return sum(counter.counted) / len(counter.counted)


def training(model, loader, recipe, counter):
    finetune(model, loader, recipe, callbacks=[counter], **QUIET)


def searching(number, **options):
    def train(model, loader, recipe, counter):
        allowed = Few(step=number - 1)
        space = RankSpace(model, next(iter(loader))[0][:1], allowed=allowed, decomposition="hosvd")
        assert (
            max(map(len, space.candidates.values())) == number
        )  # the first layer, of 3 channels, has room for two
        evaluator = Classification(loader, loader, recipe, callbacks=[counter], **QUIET)
        run_search(space, evaluator, Haloc(space.costs, 0.8, **options))

    return train


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"alpha_every": 1, "approach_share": 1.0}, 7.05),
        ({}, 3.55),
    ],  # 3 for the weights; 3 for alpha and 1 of the original, or an eighth of these
)
def test_an_iteration_costs_under_two_and_a_half_training_steps_for_any_number_of_candidates(
    options, forwards
):
    torch.manual_seed(0)
    model, images, labels = (
        build_model("resnet20"),
        torch.randn(256, 3, 32, 32),
        torch.zeros(256, dtype=torch.long),
    )
    ordinary = operations(training, model, images, labels)
    forward = 2 * mac_table(model, images[:1]).original * 32
    assert ordinary == pytest.approx(
        3 * forward, rel=0.03
    )  # forward, gradient of the inputs (not of the images), gradient of the weights
    two, seven = (
        operations(searching(number, **options), model, images, labels) for number in (2, 7)
    )
    assert seven <= 1.05 * two
    assert max(two, seven) <= forwards / 3 * ordinary


def test_where_the_kernel_is_large_and_the_batch_small_the_candidates_run():
    from nni_haloc.search.execution import contracts, runs_dense
    from nni_haloc.space.layers import LayerSpec

    def spec(channels, size):
        return LayerSpec(
            "c",
            "conv",
            channels,
            channels,
            ((1, channels, size, size),),
            False,
            (3, 3),
            padding=(1, 1),
        )

    large, small = spec(512, 7), spec(16, 32)
    ranks = [None, *((r, r) for r in range(32, 449, 32))]
    assert not contracts(large, ranks, (8, 512, 7, 7))
    assert contracts(large, ranks, (512, 512, 7, 7))
    assert contracts(small, [None, (4, 4), (8, 8)], (128, 16, 32, 32))
    assert runs_dense(
        small, (8, 8), (128, 16, 32, 32)
    )  # bound by memory: three small convolutions cost more than one
    assert not runs_dense(spec(64, 8), (8, 8), (128, 64, 8, 8))
