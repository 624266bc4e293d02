"""The settings of a run: one YAML file, validated. Paths in it are relative to the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError, create_model, model_validator

from nni_haloc.inputs.registries import STAGES
from nni_haloc.inputs.schema.budget import Budget, check_fraction
from nni_haloc.inputs.schema.chain import Prune, Quantize
from nni_haloc.inputs.schema.cost import Cost
from nni_haloc.inputs.schema.data import Data
from nni_haloc.inputs.schema.model import Model
from nni_haloc.inputs.schema.objective import Objective
from nni_haloc.inputs.schema.paths import ExistingPath, WeightsPath, check_uploaded, expanded
from nni_haloc.inputs.schema.search import Search
from nni_haloc.inputs.schema.section import Section
from nni_haloc.inputs.schema.space import Space
from nni_haloc.inputs.schema.training import Finetune, Train, Trainer, Training
from nni_haloc.inputs.schema.values import CountOrNone, Processes, Rule, Seed, Share
from nni_haloc.inputs.tuned import as_settings
from nni_haloc.inputs.yaml_files import read_yaml
from nni_haloc.utils.errors import SettingsError, as_one_line, brief, explain
from nni_haloc.utils.log import logger

Validated = TypeVar("Validated", bound=Section)

_FEWEST_IMAGES = 64
"""Calibration images that remain at any ``scale``."""


class Config(Section):
    """The settings of a whole run.

    A stage that another package adds has a section of its own, under the stage's name.
    """

    model: Model
    """The original network."""
    weights: WeightsPath
    """Trained weights of the network: a
    [file of `torch.save` or of safetensors](how-to/data-and-networks.md#weights), told apart by
    content. `haloc train` writes this file where there is none yet."""
    data: Data
    """The data set, and how it is split and read."""
    rank_space: Space = Space()
    """The ranks to choose from: a section, or the path of a file such as those in
    `search_spaces/`."""
    cost: Cost = Cost()
    """The cost that the budget limits, and how latency and energy are measured. The keys from
    `runtime` on hold for every latency and energy that is measured, the reported ones included."""
    budget: Budget
    """The limit on the whole network's cost in `cost.metric`: either `fraction` or `absolute`.
    `budget: 0.5` is short for `budget: {fraction: 0.5}`. Further limits, `also`, hold too."""
    rule: Rule = "sensitivity-knapsack"
    """How ranks are chosen: by one of the [rules](reference/rules.md), or by the `search`, which
    [has not been ahead of the default at equal compute](results.md#short-a-few-epochs) so far.
    `haloc search` and `preset: paper` search where no rule is named."""
    plan: ExistingPath | None = None
    """A file of ranks, `ranks.json` or what `haloc plan --out` writes, in the place of choosing
    them: [ranks by hand](how-to/ranks-by-hand.md). `rule` is then `plan`; `haloc run --plan FILE`
    sets both."""
    search: Search = Search()
    """The search, with `rule: search`: its options, and the training of the weights in it."""
    finetune: Finetune = Finetune()
    """The fine-tuning of the compressed network, by default with the paper's recipe, shortened."""
    prune: Prune | None = None
    """[Pruning](how-to/prune-and-quantize.md#prune) by NNI, and the fine-tuning after it. Without
    the section there is none."""
    quantize: Quantize | None = None
    """[Quantizing](how-to/prune-and-quantize.md#quantize) by NNI, after fine-tuning and pruning.
    Without the section there is none. The keys of a training are for `qat` and `lsq`."""
    train: Train = Train()
    """The training of the original network, `haloc train`, where there are no weights yet."""
    trainer: Trainer = Trainer()
    """Where the search and all trainings run, and what logs them: Lightning's flags. With
    [several processes](how-to/many-machines.md#several-processes), `data.batch_size` is that of
    each."""
    scale: Share = 1.0
    """For a first try on a small machine: about this part of the work remains. Epochs and images
    are multiplied by its square root, the calibration images (64 at least) by the part itself."""
    recalibration_batches: CountOrNone = 50
    """Augmented training batches for the statistics of BatchNorm."""
    threads: Processes | None = None
    """Processor threads of the whole run. Without it: as many as torch takes. Small networks are
    faster with 1."""
    seed: Seed = 0
    """Seed of everything random. The same seed gives the same ranks."""
    objective: Objective = Objective()
    """What `default` of a trial is, the number that a tuner maximises."""
    trial_budget: Literal["finetune.epochs", "search.epochs"] = "finetune.epochs"
    """The setting that NNI's Hyperband and BOHB set by `TRIAL_BUDGET`, for
    [trials of several lengths](how-to/tune.md#trials-of-several-lengths)."""
    preset: Literal["paper"] | None = None
    """`paper` sets what the paper does ([the keys](reference/settings.md#preset-paper), and [what
    the paper leaves open](explanation/paper.md#preset-paper)). A setting beside it that says
    otherwise than its method is an error; its training may be changed."""

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, content: Any) -> Any:
        """Write ``budget: 0.5`` out as ``budget: {fraction: 0.5}``; a plan's rule is ``plan``."""
        if isinstance(content, dict) and content.get("plan") is not None:
            content = {"rule": "plan", **content}
        if not isinstance(content, dict) or isinstance(content.get("budget", {}), (dict, Budget)):
            return content
        fraction = content["budget"]
        try:
            check_fraction(fraction)
        except ValueError as error:
            raise ValueError(f"budget: {error}") from None
        return {**content, "budget": {"fraction": fraction}}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        warmup, epochs = self.search.warmup_epochs, self.search.epochs
        if warmup >= epochs:
            expected = f"must be below search.epochs ({epochs})"
            raise ValueError(f"search.warmup_epochs: {expected}, found {warmup}")
        if self.plan is not None and self.rule != "plan":
            expected = "expected 'plan', or none, beside the file 'plan'"
            raise ValueError(f"rule: {expected}, found {self.rule!r}; leave one of them out")
        if self.plan is None and self.rule == "plan":
            raise ValueError("plan: the rule 'plan' needs a file (haloc plan FOLDER --out FILE)")
        if self.search.tensorboard and self.trainer.logger not in ("none", "tensorboard"):
            expected = f"expected false with trainer.logger {self.trainer.logger!r}"
            raise ValueError(f"search.tensorboard: {expected}, found true; leave it out")
        return self

    @property
    def logger(self) -> str:
        """The name of the logger, by ``trainer.logger`` or its former spelling."""
        return "tensorboard" if self.search.tensorboard else self.trainer.logger


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "rank_space": {"step": "paper", "dense": False, "equal": True, "decomposition": "hosvd"},
        "search": {
            "supernet": "separate",
            "average": 0.0,
            "objective": "paper",
            "select": "argmax",
            "clip": None,
            "start": "uniform",
            "alpha_every": 1,
            "approach_share": 1.0,
        },
    }
}
"""What a preset fixes: its method."""
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "recalibration_batches": 0,
        "data": {"batch_size": 256},
        "finetune": {
            "epochs": 220,
            "lr": {"small": 0.1, "large": 0.01},
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "step",
        },
    }
}
"""What a preset sets where the file does not: its training. A rate may depend on the images: those
of CIFAR-10 are small."""
_SMALL_IMAGE = 64


def load_config(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    uploaded: Path | None = None,
    places: Mapping[str, str] | None = None,
) -> Config:
    """Read and validate a run's file.

    ``rank_space`` in the file may be the path of a file of its own. With ``scale`` below 1, its
    root is taken of the epochs and of the images; of calibration images, which are gone through
    once, that share itself remains: about that much of the work remains.

    Args:
        path: the YAML file.
        changes: dotted key to value (``{"budget.fraction": 0.3}``), as NNI's tuner gives them,
            ``TRIAL_BUDGET`` and folders of checkpoints included (`as_settings`).
        training: whether the run is to make the file ``weights``, which then need not be there.
        uploaded: the folder that is sent to another machine, if the run is to be there. Relative
            paths must lie inside; absolute ones are that machine's and are not looked for here.
        places: what to call the place of a change that is wrong, by its key: ``--set weights``. By
            default the file's name and the key.

    Returns:
        The settings, with absolute paths and with ``preset`` and ``scale`` applied.

    Raises:
        SettingsError: names the file and the key.
    """
    path = Path(path)
    with naming_places(places or {}, path):
        return _load(path, dict(changes or {}), training, uploaded)


def _load(path: Path, changes: dict[str, Any], training: bool, uploaded: Path | None) -> Config:
    content = read_yaml(path)
    content["rank_space"] = changes.pop("rank_space", content.get("rank_space", {}))
    if isinstance(content["rank_space"], str):
        content["rank_space"] = _space_file(path, content["rank_space"], uploaded)
    budget = changes.get("trial_budget", content.get("trial_budget"))
    setting = budget if isinstance(budget, str) else Config.model_fields["trial_budget"].default
    with as_one_line(where=str(path)):
        changes = as_settings(changes, setting)
    for dotted, value in changes.items():
        set_dotted(content, dotted, value)
    _apply_preset(content, path)
    context = {"training": training, "uploaded": uploaded}
    config = _validated(config_type(), content, path, path.parent, **context)
    if config.search.tensorboard:
        logger.warning("search.tensorboard: deprecated; write trainer.logger: tensorboard")
    return _scaled(config)


@contextmanager
def naming_places(places: Mapping[str, str], source: str | Path = "") -> Iterator[None]:
    """Let an error in a change begin with the place that the change comes from.

    Args:
        places: what to call the place of each change, by its key: ``--set weights``.
        source: the file that such an error would name in its place.
    """
    try:
        yield
    except SettingsError as error:
        text = str(error).removeprefix(f"{source}: ")
        for key in sorted(places, key=len, reverse=True):
            if text.startswith((f"{key}: ", f"{key}.")):
                raise SettingsError(f"{places[key]}{text.removeprefix(key)}") from None
        raise


def config_type() -> type[Config]:
    """Return `Config` with a section for each stage that another package has added."""
    stages = STAGES.load_foreign()
    return _config_with(tuple((name, stage.settings) for name, stage in stages.items()))


@lru_cache
def _config_with(sections: tuple[tuple[str, type[Section]], ...]) -> type[Config]:
    if not sections:
        return Config
    fields: dict[str, Any] = {name: (section | None, None) for name, section in sections}
    return create_model("Config", __base__=Config, **fields)


def dump_config(config: Config) -> dict[str, Any]:
    """Return settings as JSON holds them, without sections of other packages that are not set."""
    content = config.model_dump(mode="json")
    return {k: v for k, v in content.items() if v is not None or k in Config.model_fields}


def _apply_preset(content: dict[str, Any], path: Path) -> None:
    """Set what the settings' ``preset`` fixes; refuse a setting that says otherwise.

    What it only recommends, its training, is set where the settings say nothing of it.
    """
    preset = content.get("preset")
    if preset == "paper" and content.get("plan") is None:
        content.setdefault("rule", "search")
    for section, fixed in PRESETS.get(preset if isinstance(preset, str) else "", {}).items():
        values = content.setdefault(section, {})
        if not isinstance(values, dict):
            continue  # the schema refuses it
        for key, value in fixed.items():
            if values.setdefault(key, value) != value:
                sets = f"preset {preset!r} sets it to {value!r}"
                raise SettingsError(f"{path}: {section}.{key}: {sets}, found {brief(values[key])}")
    for key, recipe in RECIPES.get(preset if isinstance(preset, str) else "", {}).items():
        if isinstance(recipe, dict) and isinstance(content.setdefault(key, {}), dict):
            for name, value in recipe.items():
                by_size = isinstance(value, dict)
                content[key].setdefault(name, value[_image_size(content)] if by_size else value)
        elif not isinstance(recipe, dict):
            content.setdefault(key, recipe)


def _image_size(content: Mapping[str, Any]) -> Literal["small", "large"]:
    """Tell whether a run's images are as small as CIFAR-10's, or of ImageNet's kind."""
    data = content.get("data")
    size = data.get("size", 32) if isinstance(data, dict) else 32
    sides = size if isinstance(size, list) else [size]
    is_large = any(_is_number(side) and side > _SMALL_IMAGE for side in sides)
    return "large" if is_large else "small"


def _space_file(path: Path, name: str, uploaded: Path | None) -> Any:
    """Read the rank space's own file; it is empty here if it is another machine's."""
    try:
        file = path.parent / expanded(name)
        if uploaded is not None:
            if file == expanded(name):
                return {}
            check_uploaded(file, uploaded)
    except ValueError as error:
        raise SettingsError(f"{path}: rank_space: {error}") from None
    return read_yaml(file, key="rank_space")


def _scaled(config: Config) -> Config:
    """Reduce epochs and images by the setting ``scale``."""
    if config.scale == 1:
        return config
    root = math.sqrt(config.scale)
    share = root * config.data.share
    parts: dict[str, Section] = {"data": config.data.model_copy(update={"share": share})}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if not isinstance(section, Section):
            continue
        changes: dict[str, Any] = {}
        if hasattr(section, "calibration_images"):
            images = section.calibration_images
            least = min(images, _FEWEST_IMAGES)
            changes["calibration_images"] = max(least, round(config.scale * images))
        if isinstance(section, Training) and section.epochs:
            changes["epochs"] = min(section.epochs, max(1, round(root * section.epochs)))
        if isinstance(section, Search):
            warmup = math.ceil(root * section.warmup_epochs)
            changes["warmup_epochs"] = min(warmup, math.ceil(changes["epochs"]) - 1)
        if changes:
            parts[name] = section.model_copy(update=changes)
    return config.model_copy(update=parts)


EARLIER: dict[str, Any] = {
    "cost.runtime": "torch",
    "cost.dtype": "float32",
    "cost.predictor": None,
    "cost.graph": False,
    "cost.tf32": True,
    "data.arguments": {},
    "data.channels": None,
    "data.classes": None,
    "data.exif": False,
    "prune.ranks": "prune",
    "prune.sparsity_schedule": "none",
    "search.average": 0.0,
    "search.budget_range": None,
    "search.compile": False,
    "search.supernet": "separate",
}
"""Settings that earlier versions did not have, and the values that stand for what they did."""


def earlier_of(section: str) -> dict[str, Any]:
    """Return the keys of `EARLIER` in a section, and their values."""
    start = f"{section}."
    return {key.removeprefix(start): v for key, v in EARLIER.items() if key.startswith(start)}


def parse_config(
    content: Mapping[str, Any],
    source: str | Path,
    folder: Path = Path(),
    *,
    files: bool = True,
    places: Mapping[str, str] | None = None,
) -> Config:
    """Validate settings that a run has saved.

    A saved section has every key; one that is missing did not exist, and stands for `EARLIER`. The
    step between ranks, where it was left open, was the paper's. (Ranks were equal: that was saved.)

    Args:
        content: keys and values.
        source: where they are from, for messages.
        folder: what relative paths are relative to.
        files: whether the files that they name have to be there.
        places: what to call the place of a change that is wrong; see `load_config`.

    Raises:
        SettingsError: names the source and the key.
    """
    kind = config_type()
    known = {key: value for key, value in content.items() if key in kind.model_fields or value}
    for key in known:
        if key not in kind.model_fields:
            missing = "no stage has this name; is its package installed?"
            raise SettingsError(f"{source}: {key}: {missing}")
    space, search = known.get("rank_space"), known.get("search")
    if isinstance(space, Mapping) and isinstance(search, Mapping) and "supernet" not in search:
        known["rank_space"] = {**space, "step": space.get("step") or "paper"}
    for dotted, value in EARLIER.items():
        section, key = dotted.split(".")
        if isinstance(known.get(section), Mapping):
            known[section] = {key: value, **known[section]}
    with naming_places(places or {}, source):
        return _validated(kind, known, source, folder, files=files)


def load_space(path: str | Path) -> Space:
    """Read and validate a rank space's own file.

    Raises:
        SettingsError: names the file and the key.
    """
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
        raise SettingsError(f"{source}: {explain(error, section)}") from None
    except ValueError as error:  # text that is none: pydantic has no message then
        raise SettingsError(f"{source}: {error}") from None


def set_dotted(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of nested sections in place.

    Raises:
        SettingsError: if the key's section is a plain value.
    """
    *sections, key = dotted.split(".")
    if dotted == "budget" and not isinstance(value, dict):
        sections, key = ["budget"], "fraction"
    if sections == ["budget"] and _is_number(content.get("budget")):
        content["budget"] = {"fraction": content["budget"]}
    for section in sections:
        if not isinstance(content.setdefault(section, {}), dict):
            raise SettingsError(f"{dotted}: {section!r} is not a section")
        content = content[section]
    if key in ("fraction", "absolute") and sections == ["budget"]:
        # They exclude each other: the one that is set last counts.
        content.pop("absolute" if key == "fraction" else "fraction", None)
    content[key] = value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
