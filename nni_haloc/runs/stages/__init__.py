"""The steps of a run, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nni_haloc.inputs.config import Config
from nni_haloc.inputs.registries import STAGES
from nni_haloc.runs.folder import RunFolder

if TYPE_CHECKING:
    from nni_haloc.runs.stages.stage import NetworkStage, Stage


def all_stages() -> Iterator[Stage]:
    """Yield every stage in the order of the pipeline; other packages' last."""
    for name in STAGES.own():
        yield STAGES[name]()
    for stage in STAGES.load_foreign().values():
        yield stage()


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of a run with these settings."""
    return [stage for stage in all_stages() if stage.in_run and stage.wanted(config)]


def further_stages() -> list[NetworkStage]:
    """Return the stages that follow fine-tuning, each with a folder of its own."""
    from nni_haloc.runs.stages.stage import NetworkStage

    return [stage for stage in all_stages() if isinstance(stage, NetworkStage)]


def clear(folder: RunFolder) -> None:
    """Remove what an earlier run, its further stages included, left in a folder."""
    folder.clear(*(stage.folder for stage in further_stages()))


def further_stage(name: str) -> NetworkStage:
    """Return one of `further_stages` by its name.

    Raises:
        SettingsError: if there is no stage of that name.
        ValueError: if the stage makes no network of another stage's.
    """
    from nni_haloc.runs.stages.stage import NetworkStage

    stage = STAGES[name]()
    if not isinstance(stage, NetworkStage):
        raise ValueError(f"stage {name!r} can't be applied to a finished run")
    return stage
