"""Values of the settings: numbers within bounds, names, and what has a form of its own.

A type says in `Words` what may stand there where its bounds or names do not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from nni_haloc.inputs.classes import class_names, what_is_wrong
from nni_haloc.inputs.options import MOST_PROCESSES
from nni_haloc.inputs.registries import (
    DATA,
    LOGGERS,
    PREDICTORS,
    PRUNERS,
    QUANTIZERS,
    RULES,
    RUNTIMES,
)
from nni_haloc.inputs.schema.paths import existing
from nni_haloc.inputs.schema.section import Words
from nni_haloc.utils.errors import brief, expected_one_of, reason_of
from nni_haloc.utils.registry import Registry

MOST = 1_000_000
"""The most epochs, images of a batch, channels and so on."""
_LARGEST = 16384
"""Height and width of an image."""


@dataclass(frozen=True)
class Between:
    """Check that a number is in a range; NaN is in none."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        if not self.low <= value <= self.high:
            expected = f"expected a number from {self.low:g} to {self.high:g}"
            raise ValueError(f"{expected}, found {brief(value)}")
        return value


@dataclass(frozen=True)
class OneOf:
    """Check that a value is one of some names; a registry's are looked up at each check."""

    parts: tuple[str | Registry[Any], ...]

    def __call__(self, value: str) -> str:
        if value not in self.names():
            raise ValueError(expected_one_of(self.names(), value))
        return value

    def names(self) -> list[str]:
        """Return the names, those of other packages too."""
        return [name for part in self.parts for name in ([part] if isinstance(part, str) else part)]


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
    path = existing(value, info)
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


def _device(value: str) -> str:
    """Check the form of a device's name; whether this machine has it is the runtime's to say."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}(:[0-9]{1,4})?", value):
        expected = "expected the name of a device, such as cpu, cuda or cuda:1"
        raise ValueError(f"{expected}, found {brief(value)}")
    if value == "gpu":
        raise ValueError("expected torch's name of a device, found 'gpu'; did you mean 'cuda'?")
    return value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Check that JSON can hold what a run keeps of its settings."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected plain values that JSON can hold ({error})") from None
    return value


def _metric(name: str) -> str:
    """Check that a metric is one of ours, or that another package's predictor has its name."""
    return OneOf((*METRICS, *PREDICTORS.foreign()))(name)


def _whole(value: float) -> float:
    """Return a whole number as an integer, for messages."""
    return int(value) if value == int(value) else value


MOST_FACTOR = 1e30
"""The largest rate or factor."""
Positive = Annotated[float, AfterValidator(Between(1e-12, MOST_FACTOR))]
"""A rate or a factor: float32 holds it and its inverse, with room for products."""
NonNegative = Annotated[float, AfterValidator(Between(0, MOST_FACTOR))]
Amount = Annotated[float, AfterValidator(Between(1e-18, 1e18))]
"""A cost, in any unit."""
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
Epochs = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_whole)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

METRICS = ("macs", "params", "activation_bytes", "latency_ms", "cycles", "energy_pj", "energy_mj")
Metric = Annotated[str, AfterValidator(_metric), Words(", ".join(f"`{name}`" for name in METRICS))]
Rule = Annotated[str, AfterValidator(OneOf(("search", "plan", RULES)))]
Predictor = Annotated[str, AfterValidator(OneOf((PREDICTORS,)))]
RuntimeName = Annotated[str, AfterValidator(OneOf((RUNTIMES,)))]
PrunerName = Annotated[str, AfterValidator(OneOf((PRUNERS,)))]
QuantizerName = Annotated[str, AfterValidator(OneOf((QUANTIZERS,)))]
LoggerName = Annotated[str, AfterValidator(OneOf(("none", LOGGERS)))]
DataName = Annotated[str, AfterValidator(OneOf((DATA,)))]
Device = Annotated[str, AfterValidator(_device), Words("`cpu`, `cuda`, `cuda:1`, ...")]

Pin = Annotated[Any, AfterValidator(_pin), Words("rank, `[r1, r2]` or `dense`")]
InMemory = Annotated[
    bool | Literal["device"], BeforeValidator(_in_memory), Words("`false`, `true` or `device`")
]
Step = Annotated[
    int | Literal["auto", "paper"] | None,
    BeforeValidator(_step),
    Words("ranks, `auto` or `paper`"),
]
Size = Annotated[
    int | list[int],
    BeforeValidator(_size),
    Words(f"1 to {_LARGEST:,} pixels, or `[height, width]`"),
]
Channels = Annotated[int, BeforeValidator(_channels), Words("1 (grey) or 3 (colours)")]
Classes = Annotated[list[str] | str, BeforeValidator(_classes), Words("list of names, or file")]
PerChannel = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    Field(min_length=1),
    Words("number for each channel"),
]
Arguments = Annotated[dict[str, Any], AfterValidator(_plain), Words("keys and values")]
