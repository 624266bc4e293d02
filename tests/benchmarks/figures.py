"""What made each picture of docs/images: command, commit, date, and the rows it was drawn from."""

import hashlib
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
NOTES = IMAGES / "figures.yml"


def notes(file: Path = NOTES) -> dict[str, dict[str, Any]]:
    """Return what is noted of each picture, by its path in docs/images."""
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}


def digest(file: Path) -> str:
    """Return the first 16 digits of a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def note(picture: Path, command: str, inputs: Iterable[Path], file: Path = NOTES) -> None:
    """Note what made a picture, unless it was made in the same way from the same rows before.

    Args:
        picture: in docs/images.
        command: the command line that draws it.
        inputs: the files that it is drawn from.
        file: where it is noted.
    """
    known = notes(file)
    name = picture.relative_to(file.parent).as_posix()
    digests = {path.relative_to(ROOT).as_posix(): digest(path) for path in inputs}
    before = known.get(name, {})
    if before.get("command") == command and before.get("inputs") == digests:
        return
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    made = {"command": command, "commit": commit, "date": date.today().isoformat()}
    known[name] = {**made, "inputs": digests}
    file.write_text(yaml.safe_dump(dict(sorted(known.items())), width=1000), encoding="utf-8")
