"""The problem that a rule solves: candidates, limits, and the trained network to ask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_haloc.inputs.options import Decomposition
from nni_haloc.plan.budget import Choice, Limit, Scores, check_feasible
from nni_haloc.plan.evidence import Candidates, Evidence, Modules, gather_evidence
from nni_haloc.plan.sensitivity import loss
from nni_haloc.space.candidates import build_candidates
from nni_haloc.space.covariances import patch_covariances
from nni_haloc.space.frozen import let_train
from nni_haloc.space.layers import LayerSpec, kernel_factors
from nni_haloc.space.modules import copy_of, replace_modules
from nni_haloc.space.names import Rank
from nni_haloc.space.tucker import LowRank, Tucker2, output_errors, reconstruct
from nni_haloc.training.finetuning import recalibrate
from nni_haloc.utils.placement import HostCopy, accelerated, device_of
from nni_haloc.utils.progress import logged_progress

BATCH = 128


@dataclass(frozen=True)
class Problem:
    """A trained network, its rank candidates, and the limits that a rule's choice must keep.

    Attributes:
        model: the trained network; no rule changes it.
        specs: layer to its specification.
        candidates: layer to candidate name to rank.
        limits: what the whole network may cost; every one holds.
        images: some training images without augmentation, ``(N, ...)``.
        labels: their classes, ``(N,)``.
        decomposition: how candidates are made; None is by the data.
        seed: of what a rule draws.
        train: batches of all training images, augmented, for rules that train.
        bf16: measure sensitivities in mixed precision, as the search's.
        left_alone: name of each layer without candidates to the reason.

    Raises:
        InfeasibleBudget: if no choice keeps the limits.
    """

    model: nn.Module
    specs: Mapping[str, LayerSpec]
    candidates: Mapping[str, Mapping[str, Rank]]
    limits: Sequence[Limit]
    images: Tensor
    labels: Tensor
    decomposition: Decomposition | None = None
    seed: int = 0
    train: DataLoader | None = None
    bf16: bool = False
    left_alone: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_feasible(self.candidates, self.limits, self.left_alone)

    def within(self, limits: Sequence[Limit]) -> Problem:
        """Return the same problem with other limits; what is known of the candidates is kept.

        Args:
            limits: in the place of this problem's.

        Raises:
            InfeasibleBudget: if no choice keeps them.
        """
        other = copy.copy(self)
        object.__setattr__(other, "limits", limits)
        other.__post_init__()
        return other

    def holds(self, choice: Mapping[str, str]) -> bool:
        """Tell whether a choice keeps every limit."""
        return all(limit.holds(choice) for limit in self.limits)

    def cost(self, layer: str, candidate: str) -> float:
        """Return a candidate's cost in budgets: in the limit that it uses most of."""
        return max(limit.costs.costs[layer][candidate] / limit.budget for limit in self.limits)

    @cached_property
    def modules(self) -> dict[str, dict[str, nn.Module]]:
        """Trained layer of each candidate, by layer."""
        return build_candidates(
            self.model, self.specs, self.candidates, self.images, self.decomposition
        )

    @cached_property
    def evidence(self) -> Evidence:
        """The loss that each candidate alone adds, on images that it was not fitted to."""
        return gather_evidence(
            self.model,
            self.specs,
            self.candidates,
            self.build,
            self.images,
            bf16=self.bf16,
            progress=logged_progress("measuring sensitivities"),
        )

    @property
    def scores(self) -> Scores | None:
        """The loss that each candidate adds; None where no rule has asked for the evidence."""
        evidence: Evidence | None = self.__dict__.get("evidence")
        return None if evidence is None else evidence.added

    def build(self, candidates: Candidates, images: Tensor) -> Modules:
        """Make candidates, fitted to some images."""
        return build_candidates(self.model, self.specs, candidates, images, self.decomposition)

    def kernel(self, layer: str, candidate: str) -> Tensor:
        """Return a candidate's dense kernel, ``(F, C, k1, k2)`` or ``(F, C)``.

        It is on the `device_of` the model.
        """
        device = device_of(self.model)
        factors = [f.detach().to(device) for f in kernel_factors(self.modules[layer][candidate])]
        if len(factors) == 1:
            return factors[0]
        return reconstruct((LowRank if len(factors) == 2 else Tucker2)(*factors))

    @cached_property
    def errors(self) -> dict[str, dict[str, float]]:
        """Relative output error of each candidate on the images, ``||y - y'|| / ||y||``, by layer.

        It is 0 for the dense layer.
        """
        weights = dict(self.model.named_modules())
        specs = {name: self.specs[name] for name in self.candidates}
        covariances = patch_covariances(self.model, specs, self.images)
        found: dict[str, tuple[list[str], HostCopy]] = {}
        for layer, row in self.candidates.items():
            names = [name for name, rank in row.items() if rank is not None]
            if names:
                kernels = (self.kernel(layer, name) for name in names)
                (weight,), covariance = kernel_factors(weights[layer]), covariances.pop(layer)
                relative = output_errors(weight.to(covariance.device), kernels, covariance)
                found[layer] = names, HostCopy(relative)
        errors = {layer: dict.fromkeys(row, 0.0) for layer, row in self.candidates.items()}
        for layer, (names, copied) in found.items():
            errors[layer].update(zip(names, copied.get().tolist(), strict=True))
        return errors

    def network(self, choice: Mapping[str, str]) -> nn.Module:
        """Return the compressed network of a choice, with the candidates' own weights."""
        built = self.__dict__.get("modules")  # all of them, if the rule has asked for them
        if not built:
            chosen = {layer: {name: self.candidates[layer][name]} for layer, name in choice.items()}
            built = build_candidates(
                self.model, self.specs, chosen, self.images, self.decomposition
            )
        network = copy_of(self.model)
        replace_modules(
            network, {layer: copy.deepcopy(built[layer][name]) for layer, name in choice.items()}
        )
        let_train(network, told=True)
        return network

    def loss(self, network: nn.Module) -> float:
        """Return the mean cross-entropy on the images, in evaluation mode.

        The network is first recalibrated on them, as a delivered network is. Without that, the
        losses of untrained plans say next to nothing of what the networks are worth.
        """
        batches = [(images, None) for images in self.images.split(BATCH)]
        with accelerated(network):
            recalibrate(network, batches, len(self.images))
            return loss(network, self.images, self.labels, BATCH)


RuleFunction = Callable[[Problem], Choice]


def sees_every_rank(rule: RuleFunction) -> RuleFunction:
    """Mark a rule that runs no candidate, as a decorator.

    Where the settings leave the step between ranks open, it may choose from every rank, so that it
    can use the whole budget. Other rules have the search's ranks to choose from.
    """
    vars(rule)["every_rank"] = True
    return rule


def sees_pairs(rule: RuleFunction) -> RuleFunction:
    """Mark a rule that may choose r1 and r2 apart, as a decorator.

    It does where the settings leave ``rank_space.equal`` open and every cost is counted; it then
    has the search's steps of either rank.
    """
    vars(rule)["pairs"] = True
    return rule
