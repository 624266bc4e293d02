"""Lightning's loggers by their names in the settings, ``trainer.logger``.

To add one: write a function like those below, and add its line to
`nni_haloc.inputs.registries.LOGGERS` (or an entry point of the group ``nni_haloc.loggers``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from nni_haloc.inputs.registries import LOGGERS
from nni_haloc.utils.errors import HalocError, MissingPackage, SettingsError, first_line
from nni_haloc.utils.files import make_folder
from nni_haloc.utils.processes import is_first

NO_LOGGER = "none"
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""The package that a logger needs; the extra has the logger's name."""


@dataclass(frozen=True)
class Place:
    """Say which training is logged, and where its files lie.

    Attributes:
        run: the run's folder.
        folder: the folder of this training, in the run's or the same.
        title: what the training is called: ``search``, ``fine-tuning``.
    """

    run: Path
    folder: Path
    title: str

    @property
    def name(self) -> str:
        """The run's name: of a trial, whose run lies in a folder ``haloc``, the trial's."""
        path = self.run.absolute()
        return path.parent.name if path.name == "haloc" else path.name


def tensorboard(place: Place) -> Logger:
    """Log for TensorBoard, beside the training's other files.

    Of a trial on the manager's machine, the files go where NNI's web page looks for them.
    """
    from pytorch_lightning.loggers import TensorBoardLogger

    run, folder = place.run.absolute(), place.folder.absolute()
    if seen := _seen_by_nni(run):
        folder = seen / folder.relative_to(run)
    return TensorBoardLogger(folder.parent, name=folder.name, version="", flush_secs=5)


def _seen_by_nni(run: Path) -> Path | None:
    """Return the folder from which NNI's web page starts TensorBoard for the trial of a run.

    The page does not look into a trial's own folder,
    ``EXPERIMENT/environments/local-env/trials/TRIAL``, but into
    ``EXPERIMENT/trials/TRIAL/output/tensorboard``.
    """
    trial = Path(os.environ.get("NNI_OUTPUT_DIR", "")).absolute()
    local = trial.parts[-4:-1] == ("environments", "local-env", "trials")
    if not (local and run.is_relative_to(trial)):
        return None
    return trial.parents[3] / "trials" / trial.name / "output" / "tensorboard"


def csv(place: Place) -> Logger:
    """Log to ``csv/version_N/metrics.csv`` in the training's folder, N counting its starts."""
    from pytorch_lightning.loggers import CSVLogger

    return CSVLogger(place.folder, name="csv", flush_logs_every_n_steps=1)


def mlflow(place: Place) -> Logger:
    """Log to MLflow's server at ``MLFLOW_TRACKING_URI``, else to ``mlflow.db`` in the run's folder.

    The run's name is the experiment's, and each training is a run of it.
    """
    from pytorch_lightning.loggers import MLFlowLogger

    run = place.run.absolute()
    server = os.environ.get("MLFLOW_TRACKING_URI")
    return MLFlowLogger(
        place.name,
        run_name=place.title,
        tracking_uri=server or f"sqlite:///{run / 'mlflow.db'}",
        artifact_location=None if server else (run / "mlartifacts").as_uri(),
    )


def wandb(place: Place) -> Logger:
    """Log to Weights & Biases: to ``wandb/`` in the run's folder, or as ``WANDB_MODE`` says.

    Each training is a run, and the trainings of one run are a group.
    """
    from pytorch_lightning.loggers import WandbLogger

    class Ended(WandbLogger):
        """Ends its run with the training; else the next training would go on in it."""

        def finalize(self, status: str) -> None:
            super().finalize(status)
            self.experiment.finish(exit_code=int(status == "failed"))

    return Ended(
        place.title,
        place.run.absolute(),
        project=os.environ.get("WANDB_PROJECT", "nni-haloc"),
        group=place.name,
        mode=os.environ.get("WANDB_MODE", "offline"),
    )


def check_logger(name: str) -> None:
    """Check that a logger of the settings can be made.

    Args:
        name: value of ``trainer.logger``.

    Raises:
        SettingsError: if there is no such logger.
        MissingPackage: if the package that it needs is not installed.
    """
    if name == NO_LOGGER:
        return
    LOGGERS[name]
    package = _PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        missing = f"{name} needs the package {package}, which is not installed"
        raise MissingPackage(f"trainer.logger: {missing} (pip install 'nni-haloc[{name}]')")


def make_logger(name: str, place: Place) -> Any:
    """Make the logger of a training.

    Args:
        name: value of ``trainer.logger``.
        place: the training.

    Returns:
        What Lightning's Trainer takes under ``logger``: False for ``none``.

    Raises:
        MissingPackage: if the package that it needs is not installed.
        SettingsError: if it can't be made: says why.
    """
    check_logger(name)
    if name == NO_LOGGER:
        return False
    make_folder(place.folder)
    try:
        made = LOGGERS[name](place)
        if is_first():
            _ = made.experiment  # opens it now, where what is wrong can be told
    except HalocError:
        raise
    except Exception as error:  # each logger's package has its own
        raise SettingsError(f"trainer.logger: {name}: {first_line(error)}") from None
    return made
