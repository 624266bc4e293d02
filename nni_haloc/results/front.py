"""Many budgets from one finished search: accuracy against cost, without searching again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import seed_everything
from torch import nn

from nni_haloc.inputs.config import parse_config
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder, hold
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.choose_ranks import run_or_read_search
from nni_haloc.runs.stages.stage import ignore
from nni_haloc.search.strategy import Haloc
from nni_haloc.training import checkpoint
from nni_haloc.training.finetuning import recalibrate
from nni_haloc.utils.errors import InfeasibleBudget, SettingsError
from nni_haloc.utils.files import make_folder, whole, write_json
from nni_haloc.utils.log import logger

FRONT_FILE, PLOT_FILE = "front.json", "front.png"
FRONT_VERSION = 1
_NEAR = 0.02
"""A budget that is no further below the searched ones is no cause for a warning."""
_AXES = {
    "macs": ("MACs, millions", 1e6),
    "params": ("parameters, millions", 1e6),
    "activation_bytes": ("activations, MB", 1e6),
    "latency_ms": ("latency, ms", 1.0),
    "cycles": ("cycles, millions", 1e6),
    "energy_pj": ("energy, µJ", 1e6),
    "energy_mj": ("energy, mJ", 1.0),
}
"""Label of a metric's axis, and what one unit of the axis is in the metric's own."""


def pareto_front(
    folder: str | Path,
    budgets: Sequence[float],
    out: str | Path | None = None,
    *,
    factories: bool = False,
) -> dict[str, Any]:
    """Plan for several budgets from one finished search, and measure each plan's accuracy.

    Each plan is the best by the search's score within its budget. Its network has the searched
    weights with BatchNorm recalibrated, is not fine-tuned, and is evaluated on the validation
    images.

    Args:
        folder: the folder of a finished search.
        budgets: fractions of the original's cost, above 0 to 1.
        out: receives ``front.json``, ``front.png``, and for each budget a folder that
            `nni_haloc.load` takes; None is ``folder/front``.
        factories: whether to import and call the model factory that the folder names: only for
            folders that you trust.

    Returns:
        What ``front.json`` says: ``original``, ``points``, and the ``infeasible`` budgets.

    Raises:
        SettingsError: if there is no finished search, or a budget is none.
    """
    job = _finished_search(RunFolder(folder), factories)
    for fraction in budgets:
        if not 0 < fraction <= 1:
            expected = "expected fractions of the original's cost, above 0 to 1"
            raise SettingsError(f"budgets: {expected}, found {fraction}")
    target = Path(out or job.folder.front)
    with hold(job.folder, out), job.active():
        strategy = run_or_read_search(job, ignore, resume=True)
        _warn_of_untrained(strategy, budgets)
        content = _content(job, strategy, budgets, target)
        make_folder(target)
        write_json(target / FRONT_FILE, content)
        plot(content, target / PLOT_FILE)
    return content


def _warn_of_untrained(strategy: Haloc, budgets: Sequence[float]) -> None:
    """Warn of budgets below those that the search has sampled its paths for."""
    searched = strategy.budget / strategy.costs.original
    least = min(strategy.options.budget_range or [searched])
    below = sorted(budget for budget in set(budgets) if budget < least - _NEAR)
    if below:
        logger.warning(
            "budgets %s: the search was made for %.3g and more, and has hardly trained smaller"
            " ranks; set search.budget_range: [%g, %.3g]",
            ", ".join(f"{budget:g}" for budget in below),
            least,
            below[0],
            max(strategy.options.budget_range or [searched]),
        )


def _content(job: Job, strategy: Haloc, budgets: Sequence[float], out: Path) -> dict[str, Any]:
    """Make and measure the network of each budget; return what ``front.json`` says."""
    original, val = strategy.costs.original, job.loader("val")
    points: list[dict[str, Any]] = []
    infeasible: list[dict[str, Any]] = []
    for fraction in sorted(set(budgets), reverse=True):
        try:
            plan = strategy.plan(fraction, select="knapsack")  # the arg max knows no budget
        except InfeasibleBudget as error:
            logger.info("budget %g: %s", fraction, error)
            infeasible.append({"fraction": fraction, "reason": str(error)})
            continue
        network = _recalibrated(job, strategy.network(plan))
        name, cost = f"{fraction:g}", plan.chosen_by["cost"]
        job.save(network, plan, RunFolder(out / name))
        top1 = job.accuracy(network, val)["top1"]
        point = {"fraction": fraction, "cost": cost, "cost_fraction": cost / original}
        points.append({**point, "top1": top1, "folder": name})
    return {
        "version": FRONT_VERSION,
        "metric": strategy.costs.metric,
        "searched_at": strategy.budget / original,
        "original": {"cost": original, "top1": job.accuracy(job.model, val)["top1"]},
        "points": points,
        "infeasible": infeasible,
    }


def plot(content: dict[str, Any], path: str | Path) -> None:
    """Draw what ``front.json`` holds: validation accuracy against cost, the original marked."""
    from matplotlib.figure import Figure  # slow to import

    label, unit = _AXES.get(content["metric"], (content["metric"], 1.0))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="top-1 on validation images, %")
    spots: dict[tuple[float, float], list[str]] = {}  # several budgets may have the same plan
    for point in content["points"]:
        spot = point["cost"] / unit, 100 * point["top1"]
        spots.setdefault(spot, []).append(f"{point['fraction']:g}")
    costs, accuracies = zip(*spots, strict=True) if spots else ([], [])
    axes.plot(costs, accuracies, "o-", label="plans (with their budgets), not fine-tuned")
    for spot, fractions in spots.items():
        text = ", ".join(fractions)
        axes.annotate(text, spot, xytext=(4, -12), textcoords="offset points", fontsize=8)
    original = content["original"]
    axes.plot(
        original["cost"] / unit, 100 * original["top1"], "k*", markersize=11, label="original"
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    title = f"One search at {content['searched_at']:.3g} of the original's cost"
    axes.set_title(f"{title}, plans for other budgets", fontsize=10)
    with whole(path) as part:
        figure.savefig(part, dpi=150, format=Path(path).suffix[1:])


def _finished_search(folder: RunFolder, factories: bool) -> Job:
    """Return the job of the finished search that a folder holds."""
    path = folder.searching.checkpoint
    rule = _rule_of(folder)
    if not path.is_file() and rule not in (None, "search"):
        remedy = "front needs a search: haloc search RUN.yml, or haloc run RUN.yml --rule search"
        raise SettingsError(f"{folder} was made by the rule {rule}; {remedy}")
    if not path.is_file():
        expected = "expected the folder of a search (haloc search, haloc run)"
        missing = f"{path}: no such file" if folder.path.is_dir() else f"{folder}: no such folder"
        raise SettingsError(f"{missing}; {expected}")
    saved = checkpoint.read(path, "; search again", config=dict, costs=list)
    config = parse_config(saved["config"], path)
    data = config.data.model_copy(update={"download": False})  # the folder may be somebody else's
    config = config.model_copy(update={"data": data})
    done, epochs = saved["epochs"], config.search.epochs
    if done < epochs:
        raise SettingsError(
            f"{path}: the search is not finished ({done} of {epochs} epochs); "
            f"continue with haloc run RUN.yml --resume --out {folder}"
        )
    return Job(config, folder.path, factories=factories)


def _rule_of(folder: RunFolder) -> str | None:
    """Return the rule that chose a folder's ranks, as far as the folder says."""
    try:
        return RankPlan.load(folder.ranks).chosen_by.get("rule")
    except (OSError, ValueError):
        return None


def _recalibrated(job: Job, network: nn.Module) -> nn.Module:
    """Recalibrate with the same training images, augmented alike, for every network."""
    seed_everything(job.config.seed, verbose=False)
    recalibrate(network, job.loader("train", shuffle=True), job.config.recalibration_batches)
    return network
