"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from nni_haloc.utils.errors import SettingsError, expected_one_of

COMPRESS, COSTS, AFTER, NNI = "Compress", "Costs", "After a run", "NNI experiments"
"""Groups of commands in ``haloc --help``, in the order of the work."""

T = TypeVar("T")

RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.yml", help="Settings of the run.", show_default=False)
]
Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Folder of a finished run.", show_default=False),
]
StageFolder = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER",
        help="Folder of a finished run or of one of its stages.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the results.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, such as search.epochs=20; repeatable."
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="For a first try: do this share of the work, by fewer epochs and fewer images.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", metavar="", help="Go on from the checkpoint of an interrupted run."),
]
Code = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of your model's own code, if the settings name package.module:factory.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print JSON to standard output, nothing else.")
]

Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Network: resnet20, torchvision:resnet18, package.module:factory, ..."
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="SHAPE", help="Shape of one image or other input: 3x224x224, 128."
    ),
]
Batch = Annotated[int, typer.Option(metavar="N", help="Images in a batch.")]
RankSpace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File of the rank space, as in search_spaces/ (default: every convolution).",
    ),
]


def assignment(text: str) -> tuple[str, Any]:
    """Return the key and the value of ``KEY=VALUE``, the value read as YAML.

    Raises:
        SettingsError: if it is not of this form.
    """
    from nni_haloc.inputs.yaml_files import parse_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set: expected KEY=VALUE, found {text!r}")
    return key, parse_yaml(value, f"--set {key}")


def places_of(
    assignments: Iterable[str] | None, changes: Iterable[str], options: Mapping[str, str]
) -> dict[str, str]:
    """Return what to call each setting that the command line changes: ``--set KEY``, an option.

    Args:
        assignments: the values of ``--set``.
        changes: the keys of all that is changed.
        options: key to the option that sets it.
    """
    by_set = {text.partition("=")[0] for text in assignments or []}
    return {key: f"--set {key}" if key in by_set else options.get(key, key) for key in changes}


def comma_separated(option: str, text: str, number: Callable[[str], T], what: str) -> list[T]:
    """Return the numbers of ``0.6,0.5``.

    Raises:
        SettingsError: naming the ``option`` and ``what`` it expects.
    """
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(
            f"{option}: expected {what} separated by commas, found {text!r}"
        ) from None


def some_of(option: str, text: str, names: list[str]) -> list[str]:
    """Return the names of a comma-separated list, each once.

    Raises:
        SettingsError: if one is not among ``names``.
    """
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in names:
            expected = expected_one_of(names, name).replace("one of", "some of", 1)
            raise SettingsError(f"{option}: {expected}")
    return chosen


def trust(code: Path | None, folder: Path | None = None) -> bool:
    """Make the modules in ``code`` importable; return whether a model's own factory may run.

    Raises:
        SettingsError: if the network of ``folder`` is made by a factory, and no code is given; or
            if there is no such folder of code.
    """
    if code is None and folder is not None:
        from nni_haloc.runs.saved import factory_of

        if name := factory_of(folder):
            remedy = "add --code FOLDER-OF-THE-CODE to run it"
            raise SettingsError(f"{folder} was made by code of your own, {name}; {remedy}")
    if code is not None:
        from nni_haloc.inputs.models import add_code

        if not code.is_dir():
            raise SettingsError(f"--code: expected a folder, found none at {code}")
        add_code(code)
    return code is not None


def print_json(content: Any) -> None:
    """Print an object as indented JSON."""
    typer.echo(json.dumps(content, indent=2))
