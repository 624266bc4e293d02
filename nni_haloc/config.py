"""The settings of a run: one YAML file, validated. Paths in it are relative to the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from .yaml_files import ConfigError, read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _existing(path: str, info: ValidationInfo) -> str:
    folder: Path = (info.context or {}).get("folder", Path())
    found = folder / Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"no such file or folder: {found}")
    return str(found)


ExistingPath = Annotated[str, AfterValidator(_existing)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Model(_Section):
    """``name``: ``digits_cnn``, ``resnet20``, ``torchvision:NAME`` or ``package.module:factory``; ``arguments`` go to the factory."""

    name: str
    arguments: dict[str, Any] = {}


class Data(_Section):
    """``name``: ``digits``, ``cifar10`` or ``folder``. The validation images are a fraction of the training images, or those
    that the file ``val_list`` names. ``score``: the images that the final accuracies are of; a tuner that maximises them must have ``val``.
    ``mean`` and ``std`` per channel: those that the network was trained with, where they are not the data set's usual ones."""

    name: Literal["digits", "cifar10", "folder"]
    root: ExistingPath | None = None
    size: Count | None = None
    test: str = "test"
    score: Literal["test", "val"] = "test"
    in_memory: bool = False
    download: bool = False
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    val_list: ExistingPath | None = None
    seed: Seed = 0
    mean: list[float] | None = None
    std: list[Positive] | None = None
    batch_size: Count = 128
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.name != "digits" and self.root is None:
            raise ValueError(f"root: data {self.name!r} needs a folder")
        if self.name == "folder" and self.size is None:
            raise ValueError("size: data 'folder' needs the image size in pixels")
        return self


class Space(_Section):
    """The rank space: see `nni_haloc.ranks.RankRules`. ``decomposition: auto`` is by the data."""

    step: Count | None = None
    dense: bool = True
    equal: bool = True
    kinds: list[Literal["conv", "pointwise", "linear"]] = ["conv", "pointwise"]
    exclude: list[str] = []
    decomposition: Literal["auto", "data", "warm_hooi", "hosvd", "hooi"] = "auto"
    calibration_images: Count = 512


class Cost(_Section):
    """What the budget limits, and how latency is measured; ``batch_size``, ``memory_format`` and ``threads`` hold for the
    reported latency too."""

    metric: Literal["macs", "params", "latency_ms"] = "macs"
    table: ExistingPath | None = None
    batch_size: Count = 1
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    threads: Count | None = None


class Budget(_Section):
    """The limit on the whole network's cost: a ``fraction`` of the original's, or ``absolute`` in the metric's unit."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    absolute: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.fraction is None) == (self.absolute is None):
            raise ValueError("expected either 'fraction' or 'absolute'")
        return self

    def of(self, original: float) -> float:
        """The limit for a network whose original costs ``original``."""
        return self.fraction * original if self.fraction is not None else float(self.absolute or 0)


class Training(_Section):
    """See `nni_haloc.recipe.Recipe`; ``precision`` is Lightning's, and bf16 can be twice as fast where the processor has it."""

    epochs: Annotated[int, Field(ge=0)]
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    schedule: Literal["step", "onecycle", "constant"] = "step"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"


class Search(Training):
    """The search: the weights' training, and `nni_haloc.nas.Haloc`'s options."""

    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    epochs: Count = 10
    lr: Positive = 0.02
    schedule: Literal["step", "onecycle", "constant"] = "constant"
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    lam: NonNegative = 1.0
    objective: Literal["settle", "paper"] = "settle"
    beta: Positive = 2.0
    eta: Positive = 1.0
    theta: NonNegative = 1.0
    alpha_lr: Positive = 0.03
    temperature: Positive = 1.0
    select: Literal["knapsack", "argmax"] = "knapsack"


class Config(_Section):
    """A whole run. ``preset: paper`` sets what the paper fixes; naming one of those keys beside it is an error."""

    model: Model
    weights: ExistingPath
    data: Data
    rank_space: Space = Space()
    cost: Cost = Cost()
    budget: Budget
    search: Search = Search()
    finetune: Training = Training(epochs=10)
    recalibration_batches: Annotated[int, Field(ge=0)] = 50
    threads: Count | None = None
    seed: Seed = 0
    preset: Literal["paper"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.search.warmup_epochs >= self.search.epochs:
            raise ValueError(f"search.warmup_epochs: must be below search.epochs ({self.search.epochs}), found {self.search.warmup_epochs}")
        return self


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "rank_space": {"dense": False, "equal": True, "decomposition": "hosvd"},
        "search": {"objective": "paper", "select": "argmax"},
    }
}


def load_config(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read and validate a run's file. ``changes``: dotted key to value (``{"budget.fraction": 0.3}``), as NNI's tuner gives them.

    ``rank_space`` may be the path of a file of its own. Raises `ConfigError` with one line that names the file and the key.
    """
    path = Path(path)
    content = read_yaml(path)
    changes = dict(changes or {})
    content["rank_space"] = changes.pop("rank_space", content.get("rank_space", {}))
    if isinstance(content["rank_space"], str):
        content["rank_space"] = read_yaml(path.parent / content["rank_space"], key="rank_space")
    for dotted, value in changes.items():
        _set(content, dotted, value)
    preset = content.get("preset")
    for section, fixed in PRESETS.get(preset if isinstance(preset, str) else "", {}).items():
        values = content.setdefault(section, {})
        if isinstance(values, dict):
            for key, value in fixed.items():
                if values.setdefault(key, value) != value:
                    raise ConfigError(f"{path}: {section}.{key}: preset {preset!r} sets it to {value!r}, found {values[key]!r}")
    try:
        return Config.model_validate(content, context={"folder": path.parent})
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None


def _set(content: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        if not isinstance(content.setdefault(section, {}), dict):
            raise ConfigError(f"{dotted}: {section!r} is not a section")
        content = content[section]
    if key in ("fraction", "absolute") and sections == ["budget"]:
        content.clear()  # the two exclude each other: the one set last stands
    content[key] = value


def _explain(error: ValidationError) -> str:
    """The first error on one line: key, expected, found."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        shown = repr(found) if isinstance(found, (str, int, float, bool, type(None))) else type(found).__name__
        message = f"{first['msg'][:1].lower()}{first['msg'][1:]}, found {shown}"
    more = error.error_count() - 1
    return (f"{key}: " if key else "") + message + (f" (and {more} more)" if more else "")
