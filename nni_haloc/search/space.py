"""Step 1: the rank space of a trained network, as an NNI model space of `LayerChoice` mutables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nni.mutable import MutableExpression
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.profiler import ExpressionProfiler
from torch import Tensor, nn

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.table import CostTable, worthwhile
from nni_haloc.inputs.options import Decomposition
from nni_haloc.plan.evidence import gather_evidence
from nni_haloc.space.candidates import (
    build_candidates,
    build_nested_candidates,
    check_decomposition,
)
from nni_haloc.space.frozen import let_train
from nni_haloc.space.modules import Example, copy_of, materialised, replace_modules
from nni_haloc.space.names import Rank
from nni_haloc.space.nested import NestedLayer
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.summary import SpaceReport, space_report, why_nothing


class RankSpace(ModelSpace):
    """All rank candidates of a trained network.

    Each searched layer is a `LayerChoice` labelled with the layer's name. ``forward`` runs every
    layer's first candidate. Frozen parameters stay frozen, in the search and in its networks, and
    a layer whose weight is frozen is left alone; but where all of a network's parameters are
    frozen, it is taken for one prepared for inference, and all are trained.

    Args:
        model: any `nn.Module`; it is copied and never changed (lazy layers get their weights in the
            copies).
        example_input: a batch that the model takes: a tensor ``(N, ...)``, a tuple of positional
            inputs or a dict of keyword inputs.
        costs: the table or tables that the search will use (None: MACs). Candidates that cost at
            least as much as the dense layer in all of them are dropped, save those of pinned
            layers.
        allowed: which layers are searched, and which ranks they may take.
        calibration: training images ``(N, ...)`` to decompose for, or a tuple or dict of such
            inputs; without them the decomposition is by the weights.
        decomposition: how candidates are made; ``"hosvd"`` is by the weights, None by the data.
            Nested ones know only these two.
        nested: let all low-rank candidates of a layer share one set of factors, of which each takes
            the leading part. Otherwise each has weights of its own, as in the paper.

    Raises:
        ValueError: if nothing in the model can be searched, if it is a layer itself, or if it can't
            be copied (the message names the attribute).
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Example,
        costs: CostTable | Sequence[CostTable] | None = None,
        allowed: AllowedRanks = AllowedRanks(),
        calibration: Example | None = None,
        decomposition: Decomposition | None = None,
        nested: bool = True,
    ) -> None:
        super().__init__()
        model = materialised(model, example_input)
        layers = find_layers(model, example_input, allowed)
        if "" in layers.specs:
            raise ValueError(
                f"{type(model).__name__} is a layer itself, without a name to search it by:"
                " pass nn.Sequential(model)"
            )
        costs = costs or mac_table(model, example_input, allowed, layers)
        tables = [costs] if isinstance(costs, CostTable) else list(costs)
        self.costs = tables[0]
        by_rules = layers.candidates(allowed)
        pinned = [name for name in by_rules if allowed.pins(name)]
        self.candidates, dropped = worthwhile(by_rules, tables, pinned)
        self.left_alone = {**layers.left_alone, **dropped}
        if not self.candidates:
            raise ValueError(why_nothing(model, self.left_alone))
        # Kept out of the module tree: it is neither mutable nor trained, and must not show among
        # the parameters.
        original = copy_of(model).eval()
        let_train(original)
        object.__setattr__(self, "original", original)
        self.specs = {name: layers.specs[name] for name in self.candidates}
        self.nested, self.decomposition = nested, decomposition
        built = self.build(self.candidates, calibration)
        self.model = copy_of(original)
        replace_modules(
            self.model, {name: LayerChoice(built[name], label=name) for name in self.candidates}
        )
        for module in self.model.modules():
            if hasattr(module, "inplace"):
                vars(module)["inplace"] = False  # a candidate's output is needed again in backward
        self.train()  # whatever the user's model was left in

    original: nn.Module

    def save_init_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Keep the arguments of a class of the user's own, and none of this one's.

        NNI would keep them all, the user's model and images among them, for as long as the space
        lives. It uses them only to make the space again in a trial, which a subclass that takes a
        few plain arguments can do (docs/how-to/search-from-python.md).
        """
        own = type(self) is not RankSpace
        super().save_init_arguments(*(args if own else ()), **(kwargs if own else {}))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def freeze(self, sample: Mapping[str, str]) -> nn.Module:
        """Return the plain network of one candidate a layer, with copies of the weights.

        Args:
            sample: layer to candidate name.

        Returns:
            A network that is independent of the space.
        """
        self.validate(dict(sample))
        choices = [module for module in self.model.modules() if isinstance(module, LayerChoice)]
        chosen = {choice.label: choice[sample[choice.label]] for choice in choices}
        copies = {
            label: module.alone() if isinstance(module, NestedLayer) else copy.deepcopy(module)
            for label, module in chosen.items()
        }
        frozen = copy_of(self.model, {id(choice): copies[choice.label] for choice in choices})
        inplace = {
            name
            for name, module in self.original.named_modules()
            if getattr(module, "inplace", False)
        }
        for name, module in frozen.named_modules():
            if name in inplace:
                vars(module)["inplace"] = True
        return frozen

    def build(
        self, candidates: Mapping[str, Mapping[str, Rank]], calibration: Example | None
    ) -> dict[str, dict[str, nn.Module]]:
        """Make candidates of the original network as the space's own are made.

        Args:
            candidates: layer to candidate name to rank.
            calibration: the images to fit them to, ``(N, ...)``.

        Returns:
            Layer to candidate to module.
        """
        check_decomposition(self.decomposition, calibration is not None)
        by_weights = self.decomposition not in (None, "data")
        images = None if by_weights else calibration
        if self.nested:
            return build_nested_candidates(self.original, self.specs, candidates, images)
        return build_candidates(self.original, self.specs, candidates, images, self.decomposition)

    def sensitivities(
        self,
        images: Tensor,
        *,
        bf16: bool = False,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> dict[str, dict[str, float]]:
        """Measure what each candidate alone adds to the loss: `Haloc` takes it as its ``start``.

        The loss is the distance from the original's outputs, on images that the candidate was not
        fitted to, see `nni_haloc.plan.evidence.gather_evidence`.

        Args:
            images: to fit to and to measure on, ``(N, ...)``.
            bf16: run in mixed precision.
            progress: called with the numbers of finished and of all batches.

        Returns:
            Layer to candidate to added loss.
        """
        evidence = gather_evidence(
            self.original,
            self.specs,
            self.candidates,
            self.build,
            images,
            bf16=bf16,
            progress=progress,
        )
        return evidence.added

    @property
    def modules_by_layer(self) -> dict[str, dict[str, nn.Module]]:
        """Trained module of each candidate, by layer."""
        choices = [module for module in self.model.modules() if isinstance(module, LayerChoice)]
        return {
            str(choice.label): {name: choice[name] for name in choice.names} for choice in choices
        }

    def report(self) -> SpaceReport:
        """Report on every layer: its candidates, or why it is left as it is.

        Returns:
            A row for each layer; printed, it is a table.
        """
        return space_report(self.original, self.candidates, self.left_alone)

    def size(self) -> int:
        """Count the networks of the space.

        Returns:
            The product of the layers' numbers of candidates.
        """
        result = 1
        for row in self.candidates.values():
            result *= len(row)
        return result


class TableProfiler(ExpressionProfiler):
    """The cost of any network of a rank space, as one of NNI's expressions.

    For ``RangeProfilerFilter``, ``ExpectationProfilerPenalty``, ``SampleProfilerPenalty``. Make it
    before a one-shot strategy changes the space.

    Args:
        space: the rank space.
        costs: the table; None is the space's own.

    Raises:
        ValueError: if the table does not know a candidate; the message names it.
    """

    def __init__(self, space: RankSpace, costs: CostTable | None = None) -> None:
        super().__init__(space)
        rows, rest = (costs or space.costs).restrict(space.candidates)
        choices = {str(m.label): m for m in space.modules() if isinstance(m, LayerChoice)}
        self.expression = rest + sum(
            MutableExpression.switch_case(choices[layer].choice, row) for layer, row in rows.items()
        )

    def profile(self, sample: Any) -> float:
        """Return the cost of a sample, in the table's unit.

        Args:
            sample: layer to candidate, or a model that has one as its ``sample``: NNI's `Filter`
                gives models to NNI's `ProfilerFilter`.

        Returns:
            The cost of the whole network.
        """
        return float(super().profile(getattr(sample, "sample", sample)))
