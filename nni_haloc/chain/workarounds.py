"""Workarounds for defects of `nni.compression` 3.0 on current torch; its files stay unchanged.

There is a test for each in tests/chain/test_nni_defects.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from nni_haloc.utils.quiet import errors_alone

with warnings.catch_warnings():
    # Two of torch's functions have new names, and torch now registers some classes itself.
    warnings.simplefilter("ignore")
    from nni.compression.speedup import ModelSpeedup
from nni.compression import pruning, quantization
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


def pruning_settings(
    groups: list[ChannelGroup],
    sparsity: float,
    leads: Literal["convolutions", "norms"] = "convolutions",
) -> list[dict[str, Any]]:
    """Make NNI's list of settings for groups of channels.

    It has two things that NNI's documentation does not ask for:

    - ``dependency_group_id``. Without it NNI unmasks channels that are added to unmasked ones, and
      then prunes fewer than the mask says.
    - ``align`` of each BatchNorm's output with its convolution's mask. Without it a masked channel
      leaves BatchNorm as a constant, its shift, which the masked network passes on and the sped-up
      one has lost. A depthwise convolution's weight likewise.
    """
    settings: list[dict[str, Any]] = []

    def add(layers: list[str], names: list[str], **targets: Any) -> None:
        if layers:
            settings.append({"op_names": layers, "target_names": names, "target_settings": targets})

    for number, group in enumerate(groups):
        by_norms = leads == "norms" and bool(group.norms)
        leading = group.norms if by_norms else group.convolutions
        align = {"align": {"module_name": leading[0], "target_name": "weight", "dims": [0]}}
        weight: dict[str, Any] = {"sparse_ratio": sparsity, "granularity": "out_channel"}
        aligned = {"granularity": "out_channel", **align}
        if len(leading) > 1:
            weight["dependency_group_id"] = f"group{number}"
        both = ["weight", "bias"]
        add(leading, both, weight=weight)
        if by_norms:
            add(group.convolutions, both, weight=aligned, bias=align)
        else:
            output = {"granularity": "per_channel", **align}
            add(group.norms, ["_output_"], _output_=output)
        add(group.depthwise, both, weight=aligned, bias=align)
    return settings


def weight_settings(layers: list[str], sparsity: float) -> list[dict[str, Any]]:
    """Make NNI's list of settings for weights that are masked one by one."""
    weight = {"sparse_ratio": sparsity, "granularity": "default"}
    return [{"op_names": layers, "target_names": ["weight"], "target_settings": {"weight": weight}}]


class SlimPruner(pruning.SlimPruner):
    """NNI's pruner, with two defects cured.

    - A mask that is aligned to a vector's, such as that of BatchNorm's weight, is all ones, or
      fails. Here it is the vector's.
    - `unwrap_model` drops the factors that the weights were trained with. Here the weights take
      them up.
    """

    def _generate_sparsity(self, metrics: Any) -> Masks:
        aligned = [
            (name, target_name, target, target._setting.pop("align"))
            for name, row in self._target_spaces.items()
            for target_name, target in row.items()
            if target.target is not None and self._is_aligned_to_vector(name, target)
        ]
        masks = super()._generate_sparsity(metrics)
        for name, target_name, target, align in aligned:
            target._setting["align"] = align
            mask = masks[align["module_name"] or name][align["target_name"]]
            masks[name][target_name] = _along(mask, target.target).expand_as(target.target).clone()
        return masks

    def _is_aligned_to_vector(self, name: str, target: Any) -> bool:
        align = target.align
        if align is None:
            return False
        source = self._target_spaces[align["module_name"] or name][align["target_name"]].target
        return source is not None and source.dim() == 1

    def _fuse_postprocess(self, evaluator: Any) -> None:
        super()._fuse_postprocess(evaluator)
        for name, row in self.scaling_factors.items():
            for target_name, factor in row.items():
                weight = self._target_spaces[name][target_name].target.data
                weight *= _along(factor.detach(), weight)
                factor.data.fill_(1.0)


def _along(vector: Tensor, target: Tensor) -> Tensor:
    """Return values of channels in the shape ``(F, 1, ...)`` of a target ``(F, ...)``."""
    return vector.reshape(-1, *[1] * (target.dim() - 1))


class Loop(Evaluator):
    """NNI's evaluator around a training loop of ours.

    Of NNI's own evaluators, `LightningEvaluator` sets a limit of steps that current Lightning has
    no setter for, and both make a new optimizer for the wrapped network, from a traced one, at each
    training.

    Args:
        train: trains the wrapped network. It gets this object, and calls `loss` with each step's
            loss, `before_step` after the backward pass and `after_step` in the end.
        evaluate: runs the network.
    """

    def __init__(
        self, train: Callable[[Loop], Any], evaluate: Callable[[], Any] = lambda: None
    ) -> None:
        self._initialization_complete = True
        self._train, self._evaluate = train, evaluate
        self._forget()

    def _forget(self) -> None:
        self._losses: list[Callable[[Tensor, Any], Tensor]] = []
        self._before: list[Callable[[], Any]] = []
        self._after: list[Callable[[], Any]] = []

    def bind_model(self, model: nn.Module, param_names_map: Any = None) -> None:
        self._forget()

    def unbind_model(self) -> None:
        self.remove_all_hooks()
        self._forget()

    def loss(self, loss: Tensor) -> Tensor:
        """Return a step's loss with NNI's penalties in it."""
        for patch in self._losses:
            loss = patch(loss, None)
        return loss

    def before_step(self) -> None:
        """Do what NNI does before a step of the optimizer."""
        for task in self._before:
            task()

    def after_step(self) -> None:
        """Do what NNI does after a step of the optimizer."""
        for task in self._after:
            task()

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        self._losses.append(patch)

    def patch_optim_param_group(self, module_name_param_dict: Any = None) -> None:
        """Do nothing: all parameters of the wrapped network are trained."""

    def patch_optimizer_step(
        self, before_step_tasks: list[Any], after_step_tasks: list[Any]
    ) -> None:
        self._before += before_step_tasks
        self._after += after_step_tasks

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        with warnings.catch_warnings():
            # QATQuantizer uses an old name in each backward pass.
            warnings.filterwarnings("ignore", ".*saved_variables.*")
            self._train(self)

    def evaluate(self) -> Any:
        return self._evaluate()


def start_lsq(quantizer: quantization.LsqQuantizer) -> Callable[[], None]:
    """Set each scale of an `LsqQuantizer` from the largest value of the next pass.

    NNI starts every scale at 0.01, which clips at 1.27 whatever the values are.

    Returns:
        A function to call after that pass: from then on the scales are only trained.
    """

    def start(space: Any, target: Tensor) -> None:
        scale = (target.abs().max() / space.qmax).clamp_min(1e-8)
        space.scale.data = scale.reshape(space.scale.shape)

    return _start(quantizer, start)


def start_lsq_plus(quantizer: quantization.LsqPlusQuantizer) -> Callable[[], None]:
    """Set each scale and zero point of an `LsqPlusQuantizer` from the range of the next pass.

    NNI starts every scale at 0.01, and every zero point at half the number of steps, with which all
    positive values are clipped.

    Returns:
        A function to call after that pass: from then on both are only trained.
    """

    def start(space: Any, target: Tensor) -> None:
        low, high = target.min().clamp(max=0), target.max().clamp(min=0)
        scale = ((high - low) / (space.qmax - space.qmin)).clamp_min(1e-8)
        space.scale.data = scale.reshape(1)
        space.zero_point.data = (space.qmin - low / scale).round().reshape(1)

    return _start(quantizer, start)


def _start(quantizer: Any, start: Callable[[Any, Tensor], None]) -> Callable[[], None]:
    """Have ``start`` set the scales of each tensor that the next pass rounds."""

    def track(wrapper: Any, name: str, target: Tensor) -> None:
        space = wrapper.quantization_target_spaces.get(name)
        if space is not None and not quantizer.is_init:
            start(space, target.detach())

    for wrapper in quantizer._module_wrappers.values():
        wrapper.register_track_func(track)

    def end() -> None:
        quantizer.is_init = True

    return end


class DoReFaQuantizer(quantization.DoReFaQuantizer):
    """NNI's quantizer, with four defects cured.

    - It rounds gradients by a module's backward hook, with which an activation in place fails. Here
      it does so by a hook of the output.
    - It takes the ranges of inputs anew from every batch, in evaluation too, so that an image's
      result depends on the others. Here `fix_ranges` ends that.
    - Gradients of an image that are all zero become NaN. Here they stay zero.
    - `unwrap_model` leaves what rounds the gradients in the network. Here it is taken out.
    """

    def __init__(self, network: nn.Module, settings: list[dict[str, Any]], loop: Loop) -> None:
        self._ranges_fixed = False
        self._rounding: list[RemovableHandle] = []
        super().__init__(network, settings, loop)

    def fix_ranges(self, images: Tensor) -> None:
        """Take the ranges of inputs for good.

        Args:
            images: the images to take them from, ``(N, ...)``.
        """
        self.track_forward(images)
        self._ranges_fixed = True

    def update_scale_zp(self, wrapper: Any, target_name: str, target: Tensor) -> None:
        if not self._ranges_fixed:
            super().update_scale_zp(wrapper, target_name, target)

    def _quant_dequant_gradient_hook(self, target_space: Any) -> None:
        module = target_space._wrapper.module
        before = {*module._backward_pre_hooks}
        super()._quant_dequant_gradient_hook(target_space)
        (key,) = {*module._backward_pre_hooks} - before
        stock = module._backward_pre_hooks.pop(key)

        def rounded(gradient: Tensor) -> Tensor:
            return torch.where(gradient == 0, gradient, *stock(module, (gradient,)))

        def watch(module: nn.Module, _: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(rounded)

        self._rounding.append(module.register_forward_hook(watch))

    def unwrap_model(self) -> None:
        super().unwrap_model()
        for handle in self._rounding:
            handle.remove()
