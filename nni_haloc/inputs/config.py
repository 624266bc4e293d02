"""The settings of a run: one YAML file, validated. Paths in it are relative to the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from nni_haloc.inputs.schema import (
    Budget,
    Cost,
    Count,
    Data,
    Finetune,
    Model,
    Prune,
    Quantize,
    Rule,
    Search,
    Section,
    Seed,
    Share,
    Space,
    Train,
    Trainer,
    WeightsPath,
    check_uploaded,
)
from nni_haloc.inputs.yaml_files import read_yaml
from nni_haloc.utils.errors import SettingsError, explain

Validated = TypeVar("Validated", bound=Section)


class Config(Section):
    """A whole run. ``preset: paper`` sets what the paper fixes; naming one of those keys beside it is an error."""

    model: Model
    weights: WeightsPath
    data: Data
    rank_space: Space = Space()
    cost: Cost = Cost()
    budget: Budget
    rule: Rule = "search"
    search: Search = Search()
    finetune: Finetune = Finetune()
    prune: Prune | None = None
    quantize: Quantize | None = None
    train: Train = Train()
    trainer: Trainer = Trainer()
    scale: Share = 1.0
    recalibration_batches: Annotated[int, Field(ge=0)] = 50
    threads: Count | None = None
    seed: Seed = 0
    preset: Literal["paper"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.search.warmup_epochs >= self.search.epochs:
            raise ValueError(
                f"search.warmup_epochs: must be below search.epochs ({self.search.epochs}), found {self.search.warmup_epochs}"
            )
        return self


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "rank_space": {"dense": False, "equal": True, "decomposition": "hosvd"},
        "search": {
            "objective": "paper",
            "select": "argmax",
            "clip": None,
            "start": "uniform",
            "alpha_every": 1,
            "approach_share": 1.0,
        },
    }
}


def load_config(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    uploaded: Path | None = None,
) -> Config:
    """Read and validate a run's file. ``changes``: dotted key to value (``{"budget.fraction": 0.3}``), as NNI's tuner gives them.

    ``rank_space`` may be the path of a file of its own. With ``scale`` below 1, its root is taken of all numbers of epochs, of one epoch at
    least, and of the images; of calibration images, which are gone through once, that share itself remains, 64 at least: about that much of
    the work remains. ``training``: ``weights`` need not be there yet. ``uploaded``: the run is to be on another machine, which gets this
    folder; relative paths must be inside, absolute ones are that machine's and not looked for here. Raises `SettingsError` with one line that
    names the file and the key.
    """
    path = Path(path)
    content = read_yaml(path)
    changes = dict(changes or {})
    content["rank_space"] = changes.pop("rank_space", content.get("rank_space", {}))
    if isinstance(content["rank_space"], str):
        content["rank_space"] = _space_file(path, content["rank_space"], uploaded)
    for dotted, value in changes.items():
        set_dotted(content, dotted, value)
    preset = content.get("preset")
    for section, fixed in PRESETS.get(preset if isinstance(preset, str) else "", {}).items():
        values = content.setdefault(section, {})
        if isinstance(values, dict):
            for key, value in fixed.items():
                if values.setdefault(key, value) != value:
                    raise SettingsError(
                        f"{path}: {section}.{key}: preset {preset!r} sets it to {value!r}, found {values[key]!r}"
                    )
    return _scaled(
        _validated(Config, content, path, path.parent, training=training, uploaded=uploaded)
    )


def _space_file(path: Path, name: str, uploaded: Path | None) -> Any:
    """The content of the rank space's own file; nothing where that is another machine's."""
    if uploaded is not None and Path(name).expanduser().is_absolute():
        return {}
    try:
        if uploaded is not None:
            check_uploaded(path.parent / name, uploaded)
    except ValueError as error:
        raise SettingsError(f"{path}: rank_space: {error}") from None
    return read_yaml(path.parent / name, key="rank_space")


def _scaled(config: Config) -> Config:
    if config.scale == 1:
        return config
    root = math.sqrt(config.scale)
    images = config.rank_space.calibration_images
    parts: dict[str, Any] = {
        "data": config.data.model_copy(update={"share": root * config.data.share}),
        "rank_space": config.rank_space.model_copy(
            update={"calibration_images": max(min(images, 64), round(config.scale * images))}
        ),
    }
    if config.quantize is not None:
        images = config.quantize.calibration_images
        calibrating = {"calibration_images": max(min(images, 64), round(config.scale * images))}
        config = config.model_copy(
            update={"quantize": config.quantize.model_copy(update=calibrating)}
        )
    for name in ("train", "search", "finetune", "prune", "quantize"):
        section = getattr(config, name)
        if section is None:
            continue
        epochs = {"epochs": max(1, round(root * section.epochs))} if section.epochs else {}
        if name == "search":
            epochs["warmup_epochs"] = min(
                math.ceil(root * section.warmup_epochs), epochs["epochs"] - 1
            )
        parts[name] = section.model_copy(update=epochs)
    return config.model_copy(update=parts)


def parse_config(
    content: Mapping[str, Any], source: str | Path, folder: Path = Path(), *, files: bool = True
) -> Config:
    """The validated settings, paths relative to ``folder``; `SettingsError` names their ``source``. ``files``: whether those that the
    settings name have to be there."""
    return _validated(Config, content, source, folder, files=files)


def load_space(path: str | Path) -> Space:
    """Read and validate a rank space's own file; `SettingsError` names the file and the key."""
    return _validated(Space, read_yaml(Path(path)), path, Path())


def _validated(
    section: type[Validated],
    content: Mapping[str, Any],
    source: str | Path,
    folder: Path,
    **context: Any,
) -> Validated:
    try:
        return section.model_validate(content, context={"folder": folder, **context})
    except ValidationError as error:
        raise SettingsError(f"{source}: {explain(error)}") from None


def set_dotted(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of nested sections in place."""
    *sections, key = dotted.split(".")
    for section in sections:
        if not isinstance(content.setdefault(section, {}), dict):
            raise SettingsError(f"{dotted}: {section!r} is not a section")
        content = content[section]
    if key in ("fraction", "absolute") and sections == ["budget"]:
        content.pop(
            "absolute" if key == "fraction" else "fraction", None
        )  # the two exclude each other: the one set last stands
    content[key] = value
