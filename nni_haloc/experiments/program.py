"""The program that an experiment's trials run, as far as it can be looked at from outside."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path

from nni_haloc.utils.errors import SettingsError

TRIAL = "nni_haloc.trial"
_EXPECTED = f"expected 'python3 -m {TRIAL} RUN.yml'"
_FIND = 'command -v -- "$1"'
_IMPORTABLE = (
    "from importlib.util import find_spec\n"
    "print(*[name for name in ('nni_haloc', 'nni', 'torch') if find_spec(name) is None])"
)


def trial_arguments(path: Path, command: str) -> list[str] | None:
    """Return the arguments of ``nni_haloc.trial``; None if the trials run something else.

    Args:
        path: the experiment's file.
        command: its ``trialCommand``.

    Raises:
        SettingsError: if the command is no shell command, or a slip of ``nni_haloc.trial``.
    """
    words = _words(path, command)
    at = f"{path}: trialCommand:"
    program = words[0].rpartition("/")[2] if words else ""
    if program == "haloc":
        why = "haloc asks NNI for no parameters and reports no results"
        raise SettingsError(f"{at} {_EXPECTED}, because {why}; found {command!r}")
    if TRIAL not in words:
        near = [word for word in words if get_close_matches(word, [TRIAL], cutoff=0.8)]
        if near:
            raise SettingsError(f"{at} {near[0]}: no such module; did you mean {TRIAL!r}?")
        return None
    if "torchrun" in program or "torch.distributed.run" in words:
        why = "each process would ask for parameters; trainer.devices starts as many as it says"
        raise SettingsError(f"{at} {_EXPECTED}, because {why}; found {command!r}")
    arguments = words[words.index(TRIAL) + 1 :]
    if arguments[:1] != ["measure"] and len(arguments) != 1:
        raise SettingsError(f"{at} {_EXPECTED}, found {command!r}")
    return arguments


def check_script(path: Path, command: str, code: Path) -> None:
    """Check that a Python script that the trials start by its path is there.

    Args:
        path: the experiment's file.
        command: its ``trialCommand``.
        code: the folder in which it runs.

    Raises:
        SettingsError: if it is not.
    """
    words = _program(_words(path, command))
    if len(words) < 2 or not re.fullmatch(r"(.*/)?python[\d.]*", words[0]):
        return
    script = words[1]
    if script.endswith(".py") and not re.search(r"[$~]", script) and not (code / script).is_file():
        raise SettingsError(f"{path}: trialCommand: {script}: no such file in {code.resolve()}")


def check_program(path: Path, command: str, code: Path) -> None:
    """Check that the program that the trials start is there and, if it is Python, has our package.

    Of a shell command of several parts only the first program is looked for.

    Args:
        path: the experiment's file.
        command: its ``trialCommand``, which bash runs.
        code: the folder in which it does so.

    Raises:
        SettingsError: if there is no such program, or its Python has no nni-haloc.
    """
    words = _program(_words(path, command))
    if not words:
        raise SettingsError(f"{path}: trialCommand: expected a program, found {command!r}")
    name = words[0]
    if re.search(r"[$`(){}*?~]", name):
        return  # the shell's to find out
    found = subprocess.run(
        ["bash", "-c", _FIND, "bash", name], cwd=code, capture_output=True, text=True, check=False
    )
    program = found.stdout.strip()
    if found.returncode or not program:
        where = f"in {code}" if "/" in name else "on the PATH"
        raise SettingsError(
            f"{path}: trialCommand: {name}: no such program {where}; activate the environment in "
            f"which nnictl is, or write the path of its Python ({sys.executable})"
        )
    if words[1:3] == ["-m", TRIAL] and program.startswith(("/", ".")):
        _check_packages(path, name, code / program, code)


def _words(path: Path, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise SettingsError(f"{path}: trialCommand: {error}") from None


def _program(words: list[str]) -> list[str]:
    """Return the words without the variables that are set before the program."""
    first = next((i for i, word in enumerate(words) if not re.match(r"[A-Za-z_]\w*=", word)), None)
    return [] if first is None else words[first:]


def _check_packages(path: Path, name: str, program: Path, code: Path) -> None:
    """Raise `SettingsError` if a Python has no package that a trial needs."""
    if os.path.dirname(os.path.abspath(program)) == os.path.dirname(sys.executable):
        return  # the one that runs this
    words = [str(program), "-c", _IMPORTABLE]
    done = subprocess.run(words, cwd=code, capture_output=True, text=True, check=False)
    missing = done.stdout.split()
    if done.returncode or missing:
        lacks = f"has no {', '.join(missing)}" if missing else "can't be started as Python"
        which = name if name == str(program) else f"{name} is {program}, which"
        raise SettingsError(
            f"{path}: trialCommand: {which} {lacks}; activate the environment in which nni-haloc "
            f"is, or write the path of its Python ({sys.executable})"
        )
