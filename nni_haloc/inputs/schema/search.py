"""The section ``search``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nni_haloc.inputs.options import LamSchedule, Schedule
from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.training import Training
from nni_haloc.inputs.schema.values import Count, CountOrNone, Epochs, NonNegative, Positive, Share


class SearchOptions(Section):
    """Options of the search, those of `nni_haloc.Haloc`."""

    lam: NonNegative = 1.0
    """How strongly the searched layers' outputs are pulled towards the original's (λ of Eq. 9); for
    `rule: search` alone. Larger keeps them closer; 0 turns it off and saves the original's pass."""
    lam_schedule: LamSchedule = "constant"
    """How λ changes: `linear` and `cosine` let it fall to 0 over the search."""
    approach: Literal["features", "weights"] = "features"
    """What λ weighs: distances of feature maps (Eq. 8), or of kernels (`weights`, the alternative
    that the paper rejects)."""
    approach_share: Share = 0.125
    """Share of each batch over which feature maps are compared. Less makes the original's pass
    cheaper. A call of a layer that the original does not make, too, is left out."""
    clip: Positive | None = 10.0
    """Norm to which the weights' gradients are clipped. `null`: they are not clipped; then small
    ranks, which are rarely sampled, may diverge."""
    objective: Literal["settle", "paper"] = "settle"
    """How the search heeds the budget: `settle` puts the expected cost back to the budget after
    each step on the cross-entropy, `paper` is Eq. 7, which multiplies the cross-entropy by
    η (E / budget)^θ. Of several limits, Eq. 7 takes the one that E exceeds most."""
    eta: Positive = 1.0
    """η of Eq. 7, with `search.objective: paper`. It matters only with `alpha_optimizer: sgd`,
    where it acts as a learning rate."""
    theta: NonNegative = 1.0
    """θ of Eq. 7, with `search.objective: paper`."""
    alpha_lr: Positive = 0.03
    """Learning rate of α. `sgd` needs a larger one."""
    alpha_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer of α."""
    alpha_every: Count = 8
    """Iterations from one update of α to the next. The weights are updated in each."""
    start_scale: Positive = 0.005
    """Loss that makes a candidate 1/e as probable at the start, where α starts from
    sensitivities."""
    warmup_epochs: CountOrNone = 0
    """Epochs of the search that train the weights alone."""
    temperature: Positive = 1.0
    """Temperature of the softmax over α."""
    compile: bool = False
    """Whether passes run as captured graphs (CUDA) or compiled programs (processor), in one process
    alone: [compiled passes](how-to/train-faster.md#compiled-passes)."""
    select: Literal["knapsack", "argmax"] = "knapsack"
    """How the plan is chosen in the end: by a `knapsack` within the budget, or by `argmax`, the
    paper's way, which may exceed the budget."""
    min_use: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Share of what the budget leaves above the cheapest network that the knapsack's plan uses at
    least, if any plan does. Scores are noisy, and rank that is left unused is lost."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of the weights, which the result has. It rises to that: 0.975
    after 350 iterations, 0.99 after 890. 0: the last weights."""
    budget_range: (
        Annotated[list[Share], Field(min_length=2, max_length=2), Words("two rising fractions")]
        | None
    ) = None
    """Two fractions of the original's cost, such as `[0.2, 0.6]`. Each step of α draws a budget
    between them, low ones more often, for which the next iterations sample their paths: so one
    search serves [a front](explanation/how-it-works.md#a-front-from-one-search) of many budgets. It
    ends at its own."""

    @model_validator(mode="after")
    def _range(self) -> SearchOptions:
        if self.budget_range is not None:
            low, high = self.budget_range
            if low >= high:
                expected = "expected two rising fractions"
                raise ValueError(f"budget_range: {expected}, found {self.budget_range}")
            if self.objective == "paper":
                expected = "expected none with objective 'paper', which settles at no budget"
                raise ValueError(f"budget_range: {expected}, found {self.budget_range}")
        return self


class Search(SearchOptions, Training):
    """The search: its options, and the training of the weights in it.

    ``start`` says what alpha starts from; `Haloc` takes the measured values themselves under that
    name.
    """

    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Lightning's precision, as in `finetune.precision`."""
    epochs: Epochs = 1  # type: ignore[assignment]  # a fraction, unlike other trainings
    """Epochs of the search, for some hundred iterations in all. A fraction is a part of the data:
    0.5 is one round over half of the batches, 1.5 two rounds over three quarters, each with a
    checkpoint."""
    lr: Positive = 0.02
    """Learning rate of SGD for the weights."""
    schedule: Schedule = "constant"
    """How the learning rate changes, as in `finetune.schedule`."""
    start: Literal["uniform", "sensitivity"] = "sensitivity"
    """Where α starts: `sensitivity` from
    [how far each candidate alone moves the outputs](explanation/how-it-works.md#evidence), at the
    budget at once; `uniform` with all candidates alike."""
    supernet: Literal["nested", "separate"] = "nested"
    """Whether all low ranks of a layer share
    [one set of factors](explanation/how-it-works.md#nested-candidates), or each has weights of its
    own (`separate`, the paper's)."""
    tensorboard: bool = False
    """Whether curves of every candidate's probability, the expected cost and both losses are
    written to `search/` of the run's folder (`nni-haloc[tensorboard]`)."""
