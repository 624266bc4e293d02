"""The keys of an experiment's file, checked by the types that NNI itself has for them."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nni_haloc.utils.errors import (
    SettingsError,
    expected_one_of,
    first_line,
    unknown_key,
)
from nni_haloc.utils.quiet import silent

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    list: "a list",
    dict: "keys and values",
}
_DURATIONS = ("maxExperimentDuration", "maxTrialDuration")
_COUNTS = ("trialConcurrency", "maxTrialNumber")
_GONE = "openpai"
_LEVELS = ("fatal", "error", "warning", "info", "debug", "trace")


def spell_as_nni(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the keys of an experiment's file in NNI's spelling, which it takes in any.

    ``trial_concurrency`` and ``TrialConcurrency`` are ``trialConcurrency``.

    Args:
        path: the file.
        content: what it says.

    Raises:
        SettingsError: for a key that is none of NNI's, or that is there twice.
    """
    from nni.experiment.config import ExperimentConfig, utils

    if "trainingServicePlatform" in content:
        now = "now trainingService: {platform: ...}, trialCommand and searchSpace"
        raise SettingsError(f"{path}: trainingServicePlatform: the form of NNI 1; {now}")
    known = {
        utils.case_insensitive(name): utils.camel_case(name) for name in _names(ExperimentConfig)
    }
    spelt: dict[str, Any] = {}
    for key, value in content.items():
        name = known.get(utils.case_insensitive(key)) if isinstance(key, str) else None
        if name is None:
            raise SettingsError(f"{path}: {key}: {unknown_key(str(key), known.values())}")
        if name in spelt:
            raise SettingsError(f"{path}: {key}: {name} is there twice")
        spelt[name] = value
    return spelt


def spell_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of known keys in NNI's spelling."""
    from nni.experiment.config import CustomAlgorithmConfig, utils

    known = {
        utils.case_insensitive(name): utils.camel_case(name)
        for name in ("name", *_names(CustomAlgorithmConfig))
    }
    return {known[utils.case_insensitive(key)]: value for key, value in section.items()}


def check_keys(path: Path, content: Mapping[str, Any]) -> None:
    """Check an experiment's keys and values as nnictl does, and say more clearly what is wrong.

    Args:
        path: the file.
        content: what it says, as `spell_as_nni` returns it.

    Raises:
        SettingsError: names the key, what was expected and what was found.
    """
    from nni.experiment.config import ExperimentConfig

    if content.get("useAnnotation"):
        raise SettingsError(f"{path}: useAnnotation: expected false: NNI 3 has none, found true")
    if content.get("tuner") is None and content.get("advisor") is None:
        such = "such as {name: TPE, classArgs: {optimize_mode: maximize}}"
        raise SettingsError(f"{path}: tuner: missing; expected one {such}")
    if content.get("tuner") is not None and content.get("advisor") is not None:
        raise SettingsError(f"{path}: advisor: expected either a tuner or an advisor, found both")
    _check_section(path, "", ExperimentConfig, content)
    _check_numbers(path, content)


def _names(section: type) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _check_section(path: Path, at: str, section: type, content: Mapping[Any, Any]) -> None:
    """Check names and types of one section's keys, and of the sections in it."""
    from nni.experiment.config import utils

    hints = get_type_hints(section)
    fields = {utils.case_insensitive(name): name for name in _names(section)}
    spelt = [utils.camel_case(name) for name in fields.values()]
    found = set()
    for key, value in content.items():
        name = fields.get(utils.case_insensitive(key)) if isinstance(key, str) else None
        if name is None:
            raise SettingsError(f"{path}: {at}{key}: {unknown_key(str(key), spelt)}")
        found.add(name)
        _check_value(path, f"{at}{utils.camel_case(name)}", hints[name], value)
    for field in dataclasses.fields(section):
        required = field.default is dataclasses.MISSING and type(None) not in _parts(
            hints[field.name]
        )
        if required and field.name not in found and field.name not in _INHERITED:
            raise SettingsError(f"{path}: {at}{utils.camel_case(field.name)}: missing")


_INHERITED = ("trial_command", "trial_code_directory", "debug", "platform")
"""Fields that a training service takes from the experiment."""


def _check_value(path: Path, where: str, hint: Any, value: Any) -> None:
    from nni.experiment.config import utils

    service = where == "trainingService"
    inner: list[Any] = [part for part in _parts(hint) if dataclasses.is_dataclass(part)]
    if service or inner:
        several = isinstance(value, list) and (service or list in _parts(hint))
        for number, each in enumerate(value if several else [value]):
            at = f"{where}.{number}" if several else where
            kind = _service(path, at, each) if service else inner[0]
            if isinstance(each, Mapping) and (service or _is_whole(kind)):
                _check_section(path, f"{at}.", kind, each)
            elif not isinstance(each, Mapping) and each is not None:
                likely = f", such as {{name: {each}}}" if isinstance(each, str) else ""
                raise SettingsError(
                    f"{path}: {at}: expected keys and values{likely}, found {each!r}"
                )
        return
    wrong = isinstance(value, bool) and bool not in _parts(hint) and Any not in _parts(hint)
    if wrong or not utils.is_instance(value, hint):
        raise SettingsError(f"{path}: {where}: expected {_in_words(hint)}, found {value!r}")


def _is_whole(section: Any) -> bool:
    """Tell if a section has all fields that may stand in it; of some, classes below have more."""
    own = set(_names(section))
    return all(set(_names(below)) <= own for below in section.__subclasses__())


def _service(path: Path, where: str, value: Any) -> type:
    """Return NNI's class of a training service."""
    from nni.experiment.config.training_service import TrainingServiceConfig

    kinds = {kind.platform: kind for kind in _below(TrainingServiceConfig)}
    platform = value.get("platform") if isinstance(value, Mapping) else value
    if platform == _GONE:
        gone = f"NNI 3 takes {_GONE!r}, but its manager has no such service"
        raise SettingsError(f"{path}: {where}.platform: {gone}")
    if not isinstance(platform, str) or platform not in kinds:
        known = sorted(name for name in kinds if isinstance(name, str) and name != _GONE)
        raise SettingsError(f"{path}: {where}.platform: {expected_one_of(known, str(platform))}")
    return kinds[platform]


def _below(kind: Any) -> Iterator[Any]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def _parts(hint: Any) -> list[Any]:
    """Return the types of a union, and the type in a list or a dict as well."""
    if get_origin(hint) in (None, Literal) or not get_args(hint):
        return [hint]
    own = [] if get_origin(hint) not in _WORDS else [get_origin(hint)]
    return own + [part for inner in get_args(hint) for part in _parts(inner)]


def _in_words(hint: Any) -> str:
    """Say which values a type takes: ``a whole number or text``."""
    words: list[str] = []
    for part in get_args(hint) if get_origin(hint) not in (None, list, dict, Literal) else [hint]:
        if get_origin(part) is Literal:
            words += map(repr, get_args(part))
        elif part is not type(None):
            words.append(_WORDS.get(get_origin(part) or part, str(part)))
    if _WORDS[Path] in words:
        words = [_WORDS[Path]]
    return " or ".join(dict.fromkeys(words))


def _check_numbers(path: Path, content: Mapping[str, Any]) -> None:
    """Check counts and durations, which NNI asserts without a word."""
    from nni.experiment.config import utils

    for key in _COUNTS:
        if content.get(key) is not None and not content[key] > 0:
            raise SettingsError(f"{path}: {key}: expected a number above 0, found {content[key]}")
    for key in _DURATIONS:
        value = content.get(key)
        try:
            right = value is None or utils.parse_time(value) > 0
        except (ValueError, OverflowError):
            right = False
        if not right:
            expected = "expected a duration above 0, such as 90s, 30m, 2h or 1d"
            raise SettingsError(f"{path}: {key}: {expected}, found {value!r}")
    level = content.get("logLevel")
    if level is not None and level not in _LEVELS:
        raise SettingsError(f"{path}: logLevel: {expected_one_of(_LEVELS, level)}")


def as_sent(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what nnictl would send to its manager: all keys, and absolute paths.

    Args:
        path: the file.
        content: what it says, as `spell_as_nni` returns it.

    Raises:
        SettingsError: with NNI's words, if nnictl would refuse it.
    """
    from nni.experiment.config import ExperimentConfig, utils

    try:
        with silent("nni"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of passwords: nnictl gives it itself
            utils.set_base_path(path.parent)
            try:
                config = ExperimentConfig(**content)
            finally:
                utils.unset_base_path()
            return config.json()
    except Exception as error:  # NNI's own checks raise whatever comes
        raise SettingsError(f"{path}: NNI refuses it: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return NNI's message, or the condition that it asserts without one."""
    if str(error) or not isinstance(error, AssertionError):
        return first_line(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = (frame.line or "").removeprefix("assert ")
    return f"expected {line} in {inspect.getmodulename(frame.filename)}"
