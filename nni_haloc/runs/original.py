"""Training of the original network, where there are no weights to compress yet."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_model

from nni_haloc.inputs.config import Config
from nni_haloc.runs.folder import CHECKPOINT_FILE
from nni_haloc.runs.job import Job, trainer_options
from nni_haloc.runs.training import recipe_of
from nni_haloc.training import checkpoint
from nni_haloc.training.checkpoint import EpochCheckpoint
from nni_haloc.training.finetuning import Forecast, finetune
from nni_haloc.utils.errors import Diverged, SettingsError
from nni_haloc.utils.files import whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first


def training_folder(config: Config) -> Path:
    """Where the state and the log of a training are: beside the file that it makes."""
    out = Path(config.weights)
    return out.parent / f"{out.stem}-training"


def train_original(config: Config, *, resume: bool = False) -> dict[str, float]:
    """Train the settings' network from its initialisation, by their section ``train``, and write the file that ``weights`` names.

    Returns its accuracies. The state after each epoch and the log are beside the file, in `training_folder`; ``resume`` goes on from there.
    `SettingsError` where the file is there already, or is none of safetensors'.
    """
    out = Path(config.weights)
    if out.suffix != ".safetensors":
        raise SettingsError(
            f"weights: expected the name of a .safetensors file to be written, found {out}"
        )
    if out.exists():
        raise SettingsError(f"weights: {out} is there already")
    job = Job(config, training_folder(config), trained=False)
    train, val, test = (
        job.loader("train", shuffle=True),
        job.loader("val"),
        job.loader(config.data.score),
    )
    facts = {
        "model": config.model.model_dump(),
        "train": config.train.model_dump(),
        "data": config.data.model_dump(),
        "seed": config.seed,
    }
    state = EpochCheckpoint(job.folder / CHECKPOINT_FILE, {"identity": facts}, train, val)
    if resume := resume and state.path.exists():
        saved = checkpoint.read(state.path)
        checkpoint.check_same(state.path, saved["identity"], facts)
        logger.info(
            "training: %d of %d epochs are done: %s",
            saved["epochs"],
            config.train.epochs,
            state.path,
        )

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        logger.info(
            "training epoch %d: top-1 %.2f %% (validation)", epoch + 1, 100 * metrics["val_top1"]
        )

    options = {
        **state.options,
        **trainer_options(config),
        "callbacks": [Forecast("training"), state],
        "precision": config.train.precision,
    }
    try:
        finetune(
            job.model,
            train,
            recipe_of(config.train),
            val,
            on_epoch,
            state.path if resume else None,
            **options,
        )
    except Diverged as error:
        raise SettingsError(f"train: {error}") from None
    if not is_first():
        return {}
    with whole(out) as part:
        save_model(job.model, str(part))
    accuracies = dict(zip(("top1", "top5"), job.accuracy(job.model, test), strict=False))
    logger.info(
        "%s: %s",
        out,
        ", ".join(f"{name} {100 * value:.2f} %" for name, value in accuracies.items()),
    )
    return accuracies
