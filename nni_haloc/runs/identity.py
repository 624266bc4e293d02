"""What the state of a search or training depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nni_haloc.inputs.config import Config

VERSION = 2


_NO_PART = {  # settings that the state of a search does not depend on
    "finetune": None, "prune": None, "quantize": None, "train": None, "scale": None, "recalibration_batches": None, "threads": None,
    "data": {"workers", "score", "download"}, "search": {"tensorboard"},
}  # fmt: skip


def identity(config: Config) -> dict[str, Any]:
    """What a search's state depends on: dotted settings to values, files by their content."""
    content: dict[str, Any] = {"version": VERSION}
    for section, values in config.model_dump(mode="json").items():
        left_out = _NO_PART.get(section, set())
        if isinstance(values, dict) and left_out is not None:
            content |= {
                f"{section}.{key}": value for key, value in values.items() if key not in left_out
            }
        elif left_out is not None:
            content[section] = values
    for key in ("weights", "data.val_list", "cost.table"):
        if content[key] is not None:
            content[key] = (
                f"sha256 {hashlib.sha256(Path(content[key]).read_bytes()).hexdigest()[:16]}"
            )
    for limit in content["budget.also"]:
        if limit["table"] is not None:
            limit["table"] = (
                f"sha256 {hashlib.sha256(Path(limit['table']).read_bytes()).hexdigest()[:16]}"
            )
    if content["data.root"] is not None:
        content["data.root"] = str(Path(content["data.root"]).resolve())
    return content


def finetuning_identity(config: Config) -> dict[str, Any]:
    """What the state of a fine-tuning depends on, beside the ranks."""
    return {
        **identity(config),
        "finetune": config.finetune.model_dump(),
        "recalibration_batches": config.recalibration_batches,
    }
