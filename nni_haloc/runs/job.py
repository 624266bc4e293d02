"""What every job starts from: settings, data and the trained network; and what it measures of a compressed one."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.from_settings import latency_input, runtime_of
from nni_haloc.costs.measured import measure_latency
from nni_haloc.inputs import data as datasets
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import CHECKPOINT_FILE, RANKS_FILE, WEIGHTS_FILE
from nni_haloc.runs.saved import save
from nni_haloc.training.finetuning import accuracy
from nni_haloc.utils.errors import SettingsError, first_line, reason_of
from nni_haloc.utils.interruption import stoppable
from nni_haloc.utils.log import log_to, logger
from nni_haloc.utils.processes import check_startable, is_first


class Job:
    """What every job starts from: settings, data, and the trained network; random states are set to the settings' seed.

    Raises `SettingsError` for settings that turn out not to fit. ``factories=False``: see `build_model`.
    ``trained=False``: the network is as it was made, and ``weights`` are not read.
    """

    def __init__(
        self, config: Config, folder: str | Path, *, factories: bool = True, trained: bool = True
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _quiet()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        seed_everything(config.seed, verbose=False)
        try:
            check_startable(
                Trainer(**trainer_options(config), logger=False, enable_checkpointing=False)
            )
        except (MisconfigurationException, ValueError) as error:
            raise SettingsError(f"trainer: {' '.join(str(error).split())}") from None
        try:
            runtime_of(config)
            self.splits = _splits(config)
            self._tell_missing_classes()
            self.model = build_model(config.model.name, config.model.arguments, factories=factories)
            if trained:
                load_weights(self.model, config.weights)
            if config.cost.memory_format == "channels_last":
                self.model.to(
                    memory_format=torch.channels_last
                )  # trained as it will run; on a processor that is faster, too
            self.example = self.splits.images("test", 1)
        except (OSError, ValueError) as error:
            raise SettingsError(reason_of(error)) from None

    def _tell_missing_classes(self) -> None:
        for split, what in {"train": "training", "val": "validation", "test": "test"}.items():
            if missing := self.splits.missing(split):
                logger.warning("%s images: none of class %s", what, ", ".join(map(repr, missing)))

    def at(self, config: Config, folder: Path) -> Job:
        """A job of the same data and trained network with other settings, in another folder."""
        job = copy.copy(self)
        job.config, job.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        seed_everything(config.seed, verbose=False)
        return job

    def loader(self, split: str, *, shuffle: bool = False, seed: int = 0) -> DataLoader:
        d = self.config.data
        return self.splits.loader(
            split, d.batch_size, shuffle=shuffle, workers=d.workers, seed=self.config.seed + seed
        )

    def accuracy(self, model: nn.Module, loader: DataLoader) -> tuple[float, ...]:
        """Top-1, and top-5 where there are more than ten classes."""
        try:
            return accuracy(model, loader, (1, 5) if len(self.splits.classes) > 10 else (1,))
        except (RuntimeError, IndexError) as error:
            name, reason = self.config.model.name, first_line(error)
            raise SettingsError(
                f"model: {name} does not take the data's images or classes ({reason})"
            ) from None

    def metrics(
        self, network: nn.Module, result: tuple[float, ...], baseline: tuple[float, ...]
    ) -> dict[str, float]:
        """The final figures of a compressed network, a flat dict; latencies are of the settings' batch, the two timed in alternation."""
        nets, batch = (
            {"original": self.model, "compressed": network},
            latency_input(self.config, self.example),
        )
        latency = measure_latency(nets, batch, runtime_of(self.config))
        (macs_before, params_before), (macs, params) = (self.size(net) for net in nets.values())
        metrics = {"default": result[0], "baseline_top1": baseline[0]}
        if len(result) > 1:
            metrics |= {"top5": result[1], "baseline_top5": baseline[1]}
        return metrics | {
            "latency_ms": latency["compressed"],
            "baseline_latency_ms": latency["original"],
            "speedup": latency["original"] / latency["compressed"],
            "images_per_s": 1e3 * len(batch) / latency["compressed"],
            "macs": macs,
            "macs_reduction": 1 - macs / macs_before,
            "params": params,
            "params_reduction": 1 - params / params_before,
        }

    def size(self, network: nn.Module) -> tuple[int, int]:
        """MACs for one image, and parameters."""
        return count_macs(network, self.example), count_params(network)

    def has(self, plan: RankPlan) -> bool:
        """Whether an earlier start left the network of this plan in the folder."""
        try:
            return (
                RankPlan.load(self.folder / RANKS_FILE).ranks == plan.ranks
                and (self.folder / WEIGHTS_FILE).exists()
            )
        except (OSError, ValueError):
            return False

    def save(self, network: nn.Module, plan: RankPlan, folder: Path | None = None) -> None:
        """Leave a compressed network and its plan in ``folder`` (None: the job's); it may have been pruned since."""
        if is_first():
            facts: dict[str, Any] = {
                "name": self.config.model.name,
                "arguments": self.config.model.arguments,
            }
            whole = {
                key: value.shape
                for key, value in restructure(self.model, plan).state_dict().items()
            }
            facts |= (
                {"pruned": True}
                if any(value.shape != whole[key] for key, value in network.state_dict().items())
                else {}
            )
            save(folder or self.folder, network, plan, facts)


def _splits(config: Config) -> datasets.Splits:
    d = config.data
    cut: dict[str, Any] = {
        "val_fraction": d.val_fraction,
        "seed": d.seed,
        "val_list": d.val_list,
        "mean": d.mean,
        "std": d.std,
    }
    if d.name == "digits":
        whole = datasets.digits(**cut)
    elif d.name == "cifar10":
        assert d.root is not None
        whole = datasets.cifar10(d.root, **cut, download=d.download)
    else:
        assert d.root is not None
        assert d.size is not None
        whole = datasets.image_folder(d.root, d.size, **cut, test=d.test, in_memory=d.in_memory)
    return whole.shared(d.share, d.seed)


def _quiet() -> None:
    """Lightning's advice on devices and worker numbers, and NNI's on a validation loop and on errors, say nothing of a run."""
    logging.getLogger("nni.nas.evaluator.pytorch.lightning").setLevel(logging.ERROR)
    logging.getLogger("nni.nas.strategy.base").setLevel(
        logging.CRITICAL
    )  # "Strategy failed to execute", of what is raised anyway
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.accelerators.cuda").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*`isinstance.treespec.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
    torch.set_float32_matmul_precision("high")


@contextmanager
def job_in(folder: Path, stage: Path | None = None) -> Iterator[None]:
    """The log of what is done here goes to ``folder``, too; a signal ends it with one line on what the folder, or a ``stage``'s, keeps."""

    def kept() -> str:
        found = (
            any(folder.rglob(CHECKPOINT_FILE))
            if stage is None
            else (stage / CHECKPOINT_FILE).is_file()
        )
        return (
            f"{stage or folder} keeps the checkpoint; --resume goes on from it"
            if found
            else "no epoch is done"
        )

    with log_to(folder / "log.txt"), stoppable("haloc", kept):
        yield


def trainer_options(config: Config, *, searching: bool = False) -> dict[str, Any]:
    """What the settings say of Lightning's Trainer. A search has parameters without gradients, those of candidates that are not sampled."""
    options = config.trainer.model_dump()
    if searching and config.trainer.devices * config.trainer.num_nodes > 1:
        options["strategy"] = "ddp_find_unused_parameters_true"
    return options
