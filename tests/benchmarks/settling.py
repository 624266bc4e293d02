"""Compare ways to settle at the budget.

    python tests/benchmarks/settling.py RUN.yml [--seeds N] [--fractions F ...] [KEY=VALUE ...]

Each way gets a row: the expected cost in units of the budget (its largest distance from 1 in the
second half of the search; the iteration from which on it stays within 2 %), the share of the budget
that the plan uses, and the plan's top-1 on validation images, with the searched weights after
BatchNorm recalibration and no fine-tuning. Over the seeds, top-1 is the mean with its range, the
use the least, the other figures the largest. Test images are not looked at.
"""

import argparse
import tempfile
import warnings
from statistics import mean

import pytorch_lightning as pl
from pytorch_lightning import seed_everything

from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.yaml_files import parse_yaml
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.choose_ranks import _prepare
from nni_haloc.runs.stages.training import recipe_of
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.probabilities import SearchState
from nni_haloc.search.strategy import run_search
from nni_haloc.training.finetuning import accuracy, recalibrate


class AtOnce(SearchState):
    """Hold the expected cost at the budget from the first step on."""

    def settle(self, progress=1.0, budget=None):
        super().settle(budget=budget)


class Penalty(SearchState):
    """Add ``2 |E / budget - 1|`` to the cross-entropy.

    Alpha then holds the price too, so plans are scored by the mean gradients of the gates.
    """

    def probability_loss(self, ce):
        return ce + 2 * (self.expected_cost() / self.limits[0].budget - 1).abs()

    def settle(self, progress=1.0, budget=None):
        pass

    def scores(self):
        return {
            n: dict(zip(x.names, (-x.task_gradient.mean).tolist(), strict=True))
            for n, x in self.mixed_layers.items()
        }


class Multiplier(Penalty):
    """Add an augmented Lagrangian, ``m (E / budget - 1) + 5 (E / budget - 1)^2``, to the loss.

    ``m`` moves by 0.05 times the excess, ``E / budget - 1``, in every step.
    """

    multiplier = 0.0

    def probability_loss(self, ce):
        excess = self.expected_cost() / self.limits[0].budget - 1
        self.multiplier += 0.05 * float(excess.detach())
        return ce + self.multiplier * excess + 5 * excess**2


MODES = {"settle": SearchState, "at-once": AtOnce, "penalty": Penalty, "multiplier": Multiplier}


class Trace(pl.Callback):
    def __init__(self, strategy):
        self.strategy, self.ratios = strategy, []

    def on_train_batch_end(self, *_):
        self.ratios.append(float(self.strategy.expected_cost().detach()) / self.strategy.budget)


def measure(mode, config):
    """Search in one way, and measure how it has settled."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config, folder)
        with job.active():
            return search(mode, job)


def search(mode, job):
    config, splits, d = job.config, job.splits, job.config.data
    strategy, space, _ = _prepare(job, first=False)
    strategy.state_type = MODES[mode]
    trace = Trace(strategy)
    train, val = (
        splits.loader(split, d.batch_size, shuffle=True, seed=config.seed + i)
        for i, split in enumerate(("train", "val"))
    )
    options = {
        "callbacks": [trace],
        "precision": config.search.precision,
        "enable_progress_bar": False,
    }
    run_search(
        space,
        Classification(
            train, val, recipe_of(config.search), limit_train_batches=ARGS.batches, **options
        ),
        strategy,
    )
    plan = strategy.plan()
    network = strategy.network(plan)
    seed_everything(config.seed, verbose=False)
    recalibrate(
        network,
        splits.loader("train", d.batch_size, shuffle=True, seed=config.seed),
        config.recalibration_batches,
    )
    away = [abs(ratio - 1) for ratio in trace.ratios]
    return {
        "away": max(away[len(away) // 2 :]),
        "within": max((i + 1 for i, a in enumerate(away) if a > 0.02), default=0),
        "use": plan.chosen_by["cost"] / plan.chosen_by["budget"],
        "top1": accuracy(network, splits.loader("val", d.batch_size))[0],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_file")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--batches", type=int, help="iterations an epoch, where not all")
    ARGS = parser.parse_args()
    warnings.filterwarnings("ignore")
    # start far away from the budget
    changes = {"search.start": "uniform", "search.alpha_every": 1, "search.approach_share": 1.0}
    changes |= {
        key: parse_yaml(value)
        for key, _, value in (change.partition("=") for change in ARGS.changes)
    }
    print(
        "| budget | way | from 2 % on | furthest, 2nd half | least use | top-1 | seeds |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for fraction in ARGS.fractions:
        for mode in ARGS.modes:
            found = []
            for seed in range(ARGS.seeds):
                config = load_config(
                    ARGS.run_file, {**changes, "budget.fraction": fraction, "seed": seed}
                )
                found.append(measure(mode, config))
            top1 = [100 * f["top1"] for f in found]
            print(
                f"| {fraction} | {mode} | {max(f['within'] for f in found)} "
                f"| {100 * max(f['away'] for f in found):.2f} % "
                f"| {100 * min(f['use'] for f in found):.1f} % "
                f"| {mean(top1):.2f} % ({min(top1):.2f} to {max(top1):.2f}) | {len(found)} |",
                flush=True,
            )
