"""The folder of a run: its file names, their versions, and the order of its stages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeGuard

from nni_haloc.inputs.registries import STAGES
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.utils.errors import SettingsError, first_line
from nni_haloc.utils.files import read_json, write_json
from nni_haloc.utils.locks import LOCK_FILE, hold_folder
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first

METRICS_VERSION = 2
SEARCH_VERSION = 1
THROUGHPUT_VERSION = 1

Figures = dict[str, float]
"""Measured figures of one network: ``top1`` and ``top5`` (0 to 1), ``latency_ms``, ``macs``,
``params``, ``bytes`` of its file of weights, and others that a stage measures."""

_OLD_STAGES = {"baseline_": "original", "pruned_": "prune", "quantized_": "quantize"}
"""Prefixes of version 1's flat metrics, and the stages that they stood for."""
_OLD_ORDER = ("original", "finetune", "prune", "quantize")
_OLD_OWN = ("onnx_", "int8_")
"""Prefixes of figures that the stage ``quantize`` has under the same names today."""
_OLD_DERIVED = ("default", "speedup", "macs_reduction", "params_reduction")
"""Keys that version 1 had beside the measured figures."""


class RunFolder:
    """Name the files of a run's folder, or of the folder of one of its stages.

    A run leaves in its folder::

        ranks.json  layers.json  costs.json  weights.safetensors  model.json  metrics.json
        search.json  log.txt
        search/      state and history of the search
        finetuning/  state and history of the fine-tuning; in start/ the network of an earlier trial
        pruned/, quantized/, ...   a folder for each further stage, with the same files

    Commands add ``bench.json``, ``report.html``, ``plan.png``, ``export/`` and ``front/``.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ranks = self.path / "ranks.json"
        self.layers = self.path / "layers.json"
        self.costs = self.path / "costs.json"
        self.weights = self.path / "weights.safetensors"
        self.model = self.path / "model.json"
        self.metrics_file = self.path / "metrics.json"
        self.search_file = self.path / "search.json"
        self.log = self.path / "log.txt"
        self.bench = self.path / "bench.json"
        self.report = self.path / "report.html"
        self.plan_picture = self.path / "plan.png"
        self.export = self.path / "export"
        self.front = self.path / "front"
        self.throughput = self.path / "throughput.json"
        self.calibration = self.path / "quantization.json"
        self.measured_table = self.path / "table.json"
        self.lock = self.path / LOCK_FILE
        self.reported = self.path / "reported.json"
        self.searching = Training(self.path / "search")
        self.finetuning = Training(self.path / "finetuning")
        self.start = self.finetuning.path / "start"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def training(self) -> Training:
        """State and history of the training of a stage that has this folder to itself."""
        return Training(self.path)

    def further_costs(self, number: int) -> Path:
        """Return the file of the cost table of the limit ``budget.also[number]``."""
        return self.path / f"costs-also{number}.json"

    @property
    def holds_network(self) -> bool:
        """Whether a compressed network is in the folder, in files that can be read."""
        try:
            RankPlan.load(self.ranks)
            tensor_shapes(self.weights)
        except (OSError, ValueError):
            return False
        return True

    def check_holds_network(self) -> None:
        """Check that a compressed network is in the folder.

        Raises:
            SettingsError: names the file that is missing.
        """
        if not self.path.is_dir():
            raise SettingsError(f"{self}: no such folder; expected that of a finished run")
        for file in (self.ranks, self.weights):
            if not file.is_file():
                raise SettingsError(f"{file}: no such file; expected the folder of a finished run")

    def stages(self) -> dict[str, RunFolder]:
        """Return the further stages' folders by their names, in the order of the pipeline.

        A folder without figures comes last; folders of one stage are in the order of their names.
        Whoever reads a network says what is wrong with its files.
        """
        others = {self.export.name, self.front.name}
        folders = [RunFolder(path) for path in self.path.iterdir() if path.name not in others]
        folders = [f for f in folders if f.ranks.is_file() and f.weights.is_file()]
        folders.sort(key=lambda folder: (folder._place(), folder.path.name))
        return {folder.path.name: folder for folder in folders}

    def _place(self) -> int:
        """Return the place in the pipeline of the stage that has left this folder."""
        order = list(STAGES)
        try:
            stage = next(iter(self.read_metrics()["stages"]), "")
        except SettingsError:  # whoever reads the figures says what is wrong with them
            return len(order)
        return order.index(stage) if stage in order else len(order)

    def clear(self, *stages: str) -> None:
        """Remove what an earlier run left here; files that are not a run's stay.

        Of a link in the place of a folder, the link is removed, not what it leads to.

        Args:
            stages: names of the further stages' folders.
        """
        if not is_first() or not self.path.is_dir():
            return
        if self.metrics_file.exists():
            logger.info("%s: replacing the results of an earlier run", self)
        files = [self.ranks, self.weights, self.metrics_file, self.model, self.bench]
        files += [self.search_file, self.report, self.layers, self.plan_picture]
        for file in files:
            file.unlink(missing_ok=True)
        folders = [self.searching.path, self.finetuning.path, self.front, self.export]
        own = Path(os.path.abspath(self.path))
        inside = [own / name for name in stages if Path(os.path.abspath(own / name)).parent == own]
        for folder in (*folders, *inside):
            if folder.is_symlink():
                folder.unlink()
            elif folder.exists():
                shutil.rmtree(folder)

    def write_metrics(self, stages: Mapping[str, Figures], **facts: Any) -> None:
        """Write ``metrics.json``.

        Args:
            stages: name of a stage (``original`` for the original network) to its figures.
            facts: what else the file says: ``config``, ``parameters``, ``versions``, ``identity``.
        """
        nested = {name: dict(figures) for name, figures in stages.items()}
        write_json(self.metrics_file, {"version": METRICS_VERSION, "stages": nested, **facts})

    def read_metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``, of any version, in today's form; empty where there is no file.

        Returns:
            ``stages`` (name of a stage to its figures), ``config``, ``parameters`` and
            ``versions``, each a dict that may be empty; for a stage also ``identity``.

        Raises:
            SettingsError: if the file is damaged.
        """
        content = self._read_json()
        if "metrics" in content and "stages" not in content:
            content["stages"] = _nested(_section(self.metrics_file, content, "metrics"))
            if "finetune" in content["stages"] and self.weights.is_file():
                content["stages"]["finetune"].setdefault("bytes", self.weights.stat().st_size)
        for key in ("stages", "config", "parameters", "versions", "identity"):
            content[key] = _section(self.metrics_file, content, key)
        for name, figures in content["stages"].items():
            if not isinstance(figures, dict):
                kind = type(figures).__name__
                raise SettingsError(f"{self.metrics_file}: {name}: expected figures, found {kind}")
        return content

    def metrics(self) -> dict[str, Figures]:
        """Return the figures of the original network and of every stage, in the order of the run.

        Those of stages that a command of their own made are read from the stages' folders. The
        folder of a stage's own name comes before the run's word: a command may have made the stage
        anew.

        Raises:
            SettingsError: if a file is damaged.
        """
        found = dict(self.read_metrics()["stages"])
        if self.path.is_dir():
            for folder in self.stages().values():
                for name, figures in folder.read_metrics()["stages"].items():
                    if name not in found or _is_own_folder(folder, name):
                        found[name] = figures
        return found

    def _read_json(self) -> dict[str, Any]:
        if not self.metrics_file.is_file():
            return {}
        content = read_json(self.metrics_file, finite=False)  # version 1 may hold NaN
        version = content.get("version", 1)
        if version not in (1, METRICS_VERSION):
            expected = f"metrics of version {METRICS_VERSION}"
            raise SettingsError(f"{self.metrics_file}: expected {expected}, found {version!r}")
        return content


def _is_own_folder(folder: RunFolder, stage: str) -> bool:
    """Tell whether a folder has the name under which a run leaves a stage of this package."""
    return stage in STAGES.own() and folder.path.name == getattr(STAGES[stage], "folder", "")


def find_run(path: str | Path, *, unfinished: bool = False) -> RunFolder:
    """Return the folder of a run or a search, or the one that a trial's folder has in it.

    Args:
        path: the folder.
        unfinished: whether it may be that of a run which has not chosen its ranks yet.

    Raises:
        SettingsError: names the file that is missing.
    """

    def is_run(folder: RunFolder) -> bool:
        begun = any(file.is_file() for file in (folder.lock, folder.search_file, folder.log))
        training = folder.training.checkpoint.is_file()  # of the original, by `haloc train`
        return folder.ranks.is_file() or (unfinished and begun and not training)

    folder = RunFolder(path)
    inside = RunFolder(folder.path / "haloc")
    if is_run(inside):
        folder = inside
    if not is_run(folder):
        expected = "expected the folder of a finished run (haloc run, haloc search, a trial)"
        if not folder.path.is_dir():
            raise SettingsError(f"{folder.path}: no such folder; {expected}")
        raise SettingsError(f"{folder.ranks}: no such file; {expected}")
    return folder


def hold(folder: RunFolder, out: str | Path | None = None) -> AbstractContextManager[None]:
    """Hold the folder that a command on a run writes to, so that no other process works there.

    Args:
        folder: the folder of a run, or of one of its stages.
        out: where the results go; None is into ``folder``.

    Returns:
        A context, see `nni_haloc.utils.locks.hold_folder`. It holds the whole run of which
        ``out`` is a part, else ``out`` alone.
    """
    own = folder.path
    if out is not None and not Path(out).resolve().is_relative_to(own.resolve()):
        own = Path(out)
    while RunFolder(own.absolute().parent).ranks.is_file():  # a stage's folder
        own = own.absolute().parent
    return hold_folder(own)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file; no tensor is read.

    Raises:
        OSError: if the file can't be read.
        ValueError: names a file that is damaged, such as one that was cut off.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            names = file.keys()  # it is no mapping
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: {first_line(error)}") from None


class Training:
    """Name the files of one training: its state after the last epoch, and its history.

    Args:
        path: the folder that holds them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.ckpt"
        self.history = path / "history.csv"


def _section(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a part of a file's content that is keys and values; empty where there is none."""
    part = content.get(key, {})
    if not isinstance(part, dict):
        expected = f"expected keys and values, found {type(part).__name__}"
        raise SettingsError(f"{file}: {key}: {expected}")
    return part


def _nested(flat: Mapping[str, Any]) -> dict[str, Figures]:
    """Sort the flat metrics of version 1 by stages, in the names of today."""
    stages: dict[str, Figures] = {name: {} for name in _OLD_ORDER}
    for key, value in flat.items():
        prefix = next((p for p in _OLD_STAGES if key.startswith(p)), "")
        if prefix:
            stages[_OLD_STAGES[prefix]][key.removeprefix(prefix)] = value
        elif key.startswith(_OLD_OWN):
            stages["quantize"][key] = value
        elif key not in _OLD_DERIVED:
            stages["finetune"][key.removeprefix("haloc_")] = value
    if stages["finetune"] and "default" in flat:
        stages["finetune"].setdefault("top1", flat["default"])
    for key in ("macs", "params"):  # the original's counts were given as reductions alone
        count, reduction = flat.get(key), flat.get(f"{key}_reduction")
        if _is_count(count) and _is_number(reduction) and reduction < 1:
            stages["original"][key] = round(count / (1 - reduction))
    return {name: figures for name, figures in stages.items() if figures}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> TypeGuard[float]:
    return _is_number(value) and 0 <= value < 1e18  # a damaged file may hold infinity
