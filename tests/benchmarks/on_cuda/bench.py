"""Append rows to a file, none twice, each with the machine's and the code's names."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).parents[3]


class TimeIsUp(BaseException):
    """End whatever runs; no library takes it for an error of its own."""


@dataclass
class Bench:
    """Hold what all parts share.

    Attributes:
        data: folder of the images.
        out: the file of rows.
        work: folder for what a run leaves behind.
        device: ``cuda`` or ``cpu``.
        scale: share of the work; below 1 for a dry run.
        end: the time, by `time.monotonic`, at which the minutes are over.
        jobs: processes that share the device in the studies.
        epochs: of training in the long study.
    """

    data: Path
    out: Path
    work: Path
    device: str
    scale: float
    end: float
    jobs: int = 1
    epochs: int = 100

    @property
    def precision(self) -> str:
        """The precision of trainings; many processors have no fast bfloat16."""
        return "bf16-mixed" if self.device == "cuda" else "32-true"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def few(self, number: float, least: int = 1) -> int:
        """Return a number of steps, scaled."""
        return max(least, round(number * self.scale))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows so far."""
        if not self.out.exists():
            return []
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]

    def has(self, key: dict[str, Any]) -> bool:
        """Tell whether there is a row of this key and scale, without an error.

        Times are of this card; accuracies may be of any.
        """
        wanted = {**key, "scale": self.scale}
        if key["part"] not in ("long", "short", "fold"):
            wanted["device"] = card(self.device)
        return any(wanted.items() <= row.items() and "error" not in row for row in self.rows())

    def add(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Make a row that is missing, and append it; one that fails is a row with its error."""
        if not self.has(key):
            started = time.monotonic()
            facts = self.facts(make)
            self.append(key, facts, time.monotonic() - started)

    @staticmethod
    def facts(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a row says, or why it failed: the other rows are worth having."""
        try:
            return make()
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def append(self, key: dict[str, Any], facts: dict[str, Any], seconds: float) -> None:
        """Append a row."""
        row = {**key, **facts, "seconds": round(seconds, 2), "scale": self.scale}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | where(self.device)) + "\n")
        print(f"{seconds:7.1f} s  {key}  {facts.get('error', '')}", flush=True)

    def has_file(self, name: str) -> bool:
        """Tell whether the data have a file."""
        return (self.data / name).exists()


def card(device: str) -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def where(device: str) -> dict[str, Any]:
    """Return what every row says of the machine and the code."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        commit = done.stdout.strip() or None
    except OSError:  # no git
        commit = None
    return {
        "device": card(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "lightning": pl.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
