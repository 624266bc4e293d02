"""Share a compressed network on the Hugging Face Hub, and load one from there or from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from nni_haloc.runs.folder import RunFolder, hold
from nni_haloc.runs.model_card import HUB, model_card, without_folders
from nni_haloc.runs.saved import load
from nni_haloc.utils.errors import HalocError, needs
from nni_haloc.utils.files import read_json, write_json

CARD = "README.md"
FILES = ("ranks.json", "weights.safetensors", "model.json", "costs.json", "metrics.json")
"""All that is pushed beside the card, and all that is fetched: no code, no checkpoints, no log."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    message: str = "A network compressed by nni-haloc",
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a compressed network to the hub, with a page of its measured figures.

    The plan, the weights, the cost table and the figures are pushed, and nothing else of the
    folder. Absolute paths in the settings are cut to their last part. A ``README.md`` in the folder
    takes the place of the page.

    Args:
        folder: a finished run's folder, one of its stages', or one of `Compressed.save`.
        repo_id: ``user/name``; the repository is made if it is not there.
        private: whether a repository that is made is private (None: as the hub's default is).
        license: short name of the network's licence, such as ``mit``, for the page.
        message: of the commit.
        token: of the hub; None takes the one of ``hf auth login``.
        endpoint: address of another hub.

    Returns:
        The address of the commit.

    Raises:
        SettingsError: if it is not the folder of a compressed network.
        MissingPackage: if huggingface_hub is not installed.
        HalocError: if the hub refuses it or can't be reached.
    """
    files = RunFolder(folder)
    files.check_holds_network()
    with needs("huggingface_hub", **HUB), TemporaryDirectory() as scratch:
        from huggingface_hub import HfApi

        with hold(files):
            _gather(files, repo_id, license, Path(scratch))
        api = HfApi(endpoint=endpoint, token=token, library_name="nni-haloc")
        with _one_line(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=scratch,
                commit_message=message,
                delete_patterns=list(FILES),  # of an earlier network, as far as this one has none
            )
        return str(commit.commit_url)


def from_pretrained(
    source: str | Path,
    model: nn.Module | None = None,
    *,
    factories: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> nn.Module:
    """Load a compressed network from the hub or from a folder, in evaluation mode.

    Nothing is unpickled, and no code of the repository is fetched or run.

    Args:
        source: a folder (see `load`) or, where there is no such folder, ``user/name`` on the hub.
        model: an instance of the original network, which is copied; needed where ``model.json``
            has no name for it.
        factories: whether to import and call the factory (``package.module:factory``) that
            ``model.json`` names: only for sources that you trust.
        revision: branch, tag or commit of the repository.
        token: of the hub, for private repositories; None takes the one of ``hf auth login``.
        cache_dir: where fetched files are kept (None: where huggingface_hub keeps them).
        local_files_only: whether to take what was fetched before, without asking the hub.
        endpoint: address of another hub.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing; it names the file.
        ValueError: names the file that is damaged or does not fit.
        MissingPackage: if huggingface_hub is not installed, and ``source`` is no folder.
        HalocError: if the hub has no such repository or can't be reached.
    """
    if Path(source).is_dir():
        return load(source, model, factories=factories)
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: no such folder; expected a folder or user/name")
    with needs("huggingface_hub", **HUB):
        from huggingface_hub import snapshot_download

    with _one_line(name):
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            endpoint=endpoint,
            allow_patterns=list(FILES),
            library_name="nni-haloc",
        )
    return load(folder, model, factories=factories)


def _gather(files: RunFolder, repo_id: str, license: str | None, target: Path) -> None:
    """Copy to ``target`` what is pushed."""
    for name in FILES:
        if (files.path / name).is_file():
            shutil.copyfile(files.path / name, target / name)
    metrics = target / files.metrics_file.name
    if metrics.is_file():
        write_json(metrics, without_folders(read_json(metrics)))
    card = files.path / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    if text is None:
        text = model_card(files.path, repo_id, license)
    (target / CARD).write_text(text, encoding="utf-8")


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Turn what the hub or its client says into one line."""
    try:
        yield
    except HalocError:
        raise
    except Exception as error:  # its HTTP client has errors of its own, and changed before
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "is the name right, and are you logged in (hf auth login)? "
        hint = remedy if status in (401, 403, 404) else ""
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise HalocError(f"{repo_id}: {hint}{text}") from None
