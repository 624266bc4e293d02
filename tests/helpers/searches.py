"""A small search, ready to be looked at."""

import copy

import pytorch_lightning as pl
import torch
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader

from nni_haloc.costs.analytic import mac_table
from nni_haloc.plan.budget import Limit
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training.recipe import Recipe

QUIET = {"enable_progress_bar": False}


def search(
    net,
    images,
    loaders,
    fraction=0.5,
    epochs=1,
    callbacks=(),
    space=None,
    precision="32-true",
    seed=0,
    limits=None,
    **options,
):
    seed_everything(seed, verbose=False)
    train, val = (
        DataLoader(x.dataset, 16, shuffle=True, generator=torch.Generator().manual_seed(seed + i))
        for i, x in enumerate(loaders)
    )
    allowed = options.pop("allowed", AllowedRanks())
    costs = mac_table(net, images[:1], allowed)
    limits = limits or [Limit(costs, fraction * costs.original)]
    nested = options.pop("nested", False)
    tables = [limit.costs for limit in limits]
    space = space or RankSpace(net, images[:1], tables, allowed, images, nested=nested)
    strategy = Haloc(
        limits, seed=seed, **{"alpha_every": 1, "approach_share": 1.0, "average": 0.0, **options}
    )
    evaluator = Classification(
        train,
        val,
        Recipe(epochs, 0.01, schedule="constant"),
        callbacks=list(callbacks),
        precision=precision,
        **QUIET,
    )
    return run_search(space, evaluator, strategy)


def state(model):
    return copy.deepcopy(model.state_dict())


class Watch(pl.Callback):
    """Counts forward passes by network and candidate, and notes which weights each iteration
    changed.
    """

    def on_fit_start(self, trainer, module):
        self.state = module.state
        self.runs, self.rounds = [], []
        for layer in self.state.mixed_layers.values():
            for name in layer.names:
                layer[name].register_forward_hook(
                    lambda *_, key=(layer.label, name): self.runs.append(key)
                )
        self.original = 0
        self.state.supernet.original.register_forward_hook(
            lambda *_: setattr(self, "original", self.original + 1)
        )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.runs.clear()
        self.before = {k: v.detach().clone() for k, v in self.state.supernet.named_parameters()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        layers = self.state.mixed_layers
        last = {
            layer.label: layer.names[layer.sampled] for layer in layers.values()
        }  # the weight step samples last
        changed = {
            k
            for k, v in self.state.supernet.named_parameters()
            if not torch.equal(v, self.before[k])
        }
        optimizer = trainer.optimizers[0]
        held = {k for k, v in self.state.supernet.named_parameters() if optimizer.state.get(v)}
        self.rounds.append((list(self.runs), last, changed, held))
