"""Paths in the settings: relative to the settings' file, and there when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from nni_haloc.inputs.schema.section import Words
from nni_haloc.utils.errors import brief


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


def existing(path: str, info: ValidationInfo) -> str:
    """Return the absolute path of a file or folder, which has to be there."""
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
        raise ValueError(f"no such file or folder: {found.absolute()}")
    return str(found.absolute())


def _weights(path: str, info: ValidationInfo) -> str:
    """Return the absolute path of the weights; a training has yet to make the file."""
    context = info.context or {}
    if not context.get("training"):
        return existing(path, info)
    folder: Path = context.get("folder", Path())
    return str((folder / expanded(path)).absolute())


WeightsPath = Annotated[str, AfterValidator(_weights), Words("file")]
ExistingPath = Annotated[str, AfterValidator(existing), Words("file or folder")]
