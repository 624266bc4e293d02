"""Judge accuracies: an original that guesses, a compressed network far above or below its original.

The first two are probably mistakes: labels in another order than the network's outputs, another
normalisation than the network's, other weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from nni_haloc.inputs.labels import IGNORED
from nni_haloc.runs.folder import Figures
from nni_haloc.utils.log import logger
from nni_haloc.utils.printing import percent

FAR = 0.05
"""Points of top-1 above the original's, 0 to 1, that fine-tuning alone hardly gives."""
_ERRORS = 2.0, 3.0
"""Standard errors that an original must be above chance by, and a compressed network above its
original to be doubted."""
_CAUSES = "check the weights, the normalisation and the order of the classes"


def guessing(labels: Tensor) -> Figures:
    """Return what top-1 is judged by, from the labels ``(N, ...)`` that it was measured with.

    Returns:
        ``images``, how many have labels that count (`IGNORED` ones do not), and ``chance``, the
        top-1 of guesses among their classes.
    """
    counted = labels != IGNORED
    images = int(counted.reshape(len(labels), -1).any(1).sum()) if len(labels) else 0
    return {"images": images, "chance": 1 / max(1, len(labels[counted].unique()))}


def doubts(stages: Mapping[str, Figures]) -> dict[str, str]:
    """Return what is doubtful about the accuracies of a run.

    Args:
        stages: stage to its figures, as ``metrics.json`` has them; ``original`` among them, with
            ``images`` and ``chance`` (see `guessing`).

    Returns:
        A line for each doubt, under the names that `doubt_figures` gives them.
    """
    original = stages.get("original", {})
    if not {"top1", "images", "chance"} <= original.keys() or original["images"] < 1:
        return {}
    top1, images, chance = (original[key] for key in ("top1", "images", "chance"))
    found = {}
    if top1 <= chance + _ERRORS[0] * (chance * (1 - chance) / images) ** 0.5:
        found["original_at_chance"] = (
            f"the original's top-1, {percent(top1, 2)} of {images:.0f} images, is not above "
            f"chance, {percent(chance, 2)}; {_CAUSES}"
        )
    above = {
        name: figures["top1"]
        for name, figures in stages.items()
        if name != "original" and _far_above(figures.get("top1", 0.0), top1, images)
    }
    if above:
        name, best = max(above.items(), key=lambda item: item[1])
        found["far_above_original"] = (
            f"{name}: top-1 is {100 * (best - top1):.2f} points above the original's "
            f"{percent(top1, 2)}; {_CAUSES}, or the original was not trained to its end"
        )
    below = {
        name: figures["top1"]
        for name, figures in stages.items()
        if name != "original" and _far_below(figures.get("top1", top1), top1, images, chance)
    }
    if below:
        name, worst = min(below.items(), key=lambda item: item[1])
        found["far_below_original"] = (
            f"{name}: top-1 is {100 * (top1 - worst):.2f} points below the original's "
            f"{percent(top1, 2)}, more than half of the way to chance, {percent(chance, 2)}; "
            "raise the budget, or train for more epochs"
        )
    return found


def warn_of_doubts(
    stages: Mapping[str, Figures], told: Collection[str] = frozenset()
) -> Collection[str]:
    """Log what is doubtful about the accuracies so far.

    Args:
        stages: see `doubts`.
        told: names of the doubts that were logged before.

    Returns:
        The names of all that are logged now.
    """
    found = doubts(stages)
    for name, line in found.items():
        if name not in told:
            logger.warning("%s", line)
    return {*told, *found}


def doubt_figures(stages: Mapping[str, Figures]) -> Figures:
    """Return ``original_at_chance`` and ``far_above_original``, 0 or 1 each.

    Nothing is returned for figures that do not say what they were measured with.
    """
    if "chance" not in stages.get("original", {}):
        return {}
    found = doubts(stages)
    return {key: float(key in found) for key in ("original_at_chance", "far_above_original")}


def _far_above(top1: float, original: float, images: float) -> bool:
    variance = (top1 * (1 - top1) + original * (1 - original)) / images
    return top1 - original > max(FAR, _ERRORS[1] * variance**0.5)


def _far_below(top1: float, original: float, images: float, chance: float) -> bool:
    variance = (top1 * (1 - top1) + original * (1 - original)) / images
    return original - top1 > max((original - chance) / 2, _ERRORS[1] * variance**0.5)
