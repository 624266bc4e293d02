"""What `nni.compression` 3.0 needs on current torch, without a change of its files; a test for each in tests/test_nni_defects.py."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

with warnings.catch_warnings():  # two of torch's functions under their old names, and classes registered that torch now registers itself
    warnings.simplefilter("ignore")
    from nni.compression.speedup import ModelSpeedup
from nni.compression.quantization import LsqQuantizer
from nni.compression.utils import Evaluator

from nni_haloc.chain.groups import ChannelGroup
from nni_haloc.utils.errors import first_line

Masks = dict[str, dict[str, Tensor]]


def traced(model: nn.Module) -> fx.GraphModule:
    """The model's graph by torch's own tracer; NNI's fails on current torch. ValueError where a network can't be traced."""
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # whatever the model's code makes of a proxy
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({first_line(error)})"
        ) from None


def speed_up(model: nn.Module, example: Tensor, masks: Masks) -> nn.Module:
    """Take the masked channels out of ``model``, in place; it is in evaluation mode then, and all its parameters require gradients.

    NNI's own tracer is not used; its prints and its log are kept off. It finds out by gradients what can go, of every parameter, and the
    layers that it puts in place are in training mode.
    """
    quiet = logging.getLogger(f"{__name__}.speedup")
    quiet.setLevel(logging.ERROR)
    model.requires_grad_()
    with contextlib.redirect_stdout(io.StringIO()), _quiet(), torch.enable_grad():
        small = ModelSpeedup(
            model, example, masks, graph_module=traced(model), logger=quiet
        ).speedup_model()
    small.zero_grad()
    return small.eval()


def pruning_settings(groups: list[ChannelGroup], sparsity: float) -> list[dict[str, Any]]:
    """NNI's list of settings. Beyond what its documentation asks for:

    ``dependency_group_id``: NNI would unmask channels that are added to unmasked ones, and then prune fewer than the mask says.
    ``align`` of each BatchNorm's output with its convolution's mask: without it a masked channel leaves BatchNorm as a constant, its shift,
    which the masked network passes on and the sped-up one has lost. A depthwise convolution's weight likewise.
    """
    settings: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        weight: dict[str, Any] = {"sparse_ratio": sparsity, "granularity": "out_channel"}
        if len(group.convolutions) > 1:
            weight["dependency_group_id"] = f"group{number}"
        settings.append(
            {
                "op_names": group.convolutions,
                "target_names": ["weight", "bias"],
                "target_settings": {"weight": weight},
            }
        )
        align = {
            "align": {"module_name": group.convolutions[0], "target_name": "weight", "dims": [0]}
        }
        if group.depthwise:
            target = {"weight": {"granularity": "out_channel", **align}, "bias": align}
            settings.append(
                {
                    "op_names": group.depthwise,
                    "target_names": ["weight", "bias"],
                    "target_settings": target,
                }
            )
        if group.norms:
            output = {"_output_": {"granularity": "per_channel", **align}}
            settings.append(
                {"op_names": group.norms, "target_names": ["_output_"], "target_settings": output}
            )
    return settings


class Loop(Evaluator):
    """NNI's evaluator on a training loop of ours.

    Of NNI's own, `LightningEvaluator` sets a limit of steps that current Lightning has no setter for, and both make the optimizer anew for
    the wrapped network, from a traced one, at each training. ``train(after_step)`` trains, and calls ``after_step`` after each of the
    optimizer's steps: all parameters of the wrapped network, those included with which it was wrapped. ``evaluate`` runs the network.
    """

    def __init__(
        self, train: Callable[[Callable[[], None]], Any], evaluate: Callable[[], Any] = lambda: None
    ) -> None:
        self._initialization_complete = True
        self._train, self._evaluate = train, evaluate
        self._after: list[Callable[[], None]] = []

    def bind_model(self, model: nn.Module, param_names_map: Any = None) -> None:
        self._after = []

    def unbind_model(self) -> None:
        self.remove_all_hooks()
        self._after = []

    def patch_optim_param_group(self, module_name_param_dict: Any = None) -> None:
        """The wrapped network's parameters are all trained."""

    def patch_optimizer_step(
        self, before_step_tasks: list[Any], after_step_tasks: list[Any]
    ) -> None:
        if before_step_tasks:
            raise NotImplementedError(
                "tasks before a step: L1Norm, FPGM and Taylor, PTQ, QAT and LSQ have none"
            )
        self._after += after_step_tasks

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        def after_step() -> None:
            for task in self._after:
                task()

        with (
            warnings.catch_warnings()
        ):  # of an old name that QATQuantizer calls in each backward pass
            warnings.filterwarnings("ignore", ".*saved_variables.*")
            self._train(after_step)

    def evaluate(self) -> Any:
        return self._evaluate()


def start_lsq(quantizer: LsqQuantizer) -> Callable[[], None]:
    """Have the scales of an `LsqQuantizer` start where the largest value of the next forward pass just fits.

    NNI starts every one at 0.01, which clips at 1.27 whatever is there. Returns what ends it: from then on the scales are only trained.
    """

    def start(wrapper: Any, name: str, target: Tensor) -> None:
        space = wrapper.quantization_target_spaces.get(name)
        if space is not None and not quantizer.is_init:
            space.scale.data = (
                (target.detach().abs().max() / space.qmax)
                .clamp_min(1e-8)
                .reshape(space.scale.shape)
            )

    for wrapper in quantizer._module_wrappers.values():
        wrapper.register_track_func(start)

    def end() -> None:
        quantizer.is_init = True

    return end


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("nni")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
