"""The sections of a run's settings: keys, types and defaults; docs/reference/settings.md explains each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from nni_haloc.inputs.classes import class_names, what_is_wrong
from nni_haloc.inputs.normalisation import check_normalisation
from nni_haloc.inputs.options import (
    MOST_PROCESSES,
    Decomposition,
    Kind,
    LamSchedule,
    MemoryFormat,
    Pruner,
    Quantizer,
    Schedule,
)
from nni_haloc.inputs.registries import DATA, PREDICTORS, RULES, RUNTIMES
from nni_haloc.utils.errors import brief, expected_one_of, reason_of
from nni_haloc.utils.registry import Registry


class Section(BaseModel):
    """Keys and values of the settings, checked strictly; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def check_uploaded(path: Path, uploaded: Path) -> None:
    """Check that a path lies in the folder that NNI sends to another machine.

    Raises:
        ValueError: names both.
    """
    try:
        inside = path.resolve().is_relative_to(uploaded.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{path}: {error}") from None
    if not inside:
        raise ValueError(
            f"{path} is outside {uploaded}, the folder that is sent to the other machine"
        )


def expanded(path: str) -> Path:
    """Return a path with ``~`` written out.

    Raises:
        ValueError: if there is no such home folder, or the text has half of a character.
    """
    if not path.isascii() and path.encode("utf-8", "replace").decode() != path:
        raise ValueError(f"expected a path, found {brief(path)}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def _existing(path: str, info: ValidationInfo) -> str:
    folder: Path = (info.context or {}).get("folder", Path())
    found = folder / expanded(path)
    uploaded: Path | None = (info.context or {}).get("uploaded")
    if uploaded is not None:
        if found == expanded(path):  # absolute: the other machine's
            return path
        check_uploaded(found, uploaded)
    try:
        missing = (info.context or {}).get("files", True) and not found.exists()
    except OSError as error:  # a name that is too long
        raise ValueError(f"{brief(path)}: {error.strerror}") from None
    if missing:
        raise ValueError(f"no such file or folder: {found}")
    return str(found.absolute())


def _weights(path: str, info: ValidationInfo) -> str:
    """Return the absolute path of the weights; a training has yet to make the file."""
    context = info.context or {}
    if not context.get("training"):
        return _existing(path, info)
    folder: Path = context.get("folder", Path())
    return str((folder / expanded(path)).absolute())


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST


def _pin(value: Any) -> Any:
    pair = value if isinstance(value, list) and len(value) == 2 else [value]
    if value != "dense" and not all(map(_is_rank, pair)):
        raise ValueError(f"expected a rank, [r1, r2] or 'dense', found {brief(value)}")
    return tuple(value) if isinstance(value, list) else value


def _in_memory(value: Any) -> Any:
    if not isinstance(value, bool) and value != "device":
        raise ValueError(f"expected false, true or 'device', found {brief(value)}")
    return value


def _size(value: Any) -> Any:
    both = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(n) is int and 1 <= n <= _LARGEST for n in both):
        expected = f"expected pixels, 1 to {_LARGEST}, or [height, width]"
        raise ValueError(f"{expected}, found {value!r}")
    return value


def _channels(value: Any) -> Any:
    if type(value) is not int or value not in (1, 3):
        raise ValueError(f"expected 1 (grey) or 3 (colours), found {value!r}")
    return value


def _classes(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list):
        if wrong := what_is_wrong(value):
            raise ValueError(wrong)
        return value
    if not isinstance(value, str):
        expected = "expected the class of each output, or a file with one in each line"
        raise ValueError(f"{expected}, found {value!r}")
    path = _existing(value, info)
    if Path(path).exists():  # it may be another machine's
        try:
            class_names(path)
        except OSError as error:
            raise ValueError(reason_of(error)) from None
    return path


def _step(value: Any) -> Any:
    if value not in (None, "auto", "paper") and not _is_rank(value):
        raise ValueError(f"expected a positive integer, 'auto' or 'paper', found {brief(value)}")
    return value


def _between(low: float, high: float) -> Callable[[float], float]:
    """Return a check that a number is in a range; NaN is in none."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}, found {brief(value)}")
        return value

    return check


def _device(value: str) -> str:
    """Check the form of a device's name; whether this machine has it is the runtime's to say."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}(:[0-9]{1,4})?", value):
        expected = "expected the name of a device, such as cpu, cuda or cuda:1"
        raise ValueError(f"{expected}, found {brief(value)}")
    return value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Check that JSON can hold what a run keeps of its settings."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected plain values that JSON can hold ({error})") from None
    return value


def _one_of(*names: str | Registry[Any]) -> Callable[[str], str]:
    """Return a check that a value is one of some names.

    Registry names are looked up at each check.
    """

    def check(value: str) -> str:
        known = [name for part in names for name in ([part] if isinstance(part, str) else part)]
        if value not in known:
            raise ValueError(expected_one_of(known, value))
        return value

    return check


def _metric(name: str) -> str:
    """Check that a metric is one of ours, or that another package's predictor has its name."""
    return _one_of(*METRICS, *PREDICTORS.foreign())(name)


def _whole(value: float) -> float:
    """Return a whole number as an integer, for messages."""
    return int(value) if value == int(value) else value


WeightsPath = Annotated[str, AfterValidator(_weights)]
ExistingPath = Annotated[str, AfterValidator(_existing)]
Pin = Annotated[Any, AfterValidator(_pin)]
InMemory = Annotated[bool | Literal["device"], BeforeValidator(_in_memory)]
Step = Annotated[int | Literal["auto", "paper"] | None, BeforeValidator(_step)]
MOST = 1_000_000
"""The most epochs, images of a batch, channels and so on."""
Positive = Annotated[float, AfterValidator(_between(1e-12, 1e30))]
"""A rate or a factor: float32 holds it and its inverse, with room for products."""
NonNegative = Annotated[float, AfterValidator(_between(0, 1e30))]
Amount = Annotated[float, AfterValidator(_between(1e-18, 1e18))]
"""A cost, in any unit."""
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
Epochs = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_whole)]
Share = Annotated[float, Field(gt=0, le=1)]
_LARGEST = 16384
"""Height and width of an image."""
Size = Annotated[int | list[int], BeforeValidator(_size)]
Channels = Annotated[int, BeforeValidator(_channels)]
Classes = Annotated[list[str] | str, BeforeValidator(_classes)]
PerChannel = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
METRICS = ("macs", "params", "activation_bytes", "latency_ms", "cycles", "energy_pj", "energy_mj")
Metric = Annotated[str, AfterValidator(_metric)]
Rule = Annotated[str, AfterValidator(_one_of("search", "plan", RULES))]
DataName = Annotated[str, AfterValidator(_one_of(DATA))]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Device = Annotated[str, AfterValidator(_device)]
Arguments = Annotated[dict[str, Any], AfterValidator(_plain)]


class Model(Section):
    """The original network: a name (see `nni_haloc.inputs.models.build_model`) and arguments."""

    name: str
    arguments: Arguments = {}


_SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}
"""Shapes of the images of data sets that have one alone."""


class Data(Section):
    """The data set, and how it is split and read.

    The validation images are a fraction of the training images, or those that the file ``val_list``
    names. ``score`` says which images the final accuracies are of: a tuner that maximises them must
    have ``val``. ``in_memory: device`` makes batches there, see `nni_haloc.inputs.data.Splits`.
    ``share`` of all images are used, drawn by ``seed``. ``mean`` and ``std``, per channel, are
    those that the network was trained with. ``classes`` are those of the network's outputs, see
    `nni_haloc.inputs.classes.class_names`. ``arguments`` are for data sets that other packages add.
    """

    name: DataName
    arguments: Arguments = {}
    root: ExistingPath | None = None
    size: Size | None = None
    channels: Channels | None = None
    exif: bool = False
    classes: Classes | None = None
    test: str = "test"
    score: Literal["test", "val"] = "test"
    in_memory: InMemory = False
    download: bool = False
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    val_list: ExistingPath | None = None
    seed: Seed = 0
    mean: PerChannel | None = None
    std: PerChannel | None = None
    batch_size: Count = 128
    share: Share = 1.0
    workers: Annotated[int, Field(ge=0, le=MOST_PROCESSES)] = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image, ``(C, H, W)``."""
        if self.name in _SHAPES:
            return _SHAPES[self.name]
        size = self.size or 32
        height, width = size if isinstance(size, list) else (size, size)
        return self.channels or 3, height, width

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.arguments and self.name not in DATA.foreign():
            raise ValueError(f"arguments: data {self.name!r} takes none, found {self.arguments}")
        if self.name in ("cifar10", "folder") and self.root is None:
            raise ValueError(f"root: data {self.name!r} needs a folder")
        if self.name == "folder" and self.size is None:
            raise ValueError("size: data 'folder' needs the image size in pixels")
        self._check_pixels()
        if self.workers and self.in_memory == "device":
            expected = "expected 0 with in_memory 'device', whose batches can't leave a process"
            remedy = "set workers: 0, or in_memory: true"
            raise ValueError(f"workers: {expected}, found {self.workers}; {remedy}")
        return self

    def _check_pixels(self) -> None:
        """Check what is said of the images against what the data set has."""
        channels, *_ = self.shape
        if self.name in _SHAPES and self.channels not in (None, channels):
            raise ValueError(f"channels: data {self.name!r} has {channels}, found {self.channels}")
        if self.name in _SHAPES and self.exif:
            raise ValueError(f"exif: data {self.name!r} has no image files, expected false")
        known = self.name not in DATA.foreign() or self.channels is not None
        check_normalisation(self.mean, self.std, channels if known else None)


class Space(Section):
    """The rank space (see `nni_haloc.AllowedRanks`), and how its candidates are made.

    ``decomposition: auto`` is ``data``. ``equal`` left open lets the rule ``sensitivity-knapsack``
    choose r1 and r2 apart, where costs are counted.
    """

    step: Step = None
    dense: bool = True
    equal: bool | None = None
    kinds: list[Kind] = ["conv", "pointwise"]
    exclude: list[str] = []
    pin: dict[str, Pin] = {}
    decomposition: Decomposition | Literal["auto"] = "auto"
    calibration_images: Count = 512


class Cost(Section):
    """The cost that the budget limits, and how latency and energy are measured.

    ``predictor`` makes the table if there is none (None: the one named as the metric). The other
    keys hold for the reported latency, too; ``graph`` and ``tf32`` are of CUDA devices, see
    `nni_haloc.costs.device.torch_runtime.TorchRuntime`.
    """

    metric: Metric = "macs"
    predictor: Annotated[str, AfterValidator(_one_of(PREDICTORS))] | None = None
    table: ExistingPath | None = None
    runtime: Annotated[str, AfterValidator(_one_of(RUNTIMES))] = "torch"
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)] = 1
    memory_format: MemoryFormat = "contiguous"
    device: Device = "cpu"
    threads: Processes | None = None
    graph: bool = False
    tf32: bool = True


class Limit(Section):
    """A limit on the whole network's cost.

    Either a ``fraction`` of the original's, or ``absolute`` in the metric's unit.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    absolute: Amount | None = None

    @model_validator(mode="after")
    def _one(self) -> Limit:
        if (self.fraction is None) == (self.absolute is None):
            raise ValueError("expected either 'fraction' or 'absolute'")
        return self

    def of(self, original: float) -> float:
        """Return the limit in the metric's unit, for an original that costs ``original``."""
        return self.fraction * original if self.fraction is not None else float(self.absolute or 0)


class FurtherLimit(Limit):
    """A limit in another ``metric``, or by another ``table``."""

    metric: Metric
    table: ExistingPath | None = None


class Budget(Limit):
    """The limit in ``cost.metric``, and any number of others, ``also``; every one holds."""

    also: list[FurtherLimit] = []


class Training(Section):
    """Hold how a network is trained; see `nni_haloc.Recipe`.

    ``precision`` is Lightning's; bf16 can be twice as fast on processors that have it. ``compile``
    runs the passes as a captured graph (CUDA) or a compiled program (processor).
    """

    epochs: CountOrNone
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    schedule: Schedule = "step"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    compile: bool = False


class Distilled(Training):
    """A training that the original network may teach.

    ``distill`` is the share of the loss that is distance from the original's outputs; see
    `nni_haloc.finetune`.
    """

    distill: Annotated[float, Field(ge=0, le=1)] = 0.0


class Finetune(Distilled):
    """The fine-tuning of the compressed network.

    ``distill_features`` is the weight (Eq. 9's lambda) of the distance between the searched layers'
    outputs and the original's.
    """

    epochs: CountOrNone = 10
    distill_features: NonNegative = 0.0

    @model_validator(mode="after")
    def _seen_from_outside(self) -> Finetune:
        if self.compile and self.distill_features:
            why = "which compares outputs inside of the network"
            raise ValueError(f"compile: expected false with distill_features, {why}")
        return self


class Prune(Distilled):
    """Pruning by NNI (see `nni_haloc.prune`), and the fine-tuning after it.

    ``batches`` of training images are what ``taylor`` takes its gradients from.
    """

    epochs: CountOrNone = 10
    lr: Positive = 0.02
    pruner: Pruner = "l1"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    batches: Count = 20


class Quantize(Distilled):
    """Quantizing by NNI (see `nni_haloc.quantize`), and its training, which ``ptq`` does not have.

    ``int8`` quantizes the network for ONNX Runtime, too. Both are calibrated on
    ``calibration_images`` training images.
    """

    epochs: CountOrNone = 2
    lr: Positive = 0.001
    schedule: Schedule = "constant"
    quantizer: Quantizer = "ptq"
    calibration_images: Count = 512
    int8: bool = True

    @model_validator(mode="after")
    def _watched_by_nni(self) -> Quantize:
        if self.compile:
            raise ValueError("compile: expected false, because NNI's quantizers run eagerly")
        return self


class Train(Training):
    """The training of the original network, `haloc train`, where there are no weights yet."""

    epochs: Count = 200
    weight_decay: NonNegative = 5e-4
    schedule: Schedule = "onecycle"


class Trainer(Section):
    """Lightning's flags of the same names, for the search and all trainings.

    With several processes ``data.batch_size`` is that of each.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Processes = 1
    num_nodes: Processes = 1
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto"


class SearchOptions(Section):
    """Options of the search: those of `nni_haloc.Haloc`, which explains them."""

    lam: NonNegative = 1.0
    lam_schedule: LamSchedule = "constant"
    approach: Literal["features", "weights"] = "features"
    approach_share: Share = 0.125
    clip: Positive | None = 10.0
    objective: Literal["settle", "paper"] = "settle"
    eta: Positive = 1.0
    theta: NonNegative = 1.0
    alpha_lr: Positive = 0.03
    alpha_optimizer: Literal["adam", "sgd"] = "adam"
    alpha_every: Count = 8
    start_scale: Positive = 0.005
    warmup_epochs: CountOrNone = 0
    temperature: Positive = 1.0
    compile: bool = False
    select: Literal["knapsack", "argmax"] = "knapsack"
    min_use: Annotated[float, Field(ge=0, le=1)] = 0.95
    average: Annotated[float, Field(ge=0, lt=1)] = 0.99
    budget_range: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _range(self) -> SearchOptions:
        if self.budget_range is not None:
            low, high = self.budget_range
            if low >= high:
                expected = "expected two rising fractions"
                raise ValueError(f"budget_range: {expected}, found {self.budget_range}")
            if self.objective == "paper":
                expected = "expected none with objective 'paper', which settles at no budget"
                raise ValueError(f"budget_range: {expected}, found {self.budget_range}")
        return self


class Search(SearchOptions, Training):
    """The search: the options of `Haloc`, and the training of the weights in it.

    ``start`` says what alpha starts from. `Haloc` takes the measured values themselves under that
    name, and without them all candidates start alike. ``supernet`` says whether the candidates of a
    layer have weights of their own or share one set of factors, see `RankSpace`.
    """

    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    epochs: Epochs = 1  # type: ignore[assignment]  # a fraction, unlike other trainings
    lr: Positive = 0.02
    schedule: Schedule = "constant"
    start: Literal["uniform", "sensitivity"] = "sensitivity"
    supernet: Literal["nested", "separate"] = "nested"
    tensorboard: bool = False
