"""The settings and files that the state of a search or of a training depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni_haloc.costs.from_settings import may_differ
from nni_haloc.inputs.config import EARLIER, Config, earlier_of
from nni_haloc.inputs.registries import RULES, STAGES
from nni_haloc.inputs.schema.section import Section
from nni_haloc.training.checkpoint import DIGEST, STEPS, check_same

VERSION = 2

_WHOLE_SECTIONS = ("finetune", "prune", "quantize", "train")
_SETTINGS = ("scale", "recalibration_batches", "threads", "trial_budget", "objective")
_KEYS = {
    "budget": {"check"},
    "data": {"workers", "score", "download"},
    "search": {"tensorboard"},
    "trainer": {"logger"},
}
"""Settings that the state of a search does not depend on."""


def search_identity(config: Config) -> dict[str, Any]:
    """Return what a search's state depends on: dotted settings to values, files by content."""
    content: dict[str, Any] = {"version": VERSION}
    # Other keys follow from it; see `check_same`.
    content |= {"scale": config.scale} if config.scale != 1 else {}
    left_out = {*_WHOLE_SECTIONS, *_SETTINGS, *STAGES.foreign()}
    for section, values in config.model_dump(mode="json").items():
        if section in left_out:
            continue
        if not isinstance(values, dict):
            content[section] = values
            continue
        unused = _KEYS.get(section, set())
        content |= {f"{section}.{key}": v for key, v in values.items() if key not in unused}
    if config.plan is None:
        del content["plan"]  # earlier versions had none
    for key in ("weights", "data.val_list", "cost.table", *(["plan"] if config.plan else [])):
        content[key] = _digest(content[key])
    if isinstance(content["data.classes"], str):
        content["data.classes"] = _digest(content["data.classes"])
    for limit in content["budget.also"]:
        limit["table"] = _digest(limit["table"])
    if content["data.root"] is not None:
        content["data.root"] = str(Path(content["data.root"]).resolve())
    if config.rank_space.equal is None:
        pairs = config.rule in RULES and getattr(RULES[config.rule], "pairs", False)
        content["rank_space.equal"] = not (pairs and may_differ(config))
    step = content["rank_space.step"]
    content["rank_space.step"] = STEPS.get(step, step)
    return {key: v for key, v in content.items() if not (key in EARLIER and v == EARLIER[key])}


def finetuning_identity(config: Config) -> dict[str, Any]:
    """Return what the state of a fine-tuning depends on, except the ranks."""
    return {
        **search_identity(config),
        "finetune": section_identity(config.finetune, "finetune"),
        "recalibration_batches": config.recalibration_batches,
    }


def section_identity(section: Section, name: str) -> dict[str, Any]:
    """Return what the state of a training depends on in one section of the settings.

    What earlier versions always did is not mentioned, such as passes that are not compiled.

    Args:
        section: the section's values.
        name: its name, such as ``finetune``.
    """
    earlier = {"compile": False, **earlier_of(name)}
    values = section.model_dump().items()
    return {key: v for key, v in values if not (key in earlier and v == earlier[key])}


def check_training(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that a training may go on from a checkpoint.

    Its settings must be those of now, but for a training at a constant rate, which may be longer
    now than it was: it is then as one that was never ended.

    Args:
        path: the checkpoint, for the message.
        saved: the checkpoint's facts.
        here: what the training of now depends on.

    Raises:
        UnusableCheckpoint: if the settings differ; the message names what does.
    """
    there = dict(saved["identity"])
    for key, now in here.items():
        was = there.get(key)
        if saved.get("longer") and isinstance(now, dict) and isinstance(was, dict):
            end, before = now.get("epochs"), was.get("epochs")
            if isinstance(end, int) and isinstance(before, int) and before < end:
                there[key] = {**was, "epochs": end}
    check_same(path, there, here)


def _digest(path: str | None) -> str | None:
    """Return the start of a file's SHA-256."""
    if path is None:
        return None
    return f"{DIGEST}{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
