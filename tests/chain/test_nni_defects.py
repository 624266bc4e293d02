"""NNI 3.0's defects that this project works around, one test each.

A dependency that changes shows itself here.
"""

import ast
import copy
import json
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import nni
import pytest
import pytorch_lightning as pl
import torch
from helpers.paths import DIGITS, PACKAGE, ROOT
from helpers.searches import search, state
from nni.compression import distillation, pruning, quantization
from nni.compression.base.apply_method import quant_apply_methods
from nni.compression.pruning import L1NormPruner
from nni.compression.quantization import LsqPlusQuantizer, LsqQuantizer
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.profiler import ExpectationProfilerPenalty
from nni.nas.oneshot.pytorch.supermodule.proxyless import ProxylessMixedLayer
from nni.nas.profiler import ExpressionProfiler
from nni.nas.space import RawFormatModelSpace, SimplifiedModelSpace
from nni.nas.strategy import Random
from nni.nas.strategy.middleware import Chain, Filter
from torch import nn

from nni_haloc.chain.groups import channel_groups
from nni_haloc.chain.pruners import SCHEDULES
from nni_haloc.chain.pruning import prune
from nni_haloc.chain.quantizing import quantize
from nni_haloc.chain.workarounds import (
    DoReFaQuantizer,
    Loop,
    ModelSpeedup,
    SlimPruner,
    pruning_settings,
    speed_up,
    traced,
    weight_settings,
)
from nni_haloc.experiments.check import check_experiment
from nni_haloc.experiments.manager import warm_up_manager
from nni_haloc.experiments.results import trial_results
from nni_haloc.inputs.registries import PRUNERS, QUANTIZERS
from nni_haloc.plan.budget import Limit, cheapest
from nni_haloc.search.multitrial import run_multitrial
from nni_haloc.search.space import RankSpace
from nni_haloc.utils.errors import HalocError


def test_the_stock_latency_penalty_has_no_gradient_and_ours_has(net, images, loaders):
    strategy = search(net, images, loaders)
    layers = list(strategy.mixed_layers.values())
    (by_cost,) = torch.autograd.grad(strategy.expected_cost(), layers[0].alpha)
    assert by_cost.abs().max() > 0

    class Cost(ExpressionProfiler):
        def __init__(self, label, row):
            from nni.mutable import Categorical

            choice = Categorical(list(row), label=label)
            from nni.mutable import MutableExpression

            self.expression = MutableExpression.switch_case(choice, row)

    label = layers[0].label
    stock = ExpectationProfilerPenalty(
        Cost(label, strategy.costs.restrict(strategy.supernet.candidates)[0][label]), baseline=1.0
    )
    loss, _ = stock(
        torch.ones((), requires_grad=True) * 1.0, {label: layers[0].export_probs({})[label]}
    )
    assert torch.autograd.grad(loss, layers[0].alpha, allow_unused=True) == (None,)


def test_the_stock_export_samples_and_ours_is_the_arg_max(net, images, loaders):
    choice = next(m for m in RankSpace(net, images[:1]).modules() if isinstance(m, LayerChoice))
    from nni.mutable.frozen import frozen_context

    with frozen_context():
        stock = ProxylessMixedLayer(
            choice.candidates, nn.Parameter(torch.zeros(len(choice))), nn.Softmax(-1), "label"
        )
    assert len({str(stock.export({})) for _ in range(50)}) > 1
    ours = next(iter(search(net, images, loaders).mixed_layers.values()))
    assert {str(ours.export({})) for _ in range(50)} == {
        str({ours.label: ours.names[int(ours.alpha.argmax())]})
    }


def test_candidates_have_no_batch_norm_whose_statistics_a_backward_pass_could_change(net, images):
    for choice in (m for m in RankSpace(net, images[:1]).modules() if isinstance(m, LayerChoice)):
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in choice.modules())


def test_mutation_is_made_on_a_copy_and_freeze_shares_nothing(net, images, loaders):
    space = RankSpace(net, images[:1], calibration=images)
    before_space, before_net = state(space), state(net)
    strategy = search(net, images, loaders, space=space)
    for before, now in ((before_space, space.state_dict()), (before_net, net.state_dict())):
        assert all(torch.equal(before[k], now[k]) for k in now)
    exported = strategy.network()
    owned = {
        p.data_ptr()
        for model in (strategy.supernet, space, net)
        for p in model.state_dict().values()
        if p.numel()
    }
    assert not owned & {p.data_ptr() for p in exported.state_dict().values() if p.numel()}


def test_choices_are_layer_choice_itself_because_subclasses_are_rejected(net, images):
    from nni.nas.oneshot.pytorch.strategy import no_default_hook

    class Sub(LayerChoice):
        pass

    from nni.mutable.frozen import frozen_context

    with frozen_context():
        sub = Sub({"a": nn.Identity(), "b": nn.Identity()}, label="sub")
    with pytest.raises(TypeError, match="dangling mutables"):
        no_default_hook(sub, "sub", {}, {})
    assert all(
        type(m) is LayerChoice
        for m in RankSpace(net, images[:1]).modules()
        if isinstance(m, LayerChoice)
    )


def test_in_place_activations_after_a_choice_are_turned_off_and_come_back(net, images, loaders):
    strategy = search(net, images, loaders)  # `point` is followed by an in-place ReLU
    assert not any(getattr(m, "inplace", False) for m in strategy.supernet.modules())
    assert strategy.network().act.inplace
    assert net.act.inplace


def test_bf16_autocast_goes_through_the_gate(net, images, loaders):
    strategy = search(net, images, loaders, precision="bf16-mixed", epochs=2)
    assert all(
        torch.isfinite(x.alpha).all() and x.task_gradient.count == 8
        for x in strategy.mixed_layers.values()
    )


def test_alpha_has_no_weight_decay(net, images, loaders):
    strategy = search(net, images, loaders)
    (optimizer,) = (
        o
        for o in strategy._mutated_model_space.evaluator.trainer.optimizers
        if getattr(o, "is_arch_optimizer", False)
    )
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_reports_made_during_a_search_reach_the_experiment(net, images, loaders, monkeypatch):
    """NNI's sequential engine swaps the trial's channel for its own; the search must not."""
    from helpers.searches import Watch
    from nni.runtime.trial_command_channel import get_default_trial_command_channel

    channels = []

    class Seen(Watch):
        def on_train_epoch_end(self, trainer, module):
            channels.append(get_default_trial_command_channel())

    before = get_default_trial_command_channel()
    search(net, images, loaders, callbacks=[Seen()])
    assert channels == [before]


def test_a_space_keeps_no_arguments_that_nni_would_serialise(net, images):
    space = RankSpace(net, images[:1])
    assert (space.trace_args, space.trace_kwargs) == ((), {})


def test_the_evaluator_is_lightning_with_both_loaders(net, images, loaders):
    evaluator = search(net, images, loaders)._mutated_model_space.evaluator
    assert isinstance(evaluator, Lightning)
    assert set(evaluator.train_dataloaders) == {"train", "val"}


def stock_experiment(space, evaluate, folder, strategy=None):
    config = NasExperimentConfig(
        "sequential", "raw", "local", max_trial_number=3, experiment_working_directory=str(folder)
    )
    return NasExperiment(space, FunctionalEvaluator(evaluate), strategy or Random(seed=0), config)


def test_an_experiment_in_a_trial_takes_the_trials_parameters_and_ours_gives_them_back(
    net, images, monkeypatch
):
    """Whatever the trial reports afterwards would count as another's."""
    space, own = RankSpace(net, images[:1]), {"parameter_id": 7, "parameters": {"seed": 1}}
    monkeypatch.setattr(nni.trial, "_params", own)
    model = RawFormatModelSpace.from_model(
        space, FunctionalEvaluator(lambda network: nni.report_final_result(0.0))
    ).random()
    SequentialExecutionEngine().submit_models(model)
    assert nni.trial._params == {"parameter_id": 0, "parameters": model}
    nni.trial._params = own
    run_multitrial(
        space, [Limit(space.costs, space.costs.original)], lambda network: 0.0, "random", 2
    )
    assert nni.trial._params is own


def test_an_experiment_swallows_ctrl_c_and_enters_itself_in_a_list_and_ours_does_neither(
    net, images, monkeypatch, tmp_path
):
    entered = []

    class List:
        def add_experiment(self, *args, **kwargs):
            entered.append(args[0])

        def update_experiment(self, *args):
            pass

    def interrupted(network):
        raise KeyboardInterrupt

    monkeypatch.setattr("nni.nas.experiment.experiment.Experiments", List)
    space = RankSpace(net, images[:1])
    stock = stock_experiment(space, interrupted, tmp_path)
    assert stock.run() is None
    assert entered == [stock.id]
    with pytest.raises(KeyboardInterrupt):
        run_multitrial(space, [Limit(space.costs, space.costs.original)], interrupted, "random", 2)
    assert entered == [stock.id]


def test_a_filter_that_nothing_passes_ends_the_search_in_silence_and_ours_finds_the_one_network(
    net, images, monkeypatch, tmp_path
):
    space = RankSpace(net, images[:1])
    only = cheapest(space.candidates, space.costs)
    limit = Limit(space.costs, space.costs.total(only))
    monkeypatch.setattr(
        "nni.nas.experiment.experiment.Experiments",
        type("List", (), {"__getattr__": lambda *_: lambda *a, **k: None}),
    )
    filtered = Chain(Random(seed=0), Filter(lambda model: False, patience=20))
    stock = stock_experiment(
        space, lambda network: nni.report_final_result(0.0), tmp_path, filtered
    )
    assert stock.run() is True
    assert stock.export_top_models() == []
    stock.stop()
    for strategy in ("random", "regularized-evolution"):
        assert run_multitrial(space, [limit], lambda network: 0.0, strategy, 3) == only


def test_a_multi_trial_experiment_would_make_each_network_anew_from_arguments_unless_told_not_to(
    net, images
):
    space = RankSpace(net, images[:1])
    config = NasExperimentConfig.default(space, FunctionalEvaluator(print), Random())
    assert (config.execution_engine.name, config.model_format.name) == ("ts", "simplified")
    with pytest.raises(TypeError, match="missing"):
        SimplifiedModelSpace.from_model(space).random().executable_model()
    seen = []
    run_multitrial(
        space,
        [Limit(space.costs, space.costs.original)],
        lambda network: seen.append(network.head.weight) or 0.0,
        "random",
        2,
    )
    assert all(torch.equal(weight, net.head.weight) for weight in seen)
    assert len(seen) == 2


class Shifted(nn.Module):
    """Return three convolutions: BatchNorm shifts the first, one adds to it, one takes both."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 2, 1),
        )
        nn.init.constant_(self.norm.bias, 0.5)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.c(x + self.b(x))


@pytest.fixture
def shifted():
    torch.manual_seed(0)
    return Shifted().eval()


def stock_masks(model, settings, x):
    """What NNI's pruner leaves: the masks, and what the masked network computes."""
    pruner = L1NormPruner(model, settings)
    pruner.track_forward(x)
    _, masks = pruner.compress()
    output = model(x).detach()
    pruner.unwrap_model()
    return masks, output


EACH = [{"op_types": ["Conv2d"], "exclude_op_names": ["c"], "sparse_ratio": 0.5}]


def test_nnis_tracer_fails_and_torchs_is_passed(shifted):
    x = torch.randn(2, 3, 6, 6)
    masks, _ = stock_masks(shifted, EACH, x)
    with pytest.raises(AttributeError, match="startswith"):
        ModelSpeedup(shifted, x, masks)
    assert ModelSpeedup(shifted, x, masks, graph_module=traced(shifted)).speedup_model() is shifted


def test_a_masked_channel_leaves_batch_norm_as_a_constant_unless_its_output_is_masked_too(shifted):
    """Added channels are unmasked, too, unless they are masked together.

    Only with both settings is the sped-up network the masked one.
    """
    x = torch.randn(2, 3, 6, 6)
    groups, _ = channel_groups(shifted, traced(shifted).graph)
    settings = pruning_settings(groups, 0.5)
    assert [group.convolutions for group in groups] == [["a", "b"]]
    unaligned = [row for row in settings if row["target_names"] != ["_output_"]]
    apart = copy.deepcopy(settings)
    del apart[0]["target_settings"]["weight"]["dependency_group_id"]
    differences, channels = [], []
    for chosen in (settings, unaligned, apart):
        model = copy.deepcopy(shifted)
        masks, expected = stock_masks(model, chosen, x)
        differences.append(float((speed_up(model, x, masks)(x).detach() - expected).abs().max()))
        channels.append(model.b.out_channels)
    assert differences[0] < 1e-6
    assert channels[0] == 3
    assert differences[1] > 1e-2
    assert channels[2] > 3 or differences[2] > 1e-2


def test_the_stock_speed_up_prints_needs_gradients_and_leaves_new_layers_in_training_mode(
    shifted, capsys
):
    x = torch.randn(2, 3, 6, 6)
    masks, _ = stock_masks(
        shifted, pruning_settings(channel_groups(shifted, traced(shifted).graph)[0], 0.5), x
    )
    with torch.no_grad(), pytest.raises((AttributeError, TypeError), match="NoneType"):
        ModelSpeedup(
            copy.deepcopy(shifted),
            x,
            copy.deepcopy(masks),
            graph_module=traced(copy.deepcopy(shifted)),
        ).speedup_model()
    stock = copy.deepcopy(shifted)
    ModelSpeedup(stock, x, copy.deepcopy(masks), graph_module=traced(stock)).speedup_model()
    assert stock.norm.training
    assert capsys.readouterr().out
    with torch.no_grad():
        ours = speed_up(shifted, x, masks)
    assert not any(module.training for module in ours.modules())
    assert capsys.readouterr().out == ""


def test_lightning_has_no_setter_for_the_limit_of_steps_that_nnis_evaluator_sets():
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=1)
    with pytest.raises(AttributeError, match="max_steps"):
        trainer.fit_loop.max_steps = 1


def test_the_stock_lsq_starts_every_scale_at_a_hundredth_and_ours_where_the_range_is(shifted):
    x = 10 * torch.randn(2, 3, 6, 6)
    settings = [
        {
            "op_names": ["a"],
            "target_names": ["_input_", "weight"],
            "quant_dtype": "int8",
            "quant_scheme": "symmetric",
        }
    ]
    stock = LsqQuantizer(copy.deepcopy(shifted), settings, Loop(lambda after_step: None))
    stock.track_forward(x)
    assert [
        float(row["scale"].detach()) for row in stock.get_calibration_config()["a"].values()
    ] == pytest.approx([0.01, 0.01])
    rows = quantize(shifted, x, "lsq", lambda network: None).calibration()["a"]
    assert rows["_input_0"]["scale"] == pytest.approx([float(x.abs().max()) / 127])
    assert rows["weight"]["scale"] == pytest.approx(
        [float(shifted.a.weight.detach().abs().max()) / 127]
    )


def test_qat_still_calls_an_old_name_in_each_backward_pass(shifted):
    x, warned = torch.randn(2, 3, 6, 6), []

    def train(network):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            network.train()(x).sum().backward()
        warned.extend(str(w.message) for w in found)

    quantize(shifted, x, "qat", train)
    assert any("saved_variables" in text for text in warned)


def stepped(network, x, seen=lambda: None, steps=4):
    """Return a training for NNI's pruners that, like theirs, leaves out what they add."""

    def train(loop):
        own = [p for name, p in network.named_parameters() if not name.endswith(PRUNERS_OWN)]
        optimizer = torch.optim.SGD(own, 0.02)
        for _ in range(steps):
            network.zero_grad()
            loop.loss(network(x).square().mean()).backward()
            loop.before_step()
            optimizer.step()
            loop.after_step()
            seen()

    return train


PRUNERS_OWN = ("_slim_factor", "_mvp_score")


def ready(kind, network, settings, x, *arguments, **options):
    """Make a pruner of NNI's or ours, and run it to its end."""
    made = kind(network, settings, Loop(stepped(network, x, **options)), *arguments)
    made.track_forward(x)
    made.compress()
    return made


def slim_settings(network):
    groups, _ = channel_groups(network, traced(network).graph)
    return pruning_settings(groups, 0.5, "norms")


def test_the_stock_slim_cannot_align_to_batch_norms_weight_and_ours_does(shifted):
    """A bias stays, so that the channel is a constant; a convolution's weight fails."""
    x = torch.randn(2, 3, 6, 6)
    norm_alone = [{"op_names": ["norm"], "sparse_ratio": 0.5}]
    with pytest.raises(IndexError, match="Dimension out of range"):
        ready(pruning.SlimPruner, copy.deepcopy(shifted), slim_settings(shifted), x, 4)
    stock = ready(pruning.SlimPruner, copy.deepcopy(shifted), norm_alone, x, 4).get_masks()
    assert (float(stock["norm"]["weight"].sum()), float(stock["norm"]["bias"].sum())) == (3, 6)
    network = copy.deepcopy(shifted)
    masks = ready(SlimPruner, network, slim_settings(shifted), x, 4).get_masks()
    kept = masks["norm"]["weight"]
    assert kept.sum() == 3
    assert torch.equal(masks["norm"]["bias"], kept)
    assert torch.equal(masks["a"]["weight"].amax((1, 2, 3)), kept)
    assert torch.equal(masks["b"]["bias"], kept)


def test_the_stock_slim_drops_the_factors_that_it_trained_with_and_ours_keeps_them(shifted):
    x, differences = torch.randn(2, 3, 6, 6), []
    for kind in (pruning.SlimPruner, SlimPruner):
        network = copy.deepcopy(shifted)
        made = ready(kind, network, [{"op_names": ["norm"], "sparse_ratio": 1e-9}], x, 4)
        trained = network(x).detach()
        made.unwrap_model()
        differences.append(float((network(x) - trained).detach().abs().max()))
    assert differences[0] > 1e-2
    assert differences[1] < 1e-6


@pytest.mark.parametrize("schedule", [pruning.LinearPruner, pruning.AGPPruner])
def test_a_schedule_changes_nothing_of_movements_own_and_is_refused(shifted, schedule):
    x, ratios = torch.randn(2, 3, 6, 6), []
    network = copy.deepcopy(shifted)
    settings = [{"op_names": ["a"], "sparse_ratio": 0.5}]

    def see():
        ratios.append(made._target_spaces["a"]["weight"].sparse_ratio)

    loop = Loop(stepped(network, x, see))
    made = pruning.MovementPruner(network, settings, loop, 0, 4)
    scheduled = schedule(made, 1, 4)
    scheduled.track_forward(x)
    scheduled.compress(4, None)
    cubic = [0.5 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)]
    assert ratios == pytest.approx(cubic)
    with pytest.raises(ValueError, match="movement.*which has one of its own"):
        prune(shifted, x[:1], 0.5, "movement", sparsity_schedule="linear")


def test_the_speed_up_of_single_weights_gives_the_dense_network_back(shifted):
    """NNI takes out nothing and leaves the masks out; `prune` puts zeros there."""
    x = torch.randn(2, 3, 6, 6)
    masks, expected = level_masks(copy.deepcopy(shifted), x)
    stock = speed_up(copy.deepcopy(shifted), x, masks)
    with torch.no_grad():
        assert torch.equal(stock(x), shifted(x))
        assert (stock(x) - expected).abs().max() > 1e-2
        torch.testing.assert_close(prune(shifted, x, 0.5, "level")(x), expected)


def level_masks(network, x):
    made = pruning.LevelPruner(network, weight_settings(["a", "b", "c"], 0.5))
    made.track_forward(x)
    _, masks = made.compress()
    output = network(x).detach()
    made.unwrap_model()
    return masks, output


def test_the_stock_lsq_plus_starts_with_every_positive_value_clipped_and_ours_with_none(shifted):
    x = torch.randn(2, 3, 6, 6)
    values = {"quant_dtype": "int8", "quant_scheme": "affine"}
    settings = [{"op_names": ["a"], "target_names": ["_input_", "weight"], **values}]
    stock = LsqPlusQuantizer(copy.deepcopy(shifted), settings, Loop(lambda loop: None))
    stock.track_forward(x)
    space = stock._target_spaces["a"]["_input_0"]
    rounded = quant_apply_methods["lsq_plus_clamp_round"](x, space).detach()
    assert float(rounded.max()) == 0
    row = quantize(shifted, x, "lsq+").calibration()["a"]["_input_0"]
    (scale,), (zero,) = row["scale"], row["zero_point"]
    assert scale == pytest.approx(float(x.max() - x.min()) / 254)
    assert (-127 - zero) * scale == pytest.approx(float(x.min()), abs=scale)
    assert (127 - zero) * scale == pytest.approx(float(x.max()), abs=scale)


DOREFA = [
    {
        "op_names": ["a", "b"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
    }
]


class InPlace(Shifted):
    def forward(self, x):
        return self.c(torch.relu_(self.b(torch.relu_(self.a(x)))))


def test_the_stock_dorefa_fails_before_an_activation_in_place_and_ours_rounds_gradients():
    torch.manual_seed(0)
    network, x = InPlace(), torch.randn(2, 3, 6, 6)

    def passed(kind):
        copied = copy.deepcopy(network)
        made = kind(copied, DOREFA, Loop(lambda loop: None))
        made.register_output_backward_hook()
        return copied, made

    stock, _ = passed(quantization.DoReFaQuantizer)
    with pytest.raises(RuntimeError, match="modified inplace"):
        stock(x)
    ours, made = passed(DoReFaQuantizer)
    seen = []
    output = ours.a(x)
    output.register_hook(seen.append)
    given = torch.randn_like(output)
    given[1] = 0  # of an image that does not count
    output.backward(given)
    assert torch.equal(seen[0][1], given[1])
    steps = 2 * given[0].abs().max() / 254
    off = (seen[0][0] - given[0]).abs()
    assert 0 < off.max() <= 1.01 * steps
    made.unwrap_model()
    assert not ours.a._forward_hooks


def test_the_stock_dorefa_makes_nan_of_an_image_without_gradients_and_stays_in_the_network(shifted):
    made = quantization.DoReFaQuantizer(shifted, DOREFA, Loop(lambda loop: None))
    made.register_output_backward_hook()
    (hook,) = shifted.a._backward_pre_hooks.values()
    assert hook(shifted.a, (torch.zeros(1, 2, 2, 2),))[0].isnan().all()
    made.unwrap_model()
    assert shifted.a._backward_pre_hooks


def test_the_stock_dorefa_takes_ranges_from_each_batch_in_evaluation_and_ours_fixes_them(shifted):
    x = torch.randn(2, 3, 6, 6)
    large = torch.cat([x, 100 * x])
    stock, ours = (copy.deepcopy(shifted) for _ in range(2))
    quantization.DoReFaQuantizer(stock, DOREFA, Loop(lambda loop: None)).track_forward(x)
    DoReFaQuantizer(ours, DOREFA, Loop(lambda loop: None)).fix_ranges(x)
    with torch.no_grad():
        assert not torch.allclose(stock.eval()(x), stock(large)[:2])
        torch.testing.assert_close(ours.eval()(x), ours(large)[:2])


def test_bnn_makes_ones_of_all_that_an_activation_lets_through(shifted):
    """So inputs would say nothing after a ReLU, and `quantize` rounds weights alone."""
    inputs = [{"op_names": ["b"], "target_names": ["_input_"], "quant_dtype": None}]
    made = quantization.BNNQuantizer(shifted, inputs, Loop(lambda loop: None))
    x = torch.relu(torch.randn(2, 6, 4, 4))
    shifted.b(x)
    assert bool((made._module_wrappers["b"].patch_helper("_input_0", x) == 1).all())
    weights = quantize(Shifted(), torch.randn(2, 3, 6, 6), "bnn")
    assert {*weights.calibration()["a"]} == {"weight"}


def test_bnn_keeps_the_weights_that_it_trains_between_minus_one_and_one(shifted):
    x, largest = torch.randn(2, 3, 6, 6), []

    def train(network):
        network.train()
        for _ in range(2):
            for wrapper in (network.a._nni_wrapper, network.b._nni_wrapper):
                wrapper.weight.data += 5
            network(x)
            largest.append(float(network.a._nni_wrapper.weight.detach().abs().max()))

    quantize(shifted, x, "bnn", train)
    assert largest == [1.0, 1.0]


def test_the_page_has_a_row_for_each_of_nnis_classes_and_each_name_of_ours():
    page = (ROOT / "docs/explanation/nni.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for kinds, end in ((pruning, "Pruner"), (quantization, "Quantizer"), (distillation, "er")):
        for name in vars(kinds):
            if name[0].isupper() and name.endswith(end):
                assert any(row.startswith(f"| `{name}`") or f", `{name}`" in row for row in rows), (
                    name
                )
    for kind, names in (("pruner", PRUNERS.own()), ("quantizer", QUANTIZERS.own())):
        for name in names:
            assert any(f"| `{kind}: {name}` | tested" in row for row in rows), name
    for name in SCHEDULES:
        assert any(f"| `sparsity_schedule: {name}` | tested" in row for row in rows), name


def test_a_trial_asks_for_its_parameters_before_any_heavy_import():
    """In the source only `import nni` and the standard library come before the question.

    In fact no torch is loaded then.
    """
    *before, question = ast.parse((PACKAGE / "trial.py").read_text()).body[1:6]
    assert [ast.unparse(line) for line in before] == [
        "import json",
        "import os",
        "import sys",
        "import nni",
    ]
    assert "nni.get_next_parameter()" in ast.unparse(question)
    program = (
        "import runpy, sys, nni\n"
        "def ask():\n"
        "    print(sorted({'torch', 'pytorch_lightning', 'nni.nas'} & set(sys.modules)))\n"
        "    sys.exit(0)\n"
        "nni.get_next_parameter = ask\n"
        "runpy.run_module('nni_haloc.trial', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_results_are_joined_by_parameter_id_and_not_by_trial(tmp_path):
    """The manager may hand trial A what it lists for trial B, with a concurrency of two."""
    folder = tmp_path / "exp" / "db"
    folder.mkdir(parents=True)
    connection = sqlite3.connect(folder / "nni.sqlite")
    connection.execute(
        "CREATE TABLE TrialJobEvent "
        "(timestamp, trialJobId, event, data, logPath, sequenceId, message, environmentId)"
    )
    connection.execute(
        "CREATE TABLE MetricData (timestamp, trialJobId, parameterId, type, sequence, data)"
    )
    for trial, number in (("A", 0), ("B", 1), ("C", 2)):
        record = json.dumps(
            {"parameter_id": number, "parameters": {"budget.fraction": number / 10}}
        )
        connection.execute(
            "INSERT INTO TrialJobEvent VALUES (0, ?, 'RUNNING', ?, '', 0, '', '')", (trial, record)
        )
        connection.execute(
            "INSERT INTO TrialJobEvent VALUES (1, ?, ?, '', '', 0, '', '')",
            (trial, "FAILED" if trial == "C" else "SUCCEEDED"),
        )
    for trial, number in (("A", 1), ("B", 0)):  # swapped
        data = json.dumps(json.dumps({"default": number + 0.5}))
        connection.execute(
            "INSERT INTO MetricData VALUES (2, ?, ?, 'FINAL', 0, ?)", (trial, str(number), data)
        )
    connection.commit()
    connection.close()
    assert trial_results(tmp_path, "exp") == [
        {"trial": "B", "status": "SUCCEEDED", "budget.fraction": 0.0, "default": 0.5},
        {"trial": "A", "status": "SUCCEEDED", "budget.fraction": 0.1, "default": 1.5},
        {"trial": "C", "status": "FAILED", "budget.fraction": 0.2},
    ]


WEIGHTS = DIGITS.with_name("digits.safetensors")
EXPERIMENT = """
searchSpace: {budget.fraction: {_type: choice, _value: [0.5]}}
trialCommand: python3 -m nni_haloc.trial run.yml
trialConcurrency: 1
tuner: {name: GridSearch}
trainingService: {platform: local}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "_type: choice",
            "_type: chioce",
            "searchSpace.budget.fraction: _type: expected one of choice.*found 'chioce'",
        ),
        ("trainingService: {platform: local}", "", "trainingService: missing"),
        (
            "trainingService: {platform: local}",
            "trainingService: local",
            "trainingService.platform: expected a name.*found 'local'",
        ),
        (
            "_type: choice, _value: [0.5]",
            "_type: loguniform, _value: [1e-1, 0.5]",
            "expected numbers for loguniform, found '1e-1' .NNI reads",
        ),
        (
            "_type: choice, _value: [0.5]",
            "_type: randint, _value: [0.5, 1]",
            "expected numbers for randint, found 0.5",
        ),
        ("run.yml", "'run.yml", "haloc.yml"),
        ("_value: [0.5]", "_value: 0.5", "_value: expected a list"),
        ("budget.fraction", "budget.fractoin", "budget.fractoin: unknown key"),
        (
            "[0.5]",
            "[0.5, 1.5]",
            "budget.fraction: expected a fraction of the original's cost, above 0 to 1, found 1.5",
        ),
        ("run.yml", "walk.yml", "walk.yml: no such file"),
        ("trial run.yml", "trial", "trialCommand: expected"),
    ],
)
def test_what_nni_accepts_in_silence_or_misreports_is_one_clear_line(tmp_path, old, new, message):
    (tmp_path / "run.yml").write_text(
        f"{{model: {{name: digits_cnn}}, weights: {WEIGHTS}, data: {{name: digits}}, "
        "budget: {fraction: 0.5}}"
    )
    (tmp_path / "haloc.yml").write_text(EXPERIMENT)
    assert "searching budget.fraction" in check_experiment(tmp_path / "haloc.yml")
    assert old in EXPERIMENT
    (tmp_path / "haloc.yml").write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(HalocError, match=message) as error:
        check_experiment(tmp_path / "haloc.yml")
    assert "\n" not in str(error.value)


def test_the_managers_files_are_read_before_nnictls_three_seconds_start(monkeypatch):
    """On a cold machine `nnictl create` timed out twice.

    It waited for its manager to load some thousand files.
    """
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name) or b"")
    warm_up_manager()
    assert {"node", "main.js"} <= set(read)


def test_nnictl_still_finds_pkg_resources():
    import pkg_resources  # noqa: F401
    import setuptools

    assert int(setuptools.__version__.split(".")[0]) < 82
    assert nni.__version__ == "3.0"


def test_nnis_one_shot_strategies_are_stubs_if_their_module_is_imported_first_but_not_here():
    """The package's import from within its half-made module fails.

    NNI takes that for a missing torch.
    """

    def strategy_after(first):
        code = f"import {first}; from nni.nas.strategy import DARTS; print(DARTS.__name__)"
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert strategy_after("nni.nas.oneshot.pytorch.strategy") == "ImportFailedStrategy"
    assert strategy_after("nni_haloc.search.strategy") == "DARTS"
