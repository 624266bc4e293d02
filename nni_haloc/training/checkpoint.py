"""Write a training's state to one file after each epoch, and go on from it.

A training that goes on is the same as one that has never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from nni_haloc.training.random_states import random_states, set_random_states
from nni_haloc.utils.errors import UnusableCheckpoint, brief, first_sentence
from nni_haloc.utils.files import make_folder, whole

_KEY = "nni_haloc"
REMEDY = "; start without --resume or use another --out"
"""The end of the message about a state that a run can't go on from."""
DIGEST = "sha256 "
"""How the value of an identity begins that stands for a file's content."""
STEPS: dict[Any, Any] = {"paper": None, None: "eighth"}
"""Values of ``rank_space.step`` to what identities have for them: earlier versions wrote null for
what is "paper" now."""
_SHOWN = 3
"""Changed settings that a message names."""


def read(path: Path, remedy: str = "", **kinds: type) -> dict[str, Any]:
    """Read the facts that `EpochCheckpoint` has put into a file.

    Args:
        path: the file.
        remedy: the end of the message if it can't be read.
        kinds: facts that must be there, beside ``identity``, and their types.

    Returns:
        The facts, and under ``epochs`` the number of finished epochs.

    Raises:
        UnusableCheckpoint: if the file can't be read, or has other facts.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        facts = {**content[_KEY]["facts"], "epochs": content["epoch"] + 1}
        for name, kind in {"identity": dict, **kinds}.items():
            if not isinstance(facts.get(name), kind):
                raise ValueError(f"{name}: expected a {kind.__name__}")
        return facts
    except Exception as error:  # torch, pickle and zip each have their own for a bad file
        empty = path.is_file() and not path.stat().st_size
        reason = "it is empty" if empty else first_sentence(error)
        raise UnusableCheckpoint(
            f"{path}: not a checkpoint that can be read ({reason}){remedy}"
        ) from None


def check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that a checkpoint was made with the settings of now.

    Args:
        path: the checkpoint, for the message.
        there: the checkpoint's identity.
        here: the identity of the settings.

    Raises:
        UnusableCheckpoint: if they differ; the message names what does.
    """
    differ = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if "scale" in differ:  # what the user has set comes first; alone it means nothing
        differ = [key for key in ("scale", *differ) if key != "scale" or len(differ) > 1]
        differ = list(dict.fromkeys(differ))
        there, here = {"scale": 1.0, **there}, {"scale": 1.0, **here}
    if differ:
        changes = [text for key in differ for text in _changes(key, there.get(key), here.get(key))]
        more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        shown = ", ".join(changes[:_SHOWN]) + more
        raise UnusableCheckpoint(f"{path}: made with other settings ({shown}){REMEDY}")


def _changes(key: str, there: Any, here: Any) -> list[str]:
    """Say what a setting was and is; of a section, each of its keys that differs."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [each for each in {**there, **here} if there.get(each) != here.get(each)]
        return [text for k in keys for text in _changes(f"{key}.{k}", there.get(k), here.get(k))]
    if all(isinstance(each, str) and each.startswith(DIGEST) for each in (there, here)):
        return [f"{key} is a file of other content now"]
    return [f"{key} was {_value(key, there)}, now {_value(key, here)}"]


def _value(key: str, value: Any) -> str:
    """Write a value of an identity as the settings have it."""
    if key == "rank_space.step":
        value = {kept: step for step, kept in STEPS.items()}.get(value, value)
    return "left out" if value is None else brief(value)


class EpochCheckpoint(Checkpoint):
    """Write the trainer's state after each epoch; take it up again when it is loaded.

    Random states and the loaders' order are part of it.

    Args:
        path: the file.
        facts: plain values kept beside the state, for `read`. With a true ``longer``, the state
            after the last epoch has all that a training of more epochs goes on from.
        *loaders: those of the training, each with a generator of its own. Their workers must not be
            persistent, because a worker's random state is out of reach.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *loaders: DataLoader) -> None:
        self.path, self.facts, self.loaders = path, dict(facts), loaders
        self._random: dict[str, Any] | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, after all other callbacks: Lightning puts a `Checkpoint` last."""
        trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add facts, random states and the loaders' order to what Lightning keeps."""
        orders = [loader.generator.get_state() for loader in self.loaders]
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if is_last and not self.facts.get("longer"):
            # Half of the file, and nothing follows that would need it.
            for state in checkpoint["optimizer_states"]:
                state["state"] = {}
        checkpoint[_KEY] = {"facts": self.facts, "orders": orders, "random": random_states()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the loaders' order now, because they draw before the epoch's start."""
        state = checkpoint[_KEY]
        for loader, order in zip(self.loaders, state["orders"], strict=True):
            loader.generator.set_state(order)
        self._random = state["random"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the random states."""
        if self._random is not None:
            set_random_states(self._random)
            self._random = None

    @property
    def options(self) -> dict[str, Any]:
        """Options that Lightning's Trainer needs beside the callback."""
        return {"enable_checkpointing": True, "plugins": [_WholeFiles()]}


class _WholeFiles(TorchCheckpointIO):
    """Replace the old file at once, so that a process killed at any time leaves a whole one.

    Lightning's own writer goes through the system's folder for temporary files, which may be on
    another disk: then it copies.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        make_folder(path.parent)
        with whole(path) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
