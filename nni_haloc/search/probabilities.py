"""The state of a search, which the strategy and its Lightning module share: probabilities, prices.

Alpha and the prices lie in the supernet itself, so that a checkpoint of it holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nni_haloc.inputs.schema import SearchOptions
from nni_haloc.plan.budget import Limit, Scores
from nni_haloc.search.objective import expected_cost, probability_loss_paper, settle
from nni_haloc.search.space import RankSpace
from nni_haloc.search.supernet import MixedRankLayer

ARRIVAL = 0.4
"""Share of the search, after the warm-up, in which the expected cost moves to the budget.

Until then dearer candidates learn, too.
"""


class SearchState:
    """The path probabilities of a supernet, and what they cost.

    Making the state gives the supernet a buffer ``prices (limits,)`` and sets every layer's alpha
    and temperature.

    Args:
        supernet: a rank space whose choices are mixed layers.
        limits: what the whole network may cost; all of them hold.
        options: options of the search.
        start: layer to candidate to the loss that it adds, see `nni_haloc.sensitivities`. Alpha
            starts from it, at the budget at once; None starts with all candidates alike.
    """

    def __init__(
        self,
        supernet: RankSpace,
        limits: Sequence[Limit],
        options: SearchOptions,
        start: Scores | None = None,
    ) -> None:
        self.supernet, self.limits, self.options = supernet, list(limits), options
        self.starts_at_budget = start is not None
        self.mixed_layers: dict[str, MixedRankLayer] = {
            str(module.label): module  # NNI's labels are of a class of their own
            for module in supernet.modules()
            if isinstance(module, MixedRankLayer)
        }
        supernet.register_buffer("prices", torch.zeros(len(self.limits), dtype=torch.float64))
        for name, layer in self.mixed_layers.items():
            added = [start[name][candidate] if start else 0.0 for candidate in layer.names]
            scale = -options.temperature / options.start_scale
            layer.alpha.data.copy_(torch.tensor(added) * scale)
            layer.temperature = options.temperature

    @property
    def prices(self) -> Tensor:
        """The price of a budget's worth of cost in each limit, ``(limits,)``: see `settle`."""
        return self.supernet.prices

    @property
    def probabilities(self) -> dict[str, dict[str, float]]:
        """Probability of each candidate, by layer."""
        return {name: layer.export_probs({})[name] for name, layer in self.mixed_layers.items()}

    def expected_cost(self, limit: Limit | None = None) -> Tensor:
        """Compute the expected cost of the whole network, Eq. (6).

        Args:
            limit: the limit whose table counts; None is the first one.

        Returns:
            A scalar in the table's unit, differentiable in alpha.
        """
        rows, fixed = (limit or self.limits[0]).costs.restrict(self.supernet.candidates)
        layers = self.mixed_layers.items()
        costs = [
            torch.tensor([rows[name][c] for c in layer.names], device=layer.alpha.device)
            for name, layer in layers
        ]
        return expected_cost([layer.probs for _, layer in layers], costs, fixed)

    def probability_loss(self, ce: Tensor) -> Tensor:
        """Return the loss that alpha's step descends.

        Args:
            ce: cross-entropy of the sampled network, a scalar.

        Returns:
            The cross-entropy itself or, with ``objective="paper"``, Eq. (7) at the limit that the
            expected cost exceeds most.
        """
        if self.options.objective == "settle":
            return ce
        expected = [self.expected_cost(limit) for limit in self.limits]
        binding = max(
            range(len(expected)), key=lambda k: float(expected[k].detach()) / self.limits[k].budget
        )
        budget = self.limits[binding].budget
        return probability_loss_paper(
            ce, expected[binding], budget, self.options.eta, self.options.theta
        )

    def settle(self, progress: float = 1.0) -> None:
        """Move alpha so that the binding limit's expected cost is at its scheduled value.

        Does nothing with ``objective="paper"``. See `objective.settle`.

        Args:
            progress: the share of the search that is over, 0 to 1. Up to `ARRIVAL` the expected
                cost goes evenly from that of uniform probabilities to the budget; a search that
                starts from sensitivities is at the budget from the first step on.
        """
        if self.options.objective != "settle":
            return
        costs, fixed = self._in_budgets()
        layers = list(self.mixed_layers.values())
        sizes = [len(layer.names) for layer in layers]
        start = fixed + costs @ np.repeat(1 / np.array(sizes), sizes)
        arrived = 1.0 if self.starts_at_budget else min(1.0, progress / ARRIVAL)
        target = start + arrived * (1 - start)
        with torch.no_grad():
            settled, prices = settle(
                np.concatenate(self._price_free(costs)),
                sizes,
                costs / target[:, None],
                fixed / target,
            )
            self.prices.copy_(torch.from_numpy(prices / target))
            alphas = torch.from_numpy(settled * self.options.temperature).split(sizes)
            for layer, alpha in zip(layers, alphas, strict=True):
                layer.alpha.copy_(alpha)

    def scores(self) -> dict[str, dict[str, float]]:
        """Return what the task alone says of each candidate, free of cost.

        With ``objective="settle"`` these are the logits that the cross-entropy has led to, with
        every price taken back that `settle` put on them. With ``objective="paper"``, where price
        and task are one in alpha, they are the mean of the centred gate gradients.

        Returns:
            Layer to candidate to score: the higher the better, on one scale for all layers.
        """
        costs, _ = self._in_budgets()
        layers = self.mixed_layers.items()
        if self.options.objective == "settle":
            free = self._price_free(costs)
        else:
            free = [-layer.task_gradient.mean.numpy() for _, layer in layers]
        return {
            name: dict(zip(layer.names, z.tolist(), strict=True))
            for (name, layer), z in zip(layers, free, strict=True)
        }

    def _in_budgets(self) -> tuple[np.ndarray, np.ndarray]:
        """Return candidates' costs ``(limits, n)`` and fixed costs, in units of each budget."""
        restricted = [
            (limit.budget, *limit.costs.restrict(self.supernet.candidates)) for limit in self.limits
        ]
        costs = [
            [
                rows[name][c] / budget
                for name, layer in self.mixed_layers.items()
                for c in layer.names
            ]
            for budget, rows, _ in restricted
        ]
        return np.array(costs), np.array([fixed / budget for budget, _, fixed in restricted])

    def _price_free(self, costs: np.ndarray) -> list[np.ndarray]:
        """Return each layer's logits with the prices taken back, centred."""
        layers = self.mixed_layers.values()
        ends = np.cumsum([len(layer.names) for layer in layers])[:-1]
        paid = np.split(self.prices.cpu().numpy() @ costs, ends)
        free = [logits_of(layer) + price for layer, price in zip(layers, paid, strict=True)]
        return [z - z.mean() for z in free]


def logits_of(layer: MixedRankLayer) -> np.ndarray:
    """Return alpha over the temperature, ``(candidates,)``, in float64."""
    return layer.alpha.detach().double().cpu().numpy() / layer.temperature
