"""The names of the files in a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from nni_haloc.utils.processes import is_first

RANKS_FILE, COSTS_FILE, METRICS_FILE, WEIGHTS_FILE, MODEL_FILE, BENCH_FILE = (
    "ranks.json", "costs.json", "metrics.json", "weights.safetensors", "model.json", "bench.json",
)  # fmt: skip


SEARCH_FOLDER, FINETUNING_FOLDER, FRONT_FOLDER, EXPORT_FOLDER = (
    "search",
    "finetuning",
    "front",
    "export",
)


PRUNED_FOLDER, QUANTIZED_FOLDER, CHECKPOINT_FILE = "pruned", "quantized", "checkpoint.ckpt"


def clear(folder: Path) -> None:
    """Remove what an earlier run left in ``folder``."""
    if not is_first():
        return
    for file in (RANKS_FILE, WEIGHTS_FILE, METRICS_FILE, MODEL_FILE, BENCH_FILE):
        (folder / file).unlink(missing_ok=True)
    for part in (
        SEARCH_FOLDER,
        FINETUNING_FOLDER,
        FRONT_FOLDER,
        EXPORT_FOLDER,
        PRUNED_FOLDER,
        QUANTIZED_FOLDER,
    ):
        shutil.rmtree(folder / part, ignore_errors=True)
