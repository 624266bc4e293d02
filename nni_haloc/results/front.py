"""Many budgets from one finished search: accuracy against cost, without searching again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import seed_everything
from torch import nn

from nni_haloc.inputs.config import parse_config
from nni_haloc.plan.budget import UndecidedBudget
from nni_haloc.runs.folder import CHECKPOINT_FILE, FRONT_FOLDER, SEARCH_FOLDER
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import searched
from nni_haloc.search.strategy import Haloc
from nni_haloc.training import checkpoint
from nni_haloc.training.finetuning import recalibrate
from nni_haloc.utils.errors import InfeasibleBudget, SettingsError
from nni_haloc.utils.files import whole, write_json
from nni_haloc.utils.log import logger

FRONT_FILE, PLOT_FILE = "front.json", "front.png"
_AXES = {
    "macs": ("MACs, millions", 1e6),
    "params": ("parameters, millions", 1e6),
    "activation_bytes": ("activations, MB", 1e6),
    "latency_ms": ("latency, ms", 1.0),
    "cycles": ("cycles, millions", 1e6),
    "energy_pj": ("energy, µJ", 1e6),
}


def front(
    folder: str | Path,
    budgets: Sequence[float],
    out: str | Path | None = None,
    *,
    factories: bool = False,
) -> dict[str, Any]:
    """Plans for a list of budgets from the search that ``folder`` holds, each with its accuracy; returns what ``front.json`` says.

    ``budgets``: fractions of the original's cost, above 0 to 1. Each plan is the best by the search's score within its budget, evaluated
    on the validation images with the searched weights, BatchNorm recalibrated; no fine-tuning. ``out`` (None: ``folder/front``) receives
    ``front.json``, ``front.png``, and for each budget a folder that `load` takes. ``factories``: call a model factory of one's own
    (``package.module:factory``) on the folder's word. Raises `SettingsError`, also where the search is not finished.
    """
    job, strategy = _finished(Path(folder), factories)
    out = Path(out or job.folder / FRONT_FOLDER)
    for fraction in budgets:
        if not 0 < fraction <= 1:
            raise SettingsError(
                f"budgets: expected fractions of the original's cost, above 0 to 1, found {fraction}"
            )
    original, val = strategy.costs.original, job.loader("val")
    points: list[dict[str, Any]] = []
    infeasible: list[dict[str, Any]] = []
    for fraction in sorted(set(budgets), reverse=True):
        try:
            plan = strategy.plan(fraction, select="knapsack")  # the arg max knows no budget
        except (InfeasibleBudget, UndecidedBudget) as error:
            logger.info("budget %g: %s", fraction, error)
            infeasible.append({"fraction": fraction, "reason": str(error)})
            continue
        network = _recalibrated(job, strategy.network(plan))
        (top1, *_) = job.accuracy(network, val)
        cost = plan.chosen_by["cost"]
        job.save(network, plan, out / f"{fraction:g}")
        points.append(
            {
                "fraction": fraction,
                "cost": cost,
                "cost_fraction": cost / original,
                "top1": top1,
                "folder": f"{fraction:g}",
            }
        )
    content = {
        "version": 1,
        "metric": strategy.costs.metric,
        "searched_at": strategy.budget / original,
        "original": {"cost": original, "top1": job.accuracy(job.model, val)[0]},
        "points": points,
        "infeasible": infeasible,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FRONT_FILE, content)
    plot(content, out / PLOT_FILE)
    return content


def plot(content: dict[str, Any], path: str | Path) -> None:
    """Draw what ``front.json`` holds: validation accuracy against cost, the original marked."""
    from matplotlib.figure import Figure  # slow to import

    label, unit = _AXES[content["metric"]]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="top-1 on validation images, %")
    spots: dict[tuple[float, float], list[str]] = {}  # several budgets may have the same plan
    for p in content["points"]:
        spots.setdefault((p["cost"] / unit, 100 * p["top1"]), []).append(f"{p['fraction']:g}")
    axes.plot(
        *zip(*spots, strict=True) if spots else ([], []),
        "o-",
        label="plans (with their budgets), not fine-tuned",
    )
    for spot, fractions in spots.items():
        axes.annotate(
            ", ".join(fractions), spot, xytext=(4, -12), textcoords="offset points", fontsize=8
        )
    axes.plot(
        content["original"]["cost"] / unit,
        100 * content["original"]["top1"],
        "k*",
        markersize=11,
        label="original",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    axes.set_title(
        f"One search at {content['searched_at']:.3g} of the original's cost, plans for other budgets",
        fontsize=10,
    )
    with whole(path) as part:
        figure.savefig(part, dpi=150, format=Path(path).suffix[1:])


def _finished(folder: Path, factories: bool) -> tuple[Job, Haloc]:
    """The job and the search that a folder holds."""
    path = folder / SEARCH_FOLDER / CHECKPOINT_FILE
    if not path.is_file():
        raise SettingsError(
            f"{path}: no such file; expected the folder of a search (haloc search, haloc run)"
        )
    saved = checkpoint.read(path)
    config = parse_config(saved["config"], path)
    if saved["epochs"] < config.search.epochs:
        raise SettingsError(
            f"{path}: the search is not finished ({saved['epochs']} of {config.search.epochs} epochs); resume it"
        )
    job = Job(config, folder, factories=factories)
    strategy = searched(job, resume=True)
    return job, strategy


def _recalibrated(job: Job, network: nn.Module) -> nn.Module:
    """With the same training images, augmented in the same way, for every network."""
    seed_everything(job.config.seed, verbose=False)
    recalibrate(network, job.loader("train", shuffle=True), job.config.recalibration_batches)
    return network
