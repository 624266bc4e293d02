"""Workarounds for defects of `nni.compression` 3.0 on current torch; its files stay unchanged.

There is a test for each in tests/chain/test_nni_defects.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from nni_haloc.utils.quiet import errors_alone

with warnings.catch_warnings():
    # Two of torch's functions have new names, and torch now registers some classes itself.
    warnings.simplefilter("ignore")
    from nni.compression.speedup import ModelSpeedup
from nni.compression.quantization import LsqQuantizer
from nni.compression.utils import Evaluator

from nni_haloc.chain.groups import ChannelGroup
from nni_haloc.space.frozen import trains
from nni_haloc.utils.errors import first_line

Masks = dict[str, dict[str, Tensor]]


def traced(model: nn.Module) -> fx.GraphModule:
    """Trace a network by torch's own tracer, because NNI's fails on current torch.

    Raises:
        ValueError: if it can't be traced.
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # from the model's code, which gets a proxy for a tensor
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({first_line(error)})"
        ) from None


def speed_up(model: nn.Module, example: Tensor, masks: Masks) -> nn.Module:
    """Take the masked channels out of a network, in place.

    NNI's tracer is not used; its prints and its log are hidden. NNI finds the channels that can go
    by gradients of every parameter, and puts in new layers in training mode.

    Args:
        model: the network.
        example: an input, ``(N, C, H, W)``.
        masks: of the channels that go.

    Returns:
        The network in evaluation mode; what was frozen still is.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    quiet = logging.getLogger(f"{__name__}.speedup")
    quiet.setLevel(logging.ERROR)
    for parameter in model.parameters():
        if trains(parameter):
            parameter.requires_grad_(True)
    with contextlib.redirect_stdout(io.StringIO()), errors_alone("nni"), torch.enable_grad():
        small = ModelSpeedup(
            model, example, masks, graph_module=traced(model), logger=quiet
        ).speedup_model()
    small.zero_grad()
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(trains(parameter) and name not in frozen)
    return small.eval()


def pruning_settings(groups: list[ChannelGroup], sparsity: float) -> list[dict[str, Any]]:
    """Make NNI's list of settings.

    It has two things that NNI's documentation does not ask for:

    - ``dependency_group_id``. Without it NNI unmasks channels that are added to unmasked ones, and
      then prunes fewer than the mask says.
    - ``align`` of each BatchNorm's output with its convolution's mask. Without it a masked channel
      leaves BatchNorm as a constant, its shift, which the masked network passes on and the sped-up
      one has lost. A depthwise convolution's weight likewise.
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
    """NNI's evaluator around a training loop of ours.

    Of NNI's own evaluators, `LightningEvaluator` sets a limit of steps that current Lightning has
    no setter for, and both make a new optimizer for the wrapped network, from a traced one, at each
    training.

    Args:
        train: trains all parameters of the wrapped network, those of the wrapping included, and
            calls its argument after each of the optimizer's steps.
        evaluate: runs the network.
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
        """Do nothing: all parameters of the wrapped network are trained."""

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

        with warnings.catch_warnings():
            # QATQuantizer uses an old name in each backward pass.
            warnings.filterwarnings("ignore", ".*saved_variables.*")
            self._train(after_step)

    def evaluate(self) -> Any:
        return self._evaluate()


def start_lsq(quantizer: LsqQuantizer) -> Callable[[], None]:
    """Set each scale of an `LsqQuantizer` from the largest value of the next pass.

    NNI starts every scale at 0.01, which clips at 1.27 whatever the values are.

    Returns:
        A function to call after that pass: from then on the scales are only trained.
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
