"""The main job: search, compression and fine-tuning of one trained network, from settings to a folder of results."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import seed_everything
from torch import Tensor, nn

from . import data as datasets
from .budget import cheapest, check_feasible
from .compression import COSTS_FILE, METRICS_FILE, MODEL_FILE, RANKS_FILE, WEIGHTS_FILE, load_weights, save
from .config import Config, Training
from .finetuning import EpochEnd, accuracy, finetune, recalibrate
from .log import logger
from .models import build_model
from .nas import Haloc, RankSpace, SearchDiverged, classification, run_search
from .predictors import CostTable, count_macs, latency_table, mac_table, measure_latency, param_table
from .predictors.analytic import count_params
from .ranks import RankRules
from .recipe import Recipe
from .yaml_files import ConfigError

Report = Callable[[dict[str, float]], None]


def run(
    config: Config, folder: str | Path, report: Report = lambda metrics: None, parameters: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Compress the network of ``config`` and leave everything in ``folder``; returns the final metrics, a flat dict.

    ``report`` is called after each epoch of search and fine-tuning with a flat dict whose ``default`` is the top-1 on validation images.
    ``parameters``: what a tuner set, kept in ``metrics.json``. Raises `ConfigError` for settings that turn out not to fit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _quiet()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed, verbose=False)

    try:
        splits = _splits(config)
        model = build_model(config.model.name, config.model.arguments)
        load_weights(model, config.weights)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    batch = config.data.batch_size
    test = splits.loader(config.data.score, batch, workers=config.data.workers)
    example = splits.images("test", 1)
    topk = (1, 5) if len(splits.classes) > 10 else (1,)
    try:
        baseline = accuracy(model, test, topk)
    except (RuntimeError, IndexError) as error:
        raise ConfigError(f"model: {config.model.name} does not take the data's images or classes ({str(error).splitlines()[0]})") from None
    logger.info("original: %.2f %% top-1, %d MACs, %d parameters", 100 * baseline[0], count_macs(model, example), count_params(model))

    try:
        strategy, space = _prepare(config, splits, model, example, folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for stale in (RANKS_FILE, WEIGHTS_FILE, METRICS_FILE, MODEL_FILE):  # of an earlier run; not before this one's settings have proved good
        (folder / stale).unlink(missing_ok=True)
    try:
        network = _search(config, splits, strategy, space, report)
    except SearchDiverged as error:
        raise ConfigError(f"search: {error}") from None
    plan = strategy.plan()
    logger.info("plan: cost %.6g of %.6g %s, budget %.6g", *(plan.chosen_by[k] for k in ("cost", "original_cost", "metric", "budget")))
    facts = {"name": config.model.name, "arguments": config.model.arguments}
    save(folder, network, plan, facts)  # so that a run cut off in fine-tuning keeps what it searched
    network = _finish(config, splits, network, report)

    result = accuracy(network, test, topk)
    metrics = _metrics(config, model, network, example, baseline, result)
    save(folder, network, plan, facts)
    content = {"metrics": metrics, "parameters": dict(parameters or {}), "config": config.model_dump(mode="json")}
    (folder / METRICS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        logger.info("%s: %.6g", name, value)
    return metrics


def _splits(config: Config) -> datasets.Splits:
    d = config.data
    cut: dict[str, Any] = {"val_fraction": d.val_fraction, "seed": d.seed, "val_list": d.val_list, "mean": d.mean, "std": d.std}
    if d.name == "digits":
        return datasets.digits(**cut)
    assert d.root is not None
    if d.name == "cifar10":
        return datasets.cifar10(d.root, **cut, download=d.download)
    assert d.size is not None
    return datasets.image_folder(d.root, d.size, **cut, test=d.test, in_memory=d.in_memory)


def _prepare(config: Config, splits: datasets.Splits, model: nn.Module, example: Tensor, folder: Path) -> tuple[Haloc, RankSpace]:
    """The cost table, the rank space and the strategy; an impossible budget is refused here, before any training."""
    r, s = config.rank_space, config.search
    rules = RankRules(r.step, r.dense, r.equal, tuple(r.kinds), tuple(r.exclude))
    if config.cost.table is not None:
        costs = CostTable.load(config.cost.table)
        if costs.metric != config.cost.metric:
            raise ConfigError(f"cost.table: expected a table of {config.cost.metric}, found {costs.metric} in {config.cost.table}")
    elif config.cost.metric == "latency_ms":
        logger.info("measuring the latency of every candidate")
        costs = latency_table(
            model, _latency_input(config, example), rules, memory_format=config.cost.memory_format, threads=config.cost.threads
        )
    else:
        costs = (mac_table if config.cost.metric == "macs" else param_table)(model, example, rules)
    costs.save(folder / COSTS_FILE)
    budget = config.budget.of(costs.original)
    calibration = splits.images("plain", r.calibration_images, config.seed) if r.decomposition in ("auto", "data") else None
    space = RankSpace(model, example, costs, rules, calibration, None if r.decomposition == "auto" else r.decomposition)
    rows, rest = costs.restrict(space.candidates)
    check_feasible(rows, rest, budget, costs.metric)
    logger.info("%d layers to search, %.3g networks; left alone: %s", len(space.candidates), space.size(), space.left_alone)
    logger.info("cheapest network: %.6g %s; budget %.6g, original %.6g", cheapest(rows, rest), costs.metric, budget, costs.original)
    strategy = Haloc(
        costs, budget, lam=s.lam, objective=s.objective, beta=s.beta, eta=s.eta, theta=s.theta, alpha_lr=s.alpha_lr,
        warmup_epochs=s.warmup_epochs, temperature=s.temperature, select=s.select, seed=config.seed,
    )  # fmt: skip
    return strategy, space


def _search(config: Config, splits: datasets.Splits, strategy: Haloc, space: RankSpace, report: Report) -> nn.Module:
    d = config.data

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        cost = metrics.get("search/expected_cost_epoch", float("nan")) / strategy.costs.original
        top1 = metrics.get("search/val_top1", metrics["search/train_top1"])
        logger.info(
            "search epoch %d: top-1 of sampled networks %.2f %%, expected cost %.1f %% of the original", epoch + 1, 100 * top1, 100 * cost
        )
        searched = {"expected_cost": cost} if math.isfinite(cost) else {}  # not in epochs of warm-up
        report({"default": top1, **searched, "train_loss": metrics["search/train_loss"]})

    train, val = (
        splits.loader(split, d.batch_size, shuffle=True, workers=d.workers, seed=config.seed + i)
        for i, split in enumerate(("train", "val"))
    )
    evaluator = classification(train, val, _recipe(config.search), callbacks=[EpochEnd(on_epoch)], precision=config.search.precision)
    return run_search(space, evaluator, strategy).network()


def _finish(config: Config, splits: datasets.Splits, network: nn.Module, report: Report) -> nn.Module:
    """Recalibration and fine-tuning."""
    d = config.data
    train = splits.loader("train", d.batch_size, shuffle=True, workers=d.workers, seed=config.seed)
    val = splits.loader("val", d.batch_size, workers=d.workers)
    recalibrate(network, train, config.recalibration_batches)
    (top1,) = accuracy(network, val)
    logger.info("compressed, before fine-tuning: top-1 %.2f %% (validation)", 100 * top1)
    report({"default": top1})

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        logger.info("fine-tuning epoch %d: top-1 %.2f %% (validation)", epoch + 1, 100 * metrics["val_top1"])
        report({"default": metrics["val_top1"], "train_loss": metrics["train_loss"]})

    return finetune(network, train, _recipe(config.finetune), val, on_epoch, precision=config.finetune.precision)


def _metrics(
    config: Config, model: nn.Module, network: nn.Module, example: Tensor, baseline: tuple[float, ...], result: tuple[float, ...]
) -> dict[str, float]:
    latency = measure_latency(
        {"original": model, "compressed": network},
        _latency_input(config, example),
        memory_format=config.cost.memory_format,
        threads=config.cost.threads,
    )
    macs = {m: count_macs(net, example) for m, net in (("original", model), ("compressed", network))}
    params = {m: count_params(net) for m, net in (("original", model), ("compressed", network))}
    metrics = {"default": result[0], "baseline_top1": baseline[0]}
    if len(result) > 1:
        metrics |= {"top5": result[1], "baseline_top5": baseline[1]}
    return metrics | {
        "latency_ms": latency["compressed"],
        "baseline_latency_ms": latency["original"],
        "speedup": latency["original"] / latency["compressed"],
        "images_per_s": 1e3 * config.cost.batch_size / latency["compressed"],
        "macs": macs["compressed"],
        "macs_reduction": 1 - macs["compressed"] / macs["original"],
        "params": params["compressed"],
        "params_reduction": 1 - params["compressed"] / params["original"],
    }


def _latency_input(config: Config, example: Tensor) -> Tensor:
    return example.repeat(config.cost.batch_size, *[1] * (example.dim() - 1))


def _recipe(training: Training) -> Recipe:
    return Recipe(training.epochs, training.lr, training.momentum, training.weight_decay, training.schedule)


def _quiet() -> None:
    """Lightning's advice on devices and worker numbers says nothing of a run."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.accelerators.cuda").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*number of training batches.*", ".*`isinstance.treespec.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    torch.set_float32_matmul_precision("high")
