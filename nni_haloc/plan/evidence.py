"""Gather what says which candidates to choose: losses on images that they were not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nni_haloc.plan.sensitivity import added_losses, loss, losses_of
from nni_haloc.space.covariances import channel_moments
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import copy_of, evaluating, replace_modules
from nni_haloc.space.names import Rank, rank_name
from nni_haloc.space.nested import lost_energies
from nni_haloc.space.outputs import logits_of
from nni_haloc.utils.log import logger
from nni_haloc.utils.placement import accelerated

IMAGES = 128
"""Images that each candidate is measured on.

On twice as many, the plans for EfficientNet-Lite0 and ResNet-20 were no better.
"""

BEYOND = 1.5
"""Warn where outputs move more than that many times as far on images that were not fitted to.

ResNet-20 is at 1.04 with 512 images, 1.2 with 128, and 1.75 with 60.
"""
_SMALL = 1e-3
"""Divergence below which a plan hardly moves the outputs, whatever the images."""

CANDIDATES = 5
"""Low ranks of a layer, or of each of its two sides, that are measured; between them losses are
interpolated."""

_LEAST = 1e-9
_FEWEST = 4
"""Two for each half of the images."""

Low = tuple[int, ...]
Lost = Callable[[Low], float]
Candidates = Mapping[str, Mapping[str, Rank]]
Modules = Mapping[str, Mapping[str, nn.Module]]
Build = Callable[[Candidates, Tensor], Modules]
"""Make candidates, fitted to some images."""


@dataclass(frozen=True)
class Evidence:
    """The loss that each candidate alone adds, image by image.

    Attributes:
        losses: layer to candidate to the added loss of each image, ``(N,)``.
        measured: layer to the names of the ranks whose losses were measured, not interpolated.
            They need not be candidates.
    """

    losses: Mapping[str, Mapping[str, np.ndarray]]
    measured: Mapping[str, Sequence[str]]

    @property
    def added(self) -> dict[str, dict[str, float]]:
        """Mean added loss by layer and candidate; a gain is taken for chance, and counts as 0."""
        return {
            layer: {name: max(0.0, float(values.mean())) for name, values in row.items()}
            for layer, row in self.losses.items()
        }

    def of(self, choice: Mapping[str, str]) -> tuple[float, float]:
        """Return the sum of what a choice's candidates add, and the sum's standard error.

        Args:
            choice: layer to candidate.
        """
        total = np.asarray(sum(self.losses[layer][name] for layer, name in choice.items()))
        return float(total.mean()), float(total.std(ddof=1) / len(total) ** 0.5)


def gather_evidence(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    candidates: Candidates,
    build: Build,
    images: Tensor,
    *,
    bf16: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Evidence:
    """Measure candidates on images that they were not fitted to.

    The loss is the distance from the original's outputs. It needs no labels, and tells candidates
    apart on far fewer images than the cross-entropy.

    Those that are fitted to one half of the images are measured on the other, both ways round: on
    the images of the fit, if they are few, most candidates seem to do no harm. `IMAGES` images are
    measured on, and `CANDIDATES` low ranks of a layer; the loss of the others is interpolated along
    the energy that they lose, see `lost_energies`. Of a layer with many
    pairs ``(r1, r2)`` its two sides are measured, ``r1`` with all inputs and ``r2`` with all
    outputs: a pair's loss is taken for the sum of both.

    Args:
        model: the trained network; it is not changed.
        specs: the layers by name.
        candidates: layer to candidate name to rank.
        build: makes candidates for some images.
        images: ``(N, ...)``, at least 4.
        bf16: run in mixed precision.
        progress: called with the numbers of finished and of all batches.

    Returns:
        The evidence.

    Raises:
        ValueError: for fewer images; if a loss is not finite (the message names layer and
            candidate).
    """
    if len(images) < _FEWEST:
        expected = f"expected at least {_FEWEST} to measure candidates on"
        remedy = "give more (rank_space.calibration_images, or more images in the loader)"
        raise ValueError(f"calibration images: {expected}, found {len(images)}; {remedy}")
    lost = _lost(model, specs, candidates, images)
    sides = {layer: _sides(specs[layer], row) for layer, row in candidates.items()}
    groups = {layer: _spread(part, lost[layer]) for layer, part in sides.items()}
    measured = {
        layer: {rank_name(rank): rank for group in row for rank in group}
        | {name: rank for name, rank in candidates[layer].items() if rank is None}
        for layer, row in groups.items()
    }
    halves = [torch.arange(start, len(images), 2) for start in (0, 1)]
    found = []
    for i, half in enumerate(halves):
        seen = half[: IMAGES // 2]

        def told(done: int, of: int, before: int = i) -> None:
            progress(before * of + done, 2 * of)

        found.append(
            added_losses(
                model,
                build(measured, images[halves[1 - i]]),
                images[seen],
                bf16=bf16,
                progress=told,
            )
        )
    losses = {}
    for layer, row in candidates.items():
        known = {n: np.concatenate([part[layer][n] for part in found]) for n in measured[layer]}
        losses[layer] = _added(row, known, sides[layer], groups[layer], lost[layer])
    return Evidence(losses, {layer: list(row) for layer, row in measured.items()})


def divergence_within_and_beyond(
    model: nn.Module, candidates: Candidates, build: Build, images: Tensor
) -> tuple[float, float]:
    """Return how far a network moves the original's outputs, on images of its fit and on others.

    It is fitted to either half of the images. Where the second number is much larger, the images
    are too few.

    Args:
        model: the trained network; it is not changed.
        candidates: layer to the chosen candidate alone, with its rank.
        build: makes candidates for some images.
        images: ``(N, ...)``, at least 4.

    Returns:
        The mean divergence within the fit, and beyond it.
    """
    halves = [images[start::2] for start in (0, 1)]
    outputs = [_outputs(model, half) for half in halves]
    found: dict[bool, list[float]] = {True: [], False: []}
    for i, fitted in enumerate(halves):
        network = copy_of(model)
        built = build(candidates, fitted)
        replace_modules(network, {layer: row[next(iter(row))] for layer, row in built.items()})
        for j, half in enumerate(halves):
            found[i == j].append(loss(network, half, outputs[j]))
    return float(np.mean(found[True])), float(np.mean(found[False]))


def divergence_of_equal_outputs(model: nn.Module, images: Tensor) -> float:
    """Return how far outputs that are equal for all classes are from a network's own.

    It is the scale for what compression does to them: a network as far away only guesses.

    Args:
        model: the trained network; it is not changed.
        images: ``(N, ...)``.
    """
    outputs = _outputs(model, images).float()
    return float(losses_of(torch.zeros_like(outputs), outputs).mean())


def check_enough_images(
    evidence: Evidence,
    model: nn.Module,
    candidates: Candidates,
    choice: Mapping[str, str],
    build: Build,
    images: Tensor,
) -> None:
    """Log how far a choice moves the original's outputs; warn where that is as far as guessing.

    A warning, too, where the images are too few.

    Args:
        evidence: what the choice was made by.
        model: the trained network; it is not changed.
        candidates: layer to candidate name to rank.
        choice: layer to candidate.
        build: makes candidates for some images.
        images: the calibration images, ``(N, ...)``.
    """
    alone, error = evidence.of(choice)
    equal = divergence_of_equal_outputs(model, images)
    logger.info(
        "sensitivities: those of the chosen ranks add up to a divergence of %.3g ± %.1g from the"
        " original's outputs; a network that only guesses is %.3g away",
        alone,
        error,
        equal,
    )
    chosen = {layer: {name: candidates[layer][name]} for layer, name in choice.items()}
    within, beyond = divergence_within_and_beyond(model, chosen, build, images)
    if beyond > max(BEYOND * within, _SMALL):
        logger.warning(
            "%d calibration images are few: the outputs move by %.3g on images of the fit, by %.3g"
            " on others; give more (calibration_images), or fine-tune",
            len(images),
            within,
            beyond,
        )
    if beyond > equal > 0:
        logger.warning(
            "the compressed network moves the outputs by %.3g, equal outputs for all classes by"
            " %.3g: before fine-tuning it knows no more than a guess; raise the budget, or"
            " fine-tune for many epochs",
            beyond,
            equal,
        )


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model), accelerated(model) as device, torch.no_grad():
        return torch.cat([logits_of(model(part.to(device))).cpu() for part in images.split(64)])


def _lost(
    model: nn.Module, specs: Mapping[str, LayerSpec], candidates: Candidates, images: Tensor
) -> dict[str, Lost]:
    """Return, by layer, what tells the share of its output's energy that a rank loses, about."""
    modules = dict(model.named_modules())
    moments = channel_moments(model, {name: specs[name] for name in candidates}, images)

    def told(layer: str) -> Lost:
        energies = lost_energies(specs[layer], modules[layer].weight, *moments.pop(layer)).cpu()
        return lambda rank: float(energies[rank[0] - 1, rank[-1] - 1])

    return {layer: told(layer) for layer in candidates}


def _sides(spec: LayerSpec, row: Mapping[str, Rank]) -> dict[Low, tuple[Low, ...]]:
    """Return the ranks whose losses add up to that of each low rank.

    Where a layer has more ranks than the sides' that would be measured, and pairs ``(r1, r2)``
    among them, they are two: ``r1`` with all inputs, and all outputs with ``r2``; the empty rank
    stands for all of both, which lose nothing. Elsewhere it is the rank itself.
    """
    low = [rank for rank in row.values() if rank is not None]
    if len(low) <= 2 * CANDIDATES or all(len(set(rank)) == 1 for rank in low):
        return {rank: (rank,) for rank in low}
    f, c = spec.out_channels, spec.in_channels
    return {(r1, r2): ((r1, c) if r1 < f else (), (f, r2) if r2 < c else ()) for r1, r2 in low}


def _spread(sides: Mapping[Low, tuple[Low, ...]], lost: Lost) -> list[list[Low]]:
    """Choose the ranks that are measured, spread evenly: on either side, or of all.

    Where r1 and r2 differ they are spread over the sides of such pairs; the lowest rank is measured
    beside them.
    """
    pairs = [part for rank, part in sides.items() if len(set(rank)) > 1] or [*sides.values()]
    groups = []
    for group, every in zip(
        zip(*pairs, strict=True), zip(*sides.values(), strict=True), strict=True
    ):
        # The extremes are always among them.
        ordered = sorted(set(filter(None, group)), key=lambda rank: (lost(rank), rank))
        places = np.linspace(0, len(ordered) - 1, min(CANDIDATES, len(ordered)))
        lowest = max(filter(None, every), key=lambda rank: (lost(rank), rank), default=())
        chosen = {ordered[round(place)] for place in places} | ({lowest} if lowest else set())
        groups.append(sorted(chosen))
    return groups


def _added(
    row: Mapping[str, Rank],
    known: Mapping[str, np.ndarray],
    sides: Mapping[Low, tuple[Low, ...]],
    groups: Sequence[Sequence[Low]],
    lost: Lost,
) -> dict[str, np.ndarray]:
    """Return the losses of a layer's candidates: their own, or the sum of their sides'."""
    of_side: dict[Low, np.ndarray] = {}
    for group, mine in zip(groups, zip(*sides.values(), strict=True), strict=True):
        measured = {rank: known[rank_name(rank)] for rank in group}
        of_side |= {side: _interpolated(side, measured, lost) for side in set(filter(None, mine))}
    return {
        name: known[name]
        if rank is None or name in known
        else np.sum([of_side[side] for side in sides[rank] if side], axis=0)
        for name, rank in row.items()
    }


def _interpolated(rank: Low, known: Mapping[Low, np.ndarray], lost: Lost) -> np.ndarray:
    """Return a rank's losses: its own, or those of its neighbours at a mean between theirs.

    Logarithms are interpolated. Towards the dense layer the loss falls in proportion to the energy.
    """
    if rank in known:
        return known[rank]
    near = sorted(known, key=lost)
    x = np.log([max(lost(other), _LEAST) for other in near])
    y = np.log([max(float(known[other].mean()), _LEAST) for other in near])
    at = np.log(max(lost(rank), _LEAST))
    mean = np.exp(np.interp(at, x, y) + min(0.0, at - x[0]))
    nearest = known[near[int(np.abs(x - at).argmin())]]
    return nearest * (mean / max(float(nearest.mean()), _LEAST))
