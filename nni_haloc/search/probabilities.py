"""The state of a search, which the strategy and its Lightning module share: probabilities, prices.

Alpha and the prices lie in the supernet itself, so that a checkpoint of it holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.schema.search import SearchOptions
from nni_haloc.plan.budget import Limit, Scores
from nni_haloc.search.objective import expected_cost, probability_loss_paper, settle
from nni_haloc.search.space import RankSpace
from nni_haloc.search.supernet import MixedRankLayer
from nni_haloc.utils.placement import Mirror, to_device

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
        start: layer to candidate to the loss that it adds, see `RankSpace.sensitivities`. Alpha
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
            with torch.no_grad():
                layer.alpha.copy_(torch.tensor(added) * scale)
            layer.temperature = options.temperature
        self.curve: list[dict[str, float]] = []
        """Figures of each epoch that is done; see `nni_haloc.search.history.epoch_figures`."""
        self._sizes = [len(layer.names) for layer in self.mixed_layers.values()]
        self._costs: dict[int, tuple[CostTable, np.ndarray, float]] = {}
        self._mirror = Mirror()

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
        costs, fixed = self._costs_of((limit or self.limits[0]).costs)
        layers = list(self.mixed_layers.values())
        alpha = layers[0].alpha
        rows = to_device(torch.from_numpy(costs).to(alpha.dtype), alpha.device)
        return expected_cost([layer.probs for layer in layers], rows.split(self._sizes), fixed)

    def known_cost(self, limit: Limit | None = None) -> float:
        """Return `expected_cost` in float64, without waiting for alpha's device."""
        costs, fixed = self._costs_of((limit or self.limits[0]).costs)
        layers = self.mixed_layers.values()
        return fixed + sum(
            float(softmax(layer.logits) @ row)
            for layer, row in zip(layers, self._by_layer(costs), strict=True)
        )

    def figures(self) -> dict[str, float]:
        """Return what a logger draws of the search, by the first limit's table.

        Returns:
            ``search/expected_cost_share``, the expected cost as a share of the original's; and for
            each layer ``top_probability/LAYER``, that of its most probable candidate, and
            ``expected_cost/LAYER``, what it adds to the share.
        """
        costs, original = self._costs_of(self.limits[0].costs)[0], self.limits[0].costs.original
        figures = {"search/expected_cost_share": self.known_cost() / original}
        rows = self._by_layer(costs)
        for (name, layer), row in zip(self.mixed_layers.items(), rows, strict=True):
            probabilities = softmax(layer.logits)
            figures[f"top_probability/{name}"] = float(probabilities.max())
            figures[f"expected_cost/{name}"] = float(probabilities @ row) / original
        return figures

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
        binding = max(self.limits, key=lambda limit: self.known_cost(limit) / limit.budget)
        return probability_loss_paper(
            ce, self.expected_cost(binding), binding.budget, self.options.eta, self.options.theta
        )

    def refresh(self) -> None:
        """Read alpha and the prices from their device: another process's may be there now."""
        self._mirror.forget()
        for layer in self.mixed_layers.values():
            layer.forget_alpha()

    def settle(self, progress: float = 1.0, budget: float | None = None) -> None:
        """Move alpha so that the binding limit's expected cost is at its scheduled value.

        Does nothing with ``objective="paper"``. See `objective.settle`.

        Args:
            progress: the share of the search that is over, 0 to 1. Up to `ARRIVAL` the expected
                cost goes evenly from that of uniform probabilities to the budget; a search that
                starts from sensitivities is at the budget from the first step on.
            budget: another budget in the place of the first limit's, as a fraction of the
                original's cost.
        """
        if self.options.objective != "settle":
            return
        costs, fixed = self._in_budgets()
        layers = list(self.mixed_layers.values())
        start = fixed + costs @ np.repeat(1 / np.array(self._sizes), self._sizes)
        arrived = 1.0 if self.starts_at_budget else min(1.0, progress / ARRIVAL)
        aim = np.ones(len(self.limits))
        if budget is not None:
            aim[0] = budget * self.limits[0].costs.original / self.limits[0].budget
        target = start + arrived * (aim - start)
        settled, prices = settle(
            np.concatenate(self._price_free(costs)),
            self._sizes,
            costs / target[:, None],
            fixed / target,
        )
        self._mirror.put(self.prices, prices / target)
        for layer, logits in zip(layers, self._by_layer(settled), strict=True):
            layer.put_logits(logits)

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
            free = [-layer.task_gradient.mean for _, layer in layers]
        return {
            name: dict(zip(layer.names, z.tolist(), strict=True))
            for (name, layer), z in zip(layers, free, strict=True)
        }

    def _in_budgets(self) -> tuple[np.ndarray, np.ndarray]:
        """Return candidates' costs ``(limits, n)`` and fixed costs, in units of each budget."""
        costs, fixed = zip(*(self._costs_of(limit.costs) for limit in self.limits), strict=True)
        budgets = np.array([limit.budget for limit in self.limits])
        return np.array(costs) / budgets[:, None], np.array(fixed) / budgets

    def _costs_of(self, table: CostTable) -> tuple[np.ndarray, float]:
        """Return all candidates' costs ``(n,)``, and what is not searched, in the table's unit."""
        if id(table) not in self._costs:
            rows, fixed = table.restrict(self.supernet.candidates)
            layers = self.mixed_layers.items()
            costs = np.array([rows[name][c] for name, layer in layers for c in layer.names])
            self._costs[id(table)] = table, costs, fixed
        return self._costs[id(table)][1:]

    def _price_free(self, costs: np.ndarray) -> list[np.ndarray]:
        """Return each layer's logits with the prices taken back, centred."""
        paid = self._by_layer(self._mirror.of(self.prices) @ costs)
        layers = self.mixed_layers.values()
        free = [layer.logits + price for layer, price in zip(layers, paid, strict=True)]
        return [z - z.mean() for z in free]

    def _by_layer(self, values: np.ndarray) -> list[np.ndarray]:
        """Cut a vector of all candidates into one for each layer."""
        return np.split(values, np.cumsum(self._sizes)[:-1])
