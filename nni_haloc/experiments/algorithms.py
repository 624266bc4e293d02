"""Make an experiment's tuner and assessor as NNI does, and ask the tuner for parameters.

    python -m nni_haloc.experiments.algorithms RESULT.json < TASK.json

does it in a process of its own, for classes that are not NNI's: their import may do anything.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nni_haloc.experiments.keys import spell_section
from nni_haloc.utils.errors import SettingsError, expected_one_of, first_line, unknown_key
from nni_haloc.utils.quiet import silent

_SECONDS = 60
"""For a class of the user's own to come up; NNI's manager waits for ten."""
_WRITERS = ("NetworkMorphism",)
"""NNI's algorithms that write files where they are made."""
NOT_OF_SETTINGS = ("NetworkMorphism", "RegularizedEvolutionTuner")
"""NNI's tuners that give a trial something else than values of the search space."""
ADVISORS = "nni_haloc.experiments.advisors"
"""The module of NNI's advisors that run."""
_MODES = ("maximize", "minimize")
_PACKAGES = {
    "SMAC": "smac4nni ConfigSpaceNNI",  # not smac, which has other modules
    "BOHB": "ConfigSpace statsmodels",
    "Anneal": "hyperopt==0.1.2",
    "TPE_legacy": "hyperopt==0.1.2",
    "DNGO": "pybnn",
    "PPO": "gym",
}
"""What NNI's own algorithms need beside NNI (its extras; their modules have other names)."""
_CHECKPOINTS = "NNI_CHECKPOINT_DIRECTORY"
"""Where NNI's manager has a tuner keep its state: PBT names folders in it."""


@dataclass
class Algorithm:
    """A tuner, an advisor or an assessor.

    Attributes:
        key: its section of the experiment's file: ``tuner``, ``advisor`` or ``assessor``.
        config: the section, as NNI's manager gets it.
        foreign: whether its class is not NNI's own.
        advisor: whether it is a tuner that stops trials, too, such as Hyperband.
        defaults: values of its constructor's arguments that the section leaves open.
    """

    key: str
    config: dict[str, Any]
    foreign: bool = True
    advisor: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the section calls it."""
        return self.config.get("name") or self.config["className"]

    @property
    def budgets(self) -> list[int]:
        """The least and the most that an advisor gives a trial, as `TRIAL_BUDGET`.

        Raises:
            ValueError: if its arguments allow none.
        """
        given = {**self.defaults, **(self.config.get("classArgs") or {})}
        least, most = given.get("min_budget", 1), given.get("R", given.get("max_budget", 1))
        eta = given.get("eta", 2)
        if not (1 <= least <= most and eta >= 2):
            keys = "R above 0" if "R" in given else "min_budget above 0, not above max_budget"
            raise ValueError(f"classArgs: expected {keys}, and eta of 2 or more")
        halvings = math.floor(math.log(most / least, eta) + 1e-6)
        return sorted({math.floor(most / eta**halvings + 1e-6), most})

    @property
    def optimize_mode(self) -> str | None:
        """Whether it maximises or minimises; None where that means nothing to it."""
        mode = "optimize_mode"
        return (self.config.get("classArgs") or {}).get(mode, self.defaults.get(mode))


def check_classes(path: Path, content: Mapping[str, Any]) -> None:
    """Check how an experiment's file names its tuner and its assessor.

    Args:
        path: the file.
        content: what it says.

    Raises:
        SettingsError: names the key.
    """
    for key in ("tuner", "advisor", "assessor"):
        if content.get(key) is not None:
            _check_class(path, key, spell_section(content[key]))


def _check_class(path: Path, key: str, section: Mapping[str, Any]) -> None:
    at, name, own = f"{path}: {key}", section.get("name"), section.get("className")
    if name and own:
        raise SettingsError(f"{at}: expected either name or className, found both")
    if not name and not own:
        raise SettingsError(f"{at}.name: missing; expected a name, or className and codeDirectory")
    if not own:
        return
    folder = section.get("codeDirectory")
    if "." not in own:
        raise SettingsError(f"{at}.className: expected module.Class, found {own!r}")
    if not folder:
        raise SettingsError(f"{at}.codeDirectory: missing; expected the folder of {own}")
    place = path.parent / os.path.expanduser(folder)
    if not os.path.isdir(place):
        raise SettingsError(f"{at}.codeDirectory: no such folder: {place}")


def find_algorithms(
    path: Path, content: Mapping[str, Any], experiment: Mapping[str, Any]
) -> list[Algorithm]:
    """Return an experiment's tuner and, if it has one, its assessor.

    Args:
        path: the experiment's file.
        content: what it says.
        experiment: what nnictl would send to its manager (`as_sent`).

    Raises:
        SettingsError: if NNI knows no algorithm of a name.
    """
    found = [Algorithm("advisor" if content.get("advisor") else "tuner", experiment["tuner"])]
    if experiment.get("assessor"):
        found.append(Algorithm("assessor", experiment["assessor"]))
    for algorithm in found:
        if algorithm.config.get("name"):
            _look_up(path, algorithm)
    return found


def try_algorithms(
    path: Path, algorithms: list[Algorithm], space: Mapping[str, Any], number: int
) -> list[Any]:
    """Make the algorithms, give the tuner the search space, and ask it for parameters.

    Args:
        path: the experiment's file.
        algorithms: the tuner, and perhaps an assessor.
        space: the search space.
        number: of parameters.

    Returns:
        What the tuner gives the first trials; nothing of an advisor, which needs a manager.

    Raises:
        SettingsError: with the algorithm's own words, if it can't be made or refuses the space.
    """
    sent = json.loads(json.dumps(space))
    parameters: list[Any] = []
    for algorithm in algorithms:
        attempt = _try_apart if algorithm.foreign or algorithm.name in _WRITERS else _try
        outcome = attempt(algorithm, sent, number)
        if "reason" in outcome:
            raise SettingsError(f"{path}: {outcome['reason']}")
        algorithm.advisor = outcome["advisor"]
        algorithm.defaults = outcome["defaults"]
        parameters = outcome.get("parameters", parameters)
    tuner = algorithms[0]
    if not parameters and not tuner.advisor:
        raise SettingsError(f"{path}: {tuner.key}: {tuner.name} makes no parameters of this space")
    return parameters


def _look_up(path: Path, algorithm: Algorithm) -> None:
    """Find a name among NNI's algorithms, and those that ``nnictl algo register`` has added."""
    from nni.tools.package_utils import config_manager

    at, name = f"{path}: {algorithm.key}", algorithm.config["name"]
    kind = "assessor" if algorithm.key == "assessor" else "tuner"
    every = config_manager.get_all_algo_meta()
    known = [
        meta.name
        for meta in every
        if meta.algo_type == kind
        and meta.name not in NOT_OF_SETTINGS
        and not (meta.is_builtin and meta.is_advisor)  # they end at the first result
    ]
    meta = config_manager.get_algo_meta(name)
    if meta is not None and meta.algo_type != kind:
        other = meta.algo_type
        raise SettingsError(
            f"{at}.name: expected one of {', '.join(known)}, found the {other} {name!r}"
        )
    if meta is None:
        raise SettingsError(f"{at}.name: {expected_one_of(known, name)}")
    algorithm.foreign, algorithm.advisor = not meta.is_builtin, meta.is_advisor


def _try(algorithm: Algorithm, space: dict[str, Any], number: int) -> dict[str, Any]:
    """Make an algorithm in this process.

    Returns:
        ``reason``, if it can't be made; else ``advisor``, ``defaults``, and the ``parameters`` that
        it gives to trials.
    """
    at, name = algorithm.key, algorithm.name
    with warnings.catch_warnings(), silent("nni"), _with_checkpoints():
        warnings.simplefilter("ignore")
        try:
            kind = _class_of(algorithm)
            outcome = _facts(kind)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package == str(algorithm.config.get("className")).partition(".")[0]:
                folder = algorithm.config["codeDirectory"]
                return {"reason": f"{at}.className: {name}: no module {error.name} in {folder}"}
            lacks = f"{name} needs the package {package}, which is not installed"
            wanted = _PACKAGES.get(nni_name(algorithm), package)
            return {"reason": f"{at}: {lacks} (pip install {wanted})"}
        except Exception as error:
            return {"reason": f"{at}: {name} can't be imported: {_said(error)}"}
        try:
            _check_arguments(algorithm, kind)
            if outcome["advisor"]:  # it would look for its manager
                inspect.signature(kind).bind(**(algorithm.config.get("classArgs") or {}))
                return outcome
            made = _made(algorithm)
        except Exception as error:
            return {"reason": f"{at}.classArgs: {_said(error)}"}
        if at == "assessor":
            return outcome
        try:
            made.update_search_space(space)
            # a tuner may call back with parameters that it makes later
            parameters = made.generate_multiple_parameters(
                list(range(number)), st_callback=lambda *_: None
            )
            return outcome | {"parameters": json.loads(_as_json(parameters))}
        except Exception as error:
            return {"reason": f"searchSpace: {name} does not take it: {_said(error)}"}


@contextmanager
def _with_checkpoints() -> Iterator[None]:
    """Name a folder for a tuner's state, as NNI's manager does; nothing is written there."""
    missing = _CHECKPOINTS not in os.environ
    os.environ.setdefault(_CHECKPOINTS, "checkpoint")
    try:
        yield
    finally:
        if missing:
            del os.environ[_CHECKPOINTS]


def nni_name(algorithm: Algorithm) -> str:
    """Return the name that NNI lists an algorithm under; empty for a class of the user's own."""
    from nni.tools.package_utils import config_manager

    own = str(algorithm.config.get("className"))
    if own.startswith(f"{ADVISORS}."):
        return own.rpartition(".")[2]
    name = algorithm.config.get("name")
    meta = config_manager.get_algo_meta(name) if name else None
    return meta.name if meta is not None else ""


def _facts(kind: Any) -> dict[str, Any]:
    from nni.runtime.msg_dispatcher_base import MsgDispatcherBase

    values = {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if isinstance(parameter.default, (str, int, float, bool))
    }
    return {
        "advisor": isinstance(kind, type) and issubclass(kind, MsgDispatcherBase),
        "defaults": values,
    }


def _class_of(algorithm: Algorithm) -> Any:
    """Import an algorithm's class, as NNI does."""
    from importlib import import_module

    from nni.tools.package_utils import config_manager

    name = algorithm.config.get("className")
    if name:
        sys.path.append(algorithm.config["codeDirectory"])
    else:
        name = config_manager.get_algo_meta(algorithm.config["name"]).class_name
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _check_arguments(algorithm: Algorithm, kind: Any) -> None:
    """Check the arguments, by NNI's own validator, too, which NNI 3 itself no longer asks.

    Raises:
        ValueError: or whatever the validator raises.
    """
    from nni.tools.package_utils.tuner_factory import create_validator_instance
    from schema import SchemaError

    arguments = algorithm.config.get("classArgs") or {}
    mode = arguments.get("optimize_mode", _MODES[0])
    if mode not in _MODES:
        raise ValueError(f"optimize_mode: {expected_one_of(_MODES, mode)}")
    taken = inspect.signature(kind).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        for key in arguments:
            if key not in taken:
                raise ValueError(f"{key}: {unknown_key(key, taken)}")
    if not algorithm.config.get("name"):
        return
    role = "assessors" if algorithm.key == "assessor" else "tuners"
    validator = create_validator_instance(role, algorithm.config["name"])
    if validator is None:
        return
    # Most validators want a mode that the class itself does not. Some don't know one, or lack
    # arguments that the class has, such as PBT's `factor`.
    known = {"optimize_mode": mode, **arguments}
    while True:
        try:
            validator.validate_class_args(**known)
            return
        except SchemaError as error:
            unknown = [key for key in known if f"Wrong key '{key}'" in str(error)]
            if not unknown:
                raise
            del known[unknown[0]]


def _made(algorithm: Algorithm) -> Any:
    from nni.tools.package_utils import (
        create_builtin_class_instance,
        create_customized_class_instance,
    )

    if algorithm.config.get("className"):
        return create_customized_class_instance(algorithm.config)
    kind = "assessors" if algorithm.key == "assessor" else "tuners"
    arguments = algorithm.config.get("classArgs")
    return create_builtin_class_instance(algorithm.config["name"], arguments, kind)


def _as_json(parameters: Any) -> str:
    """Write parameters as the dispatcher sends them."""
    from nni.common.serializer import dump

    return str(dump(parameters))


def _said(error: Exception) -> str:
    """Return an algorithm's own words on one line, with the kind of error where they need it."""
    words = " ".join(str(error).split())[:300]
    plain = isinstance(error, (ValueError, RuntimeError)) or "Schema" in type(error).__name__
    return words if plain and words else f"{type(error).__name__}: {words or first_line(error)}"


def _try_apart(algorithm: Algorithm, space: dict[str, Any], number: int) -> dict[str, Any]:
    """Make an algorithm in a process of its own; see `_try`."""
    task = json.dumps({"algorithm": asdict(algorithm), "space": space, "number": number})
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [sys.executable, "-m", __name__, str(result)]
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        try:
            done = subprocess.run(
                words,
                input=task,
                capture_output=True,
                text=True,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            late = f"{algorithm.name} is not there after {_SECONDS} s; NNI's manager waits for 10"
            return {"reason": f"{algorithm.key}: {late}"}
        if not result.exists():
            last = (done.stderr.strip() or "no word").splitlines()[-1]
            ended = f"{algorithm.name} ends its process with status {done.returncode}: {last}"
            return {"reason": f"{algorithm.key}: {ended}"}
        return json.loads(result.read_text(encoding="utf-8"))


def _main(result: str) -> None:
    task = json.load(sys.stdin)
    algorithm = Algorithm(**task["algorithm"])
    outcome = _try(algorithm, task["space"], task["number"])
    Path(result).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1])
