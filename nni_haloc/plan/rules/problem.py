"""What a rank rule chooses from, and what it may ask of the trained network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_haloc.plan.budget import Limit, check_feasible
from nni_haloc.plan.sensitivity import loss
from nni_haloc.space.candidates import build_candidates, patch_covariances
from nni_haloc.space.layers import LayerSpec, kernel_factors
from nni_haloc.space.modules import copy_of, replace_modules
from nni_haloc.space.names import Rank
from nni_haloc.space.tucker import LowRank, Method, Tucker2, output_error, reconstruct
from nni_haloc.training.finetuning import recalibrate

BATCH = 128


@dataclass(frozen=True)
class Problem:
    """A trained network, its rank candidates, and the limits that a rule's choice must keep.

    ``images (N, ...)`` and ``labels (N,)``: some training images without augmentation; ``train``: batches of all of them, augmented, for
    rules that train. ``candidates``: layer to candidate name to rank. ``decomposition``: None is by the data. ``bf16``: sensitivities are
    measured in mixed precision, as the search's. Raises `InfeasibleBudget` where no choice keeps the limits.
    """

    model: nn.Module
    specs: Mapping[str, LayerSpec]
    candidates: Mapping[str, Mapping[str, Rank]]
    limits: Sequence[Limit]
    images: Tensor
    labels: Tensor
    decomposition: Method | None = None
    seed: int = 0
    train: DataLoader | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        check_feasible(self.candidates, self.limits)

    def holds(self, choice: Mapping[str, str]) -> bool:
        """Whether a choice keeps every limit."""
        return all(limit.holds(choice) for limit in self.limits)

    def cost(self, layer: str, candidate: str) -> float:
        """What a candidate costs, in budgets: where there are several limits, by the one that it uses most of."""
        return max(limit.costs.costs[layer][candidate] / limit.budget for limit in self.limits)

    @cached_property
    def modules(self) -> dict[str, dict[str, nn.Module]]:
        """A trained layer for every candidate."""
        return build_candidates(
            self.model, self.specs, self.candidates, self.images, self.decomposition
        )

    def kernel(self, layer: str, candidate: str) -> Tensor:
        """The dense kernel that a candidate stands for, ``(F, C, k1, k2)`` or ``(F, C)``."""
        factors = kernel_factors(self.modules[layer][candidate])
        return (
            factors[0]
            if len(factors) == 1
            else reconstruct((LowRank if len(factors) == 2 else Tucker2)(*factors))
        ).detach()

    @cached_property
    def errors(self) -> dict[str, dict[str, float]]:
        """Each candidate's relative output error on the images, ``||y - y'|| / ||y||``; 0 for the dense layer."""
        found: dict[str, dict[str, float]] = {}
        weights = dict(self.model.named_modules())
        covariances = patch_covariances(
            self.model, {name: self.specs[name] for name in self.candidates}, self.images
        )
        for layer, row in self.candidates.items():
            (weight,) = kernel_factors(weights[layer])
            found[layer] = {
                name: 0.0
                if rank is None
                else output_error(weight, self.kernel(layer, name), covariances[layer])
                for name, rank in row.items()
            }
        return found

    def network(self, choice: Mapping[str, str]) -> nn.Module:
        """The compressed network of a choice, with the candidates' own weights."""
        chosen = {layer: {name: self.candidates[layer][name]} for layer, name in choice.items()}
        built = self.__dict__.get("modules")  # all of them, where the rule has asked for them
        built = built or build_candidates(
            self.model, self.specs, chosen, self.images, self.decomposition
        )
        network = copy_of(self.model)
        replace_modules(
            network, {layer: copy.deepcopy(built[layer][name]) for layer, name in choice.items()}
        )
        return network

    def loss(self, network: nn.Module) -> float:
        """Mean cross-entropy on the images, in evaluation mode, after `recalibrate` on them: so is a delivered network.

        Without that, the losses of untrained plans say next to nothing of what the networks are worth.
        """
        recalibrate(
            network, [(images, None) for images in self.images.split(BATCH)], len(self.images)
        )
        return loss(network, self.images, self.labels, BATCH)
