"""A finished run's folder: its settings and networks, and the files with which they leave it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.inputs.config import parse_config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.runs.folder import EXPORT_FOLDER, METRICS_FILE, RANKS_FILE, WEIGHTS_FILE
from nni_haloc.runs.job import Job
from nni_haloc.runs.saved import load
from nni_haloc.utils.errors import SettingsError


class Finished:
    """A finished run's folder, or that of one of its stages, whose settings are the run's; `SettingsError` where it is neither.

    ``data``: whether the files that the settings name have to be there. ``factories``: call a model factory of one's own
    (``package.module:factory``) on the folder's word.
    """

    def __init__(self, folder: str | Path, *, data: bool = True, factories: bool = False) -> None:
        self.folder, self.factories = Path(folder), factories
        for file in (RANKS_FILE, WEIGHTS_FILE):
            if not (self.folder / file).is_file():
                raise SettingsError(
                    f"{self.folder / file}: no such file; expected the folder of a finished run"
                )
        source, settings = _settings(self.folder)
        self.config = parse_config(settings, source, files=data)

    @cached_property
    def job(self) -> Job:
        """With the data, and the original network."""
        return Job(self.config, self.folder, factories=self.factories)

    def example(self, batch: int) -> Tensor:
        """Random images."""
        return torch.randn(
            (batch, *self.config.data.shape), generator=torch.Generator().manual_seed(0)
        )

    def calibration_images(self) -> Tensor:
        """Training images, not augmented: as many as the settings' section ``quantize`` says, where it is set."""
        section = self.config.quantize or self.config.rank_space
        return self.job.splits.images("plain", section.calibration_images, self.config.seed)

    def networks(self) -> dict[str, nn.Module]:
        """``original``, ``haloc``, what the folder holds, and each further stage under its folder's name, in the order of their making."""
        try:
            original = self._untrained()
            load_weights(original, self.config.weights)
            stages = {
                folder.name: load(folder, self._untrained()) for folder in _stages(self.folder)
            }
            return {"original": original.eval(), "haloc": self.network(), **stages}
        except (OSError, ValueError) as error:
            raise SettingsError(str(error)) from None

    def network(self) -> nn.Module:
        """The folder's."""
        return load(self.folder, self._untrained())

    def _untrained(self) -> nn.Module:
        return build_model(
            self.config.model.name, self.config.model.arguments, factories=self.factories
        )


def _stages(folder: Path) -> list[Path]:
    """Folders in a run's that hold a network as it does itself, the oldest first."""
    found = [
        path
        for path in folder.iterdir()
        if all((path / file).is_file() for file in (RANKS_FILE, WEIGHTS_FILE))
    ]
    return sorted(
        (path for path in found if path.name != EXPORT_FOLDER),
        key=lambda path: (path / WEIGHTS_FILE).stat().st_mtime,
    )


def _settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Of the run in ``folder``, or that ``folder`` is a stage of, and the file where they stand."""
    for path in (folder / METRICS_FILE, folder.absolute().parent / METRICS_FILE):
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{path}: not a JSON file ({error})") from None
        if isinstance(content, dict) and isinstance(content.get("config"), dict):
            return path, content["config"]
    raise SettingsError(
        f"{folder / METRICS_FILE}: expected the settings of a finished run, found none; is the run finished?"
    )
