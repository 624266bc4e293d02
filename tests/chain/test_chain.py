"""NNI's pruners and quantizers on compressed networks, against masks and roundings made by hand."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.networks import SmallNet
from torch import nn

from nni_haloc.chain import pruners, pruning, quantizing
from nni_haloc.chain.groups import channel_groups, rank_layers
from nni_haloc.chain.pruning import masked, prune, zero_share, zeros_kept
from nni_haloc.chain.quantizing import quantize
from nni_haloc.chain.workarounds import speed_up, traced
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import PRUNERS, QUANTIZERS
from nni_haloc.plan.compression import compress, restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.saved import load, save, shrink
from nni_haloc.training.finetuning import accuracy, finetune
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import Diverged

PLAN = RankPlan({"stem": (4, 3), "body.0": (6, 6), "point": (6,)})


def lively(model):
    """With BatchNorm shifts, without which a masked channel leaves it as zero anyway."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.bias.normal_(generator=generator)
                m.running_mean.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture
def tucker(net):
    return lively(compress(net, PLAN))


@pytest.fixture
def batches(images, labels):
    return list(zip(images.split(32), labels.split(32), strict=True))


def by_hand(network, masks, x):
    """Compute by the masked network: weights times masks, BatchNorm's output times its mask."""
    network = copy.deepcopy(network)
    for name, row in masks.items():
        module = network.get_submodule(name)
        for key, mask in row.items():
            if key in ("weight", "bias") and mask is not None and getattr(module, key) is not None:
                getattr(module, key).data *= mask
            elif key.startswith("_output_"):
                module.register_forward_hook(lambda _, __, y, mask=mask: y * mask)
    with torch.no_grad():
        return network(x)


def resnet20():
    torch.manual_seed(0)
    model = build_model("resnet20")
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.in_channels > 3
    ]
    return compress(model, RankPlan(dict.fromkeys(names[:12], (8, 6))))


SMALLER = [name for name in PRUNERS if not PRUNERS[name].single_weights]


def check_speed_up(network, x, sparsity=0.4, **options):
    """Prune, and compare the smaller network with the one that is masked by hand."""
    network = lively(network)
    with torch.no_grad():
        before = network(x)
        copied, example, masks = masked(network, x[:1], sparsity, **options)
        if PRUNERS[options.get("pruner", "l1")].needs != "training":
            same = options.get("sparsity_schedule", "none") == "none"
            assert torch.equal(copied(x), before) == same  # a schedule trains
        expected = by_hand(copied, masks, x)
        small = speed_up(copied, example, masks)
        torch.testing.assert_close(
            small(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    assert (expected - before).abs().max() > 1e-3
    least = 0.8 if options.get("ranks") == "prune" else 1.0
    assert sum(p.numel() for p in small.parameters()) < least * sum(
        p.numel() for p in network.parameters()
    )
    return small


@pytest.mark.parametrize("ranks", ["keep", "prune"])
@pytest.mark.parametrize("pruner", SMALLER)
def test_a_pruned_tucker_network_computes_what_the_masked_one_computes(
    tucker, images, batches, pruner, ranks, device
):
    before = copy.deepcopy(tucker.state_dict())
    small = check_speed_up(tucker, images, pruner=pruner, batches=batches, ranks=ranks)
    assert all(torch.equal(before[key], value) for key, value in tucker.state_dict().items())
    # Ranks (4, 3) and 6: two fifths less, or all of them.
    kept = (4, 3, 6) if ranks == "keep" else (3, 2, 4)
    assert (*small.stem.core.weight.shape[:2], small.point.right.out_channels) == kept
    assert small.stem.factor_out.out_channels == 5
    assert (
        small.body[0].factor_out.out_channels == small.point.left.out_channels == 8
    )  # which are added up
    assert small.head.in_features == 8


@pytest.mark.parametrize("schedule", ["linear", "agp"])
@pytest.mark.parametrize("pruner", [name for name in SMALLER if not PRUNERS[name].scheduled])
def test_a_schedule_ends_with_the_masked_network_and_the_sparsity(
    tucker, images, batches, pruner, schedule
):
    small = check_speed_up(
        tucker, images, pruner=pruner, batches=batches * 3, sparsity_schedule=schedule
    )
    assert small.stem.factor_out.out_channels == 5  # 8, two fifths less
    assert small.stem.core.weight.shape[:2] == (4, 3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.1, 0.2, 0.3, 0.4]), ("agp", [0.23125, 0.35, 0.39375, 0.4])],
)
def test_sparsity_rises_as_the_schedule_says(
    tucker, images, batches, monkeypatch, schedule, expected
):
    """That is 0.4 t / 4, and 0.4 (1 - (1 - t / 4)^3)."""
    seen = []
    stock = PRUNERS["l1"].make

    def watched(*arguments):
        made = stock(*arguments)
        generate = made.generate_masks
        made.generate_masks = lambda: (
            seen.append(made._target_spaces["stem.factor_out"]["weight"].sparse_ratio) or generate()
        )
        return made

    monkeypatch.setattr(pruners, "L1", replace(PRUNERS["l1"], make=watched))
    monkeypatch.setattr(pruning, "_UPDATES", 4)
    prune(tucker, images[:1], 0.4, batches=(batches * 4)[:8], sparsity_schedule=schedule)
    assert seen == pytest.approx(expected)


def test_ranks_are_all_parts_of_low_rank_layers_but_the_last(tucker):
    assert rank_layers(tucker) == {
        "stem.factor_in", "stem.core", "body.0.factor_in", "body.0.core", "point.right"
    }  # fmt: skip
    assert rank_layers(SmallNet()) == set()


@pytest.mark.parametrize("schedule", ["none", "agp"])
def test_weights_that_are_masked_one_by_one_become_zeros_and_no_layer_smaller(
    tucker, images, batches, schedule, caplog
):
    before = copy.deepcopy(tucker)
    options = {"pruner": "level", "batches": batches, "sparsity_schedule": schedule}
    copied, _, masks = masked(tucker, images[:1], 0.4, **options)
    small = prune(tucker, images[:1], 0.4, **options)
    torch.testing.assert_close(small(images), by_hand(copied, masks, images))
    assert str(small) == str(tucker)
    assert zero_share(small) == pytest.approx(0.4, abs=0.02)
    assert zero_share(tucker) == 0
    for name, row in masks.items():
        weight = small.get_parameter(f"{name}.weight")
        assert int((weight == 0).sum()) == int(weight.numel() * 0.4)
        if schedule == "none":
            kept, lost = (
                before.get_parameter(f"{name}.weight").abs()[row["weight"] == value]
                for value in (1, 0)
            )
            assert kept.min() >= lost.max()
    assert "sets 39" in caplog.text


def test_zeros_stay_zeros_in_a_training_with_momentum_and_weight_decay(tucker, images, loaders):
    small = prune(tucker, images[:1], 0.4, "level")
    before = {name: value == 0 for name, value in small.named_parameters()}
    with zeros_kept(small):
        finetune(small, loaders[0], Recipe(1, 0.1), enable_progress_bar=False)
    weights = [name for name in before if name.endswith("weight") and "norm" not in name]
    assert all(
        torch.equal(before[name], small.get_parameter(name) == 0)
        for name in weights
        if small.get_parameter(name).dim() > 1
    )
    assert not any(value._backward_hooks for value in small.parameters())


@pytest.mark.parametrize("pruner", list(PRUNERS))
def test_what_is_frozen_is_not_trained_and_still_frozen_afterwards(tucker, images, batches, pruner):
    for parameter in tucker.stem.parameters():
        parameter.requires_grad_(False)
    copied, *_ = masked(tucker, images[:1], 0.4, pruner, batches)
    for name, parameter in copied.named_parameters():
        assert parameter.requires_grad == (not name.startswith("stem."))
        if name.startswith("stem."):
            assert torch.equal(parameter, tucker.get_parameter(name))
    small = prune(tucker, images[:1], 0.4, pruner, batches)
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
        n for n, p in tucker.named_parameters() if not p.requires_grad
    }


@pytest.mark.parametrize("pruner", ["l1", "taylor", "slim", "movement", "level"])
def test_a_network_on_a_device_is_pruned_there_to_the_same(tucker, images, batches, pruner, device):
    expected = prune(tucker, images[:1], 0.4, pruner, batches)
    small = prune(copy.deepcopy(tucker).to(device), images[:1].to(device), 0.4, pruner, batches)
    assert all(p.device.type == device.type for p in small.parameters())
    assert str(small) == str(expected)
    trained = PRUNERS[pruner].needs == "training"
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if trained else {}
    torch.testing.assert_close(small.cpu()(images), expected(images), **tolerance)


def test_residual_networks_with_ranks_are_sped_up_exactly():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = check_speed_up(resnet20(), x, ranks="prune")
    assert small.layer1[0].conv1.core.out_channels == 5  # 8, two fifths less
    assert small.layer2[0].bn2.num_features == 32  # its shortcut is padded with zeros to as many


def test_depthwise_convolutions_follow_the_channels_that_they_are_fed():
    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.norm1 = nn.Conv2d(3, 10, 1, bias=False), nn.BatchNorm2d(10)
            self.each, self.norm2 = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.BatchNorm2d(10)
            self.narrow, self.head = nn.Conv2d(10, 4, 1), nn.Linear(64, 2)

        def forward(self, x):
            x = torch.relu(self.norm1(self.wide(x)))
            x = torch.relu(self.norm2(self.each(x)))
            return self.head(torch.flatten(self.narrow(x), 1))

    torch.manual_seed(0)
    small = check_speed_up(Inverted(), torch.randn(4, 3, 4, 4))
    assert (small.each.in_channels, small.each.groups, small.each.out_channels) == (6, 6, 6)
    assert small.head.in_features == 3 * 16  # flattened: 16 positions of each channel


def test_what_counts_on_the_number_of_channels_keeps_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.twice, self.grouped = (
                nn.Conv2d(4, 4, 1) for _ in range(5)
            )
            self.d, self.e = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
            self.grouped = nn.Conv2d(4, 4, 1, groups=2)

        def forward(self, x):
            y = torch.cat([self.a(x), torch.sigmoid(self.b(x))], 1)
            z = self.twice(self.twice(self.e(torch.relu(self.d(y)))))
            return self.grouped(self.c(z))

    groups, left_alone = channel_groups(Odd(), traced(Odd()).graph)
    assert [group.convolutions for group in groups] == [["d"]]
    assert left_alone == {
        "a": "its channels go through cat",
        "b": "its channels go through sigmoid",
        "twice": "twice is called more than once",
        "e": "twice is called more than once",
        "c": "its channels go through Conv2d",
        "grouped": "its channels go through Conv2d",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.0,), {}), "sparsity: expected a number between 0 and 1, found 0.0"),
        (((1.0,), {}), "sparsity: expected a number between 0 and 1, found 1.0"),
        (((0.3, "l3"), {}), "pruner: expected one of l1, l2, fpgm, .* found 'l3'"),
        (((0.3, "taylor"), {}), "pruner: 'taylor' needs training images"),
        (((0.3, "slim"), {}), "pruner: 'slim' needs training images"),
        (((0.3, "movement", iter(())), {}), "pruner: 'movement' needs training images"),
        (
            ((0.3,), {"sparsity_schedule": "agp"}),
            "pruner: sparsity_schedule 'agp' needs training images",
        ),
        (((0.3,), {"ranks": "some"}), "ranks: expected one of keep, prune, found 'some'"),
        (
            ((0.3,), {"sparsity_schedule": "cubic"}),
            "sparsity_schedule: expected one of none, linear, agp, found 'cubic'",
        ),
        (
            ((0.3, "movement"), {"sparsity_schedule": "linear"}),
            "sparsity_schedule: expected none with the pruner 'movement', which has one of its own",
        ),
    ],
)
def test_what_no_pruner_can_do_is_said(tucker, images, arguments, message):
    places, named = arguments
    with pytest.raises(ValueError, match=message):
        prune(tucker, images[:1], *places, **named)


def test_a_network_of_ranks_alone_says_that_they_are_kept(images):
    network = compress(nn.Sequential(nn.Conv2d(3, 4, 3)), RankPlan({"0": (2, 2)}))
    with pytest.raises(
        ValueError,
        match="nothing to prune in Sequential .0.factor_in and 1 more: ranks are kept",
    ):
        prune(network, images[:1], 0.5)
    assert prune(network, images[:1], 0.5, ranks="prune")[0].core.weight.shape[:2] == (1, 1)


def test_a_pruner_that_diverges_says_so(tucker, images, batches):
    with pytest.raises(Diverged, match="the training of the pruner diverged: .* learning rate"):
        prune(tucker, images[:1], 0.4, "slim", batches * 10, lr=1e30)


def test_layers_of_a_subclass_are_pruned_as_the_class_that_they_compute_as(tucker, images, batches):
    class Own(nn.Conv2d):
        pass

    tucker.stem.factor_out.__class__ = Own
    check_speed_up(tucker, images, pruner="l1", batches=batches)


def test_a_network_that_cannot_be_traced_or_has_nothing_to_prune_is_one_line():
    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(
        ValueError,
        match="^torch.fx cannot trace Branching .symbolically traced variables cannot be used",
    ):
        prune(Branching(), torch.randn(1, 3, 8, 8), 0.3)
    with pytest.raises(
        ValueError, match="^nothing to prune in Conv2d|^nothing to prune in Sequential"
    ):
        prune(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 8, 8), 0.3)


@pytest.mark.parametrize(
    "make", [lambda: compress(SmallNet(), PLAN), resnet20], ids=["small", "resnet20"]
)
def test_the_folder_of_a_pruned_network_gives_it_back_exactly(tmp_path, make):
    torch.manual_seed(0)
    network = lively(make())
    size = 16 if hasattr(network, "layer1") else 8
    x = torch.randn(2, 3, size, size)
    small = prune(network, x[:1], 0.4)
    plan = RankPlan(
        {
            n: tuple(m.factors().core.shape[:2])
            for n, m in network.named_modules()
            if type(m).__name__ == "TuckerConv2d"
        }
    )
    plan = plan if size == 16 else PLAN
    save(tmp_path, small, plan, {"name": "resnet20", "arguments": {}, "pruned": True})
    found = load(tmp_path, build_model("resnet20") if size == 16 else SmallNet())
    assert torch.equal(found(x), small(x))
    assert str(found) == str(small)
    save(tmp_path, small, plan, {"name": "resnet20", "arguments": {}})
    with pytest.raises(
        ValueError, match="weights.safetensors: "
    ):  # that it was pruned has to be said
        load(tmp_path, build_model("resnet20") if size == 16 else SmallNet())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"stem.weight": (9, 3, 3, 3)},
            "layer 'stem': expected weight of .8, 3, 3, 3. or, pruned, less; "
            "found .9, 3, 3, 3. .Conv2d.",
        ),
        ({"stem.weight": (8, 3, 1, 1)}, "layer 'stem': "),
        ({"stem.weight": (8, 3)}, "layer 'stem': "),
        ({"stem.weight": (0, 3, 3, 3)}, "layer 'stem': "),
        (
            {"extra.weight": (3,)},
            "layer 'extra': expected weight of .4. or, pruned, less; found .3. .LayerNorm.",
        ),
        ({"grouped.weight": (2, 2, 1, 1)}, "layer 'grouped': "),
    ],
)
def test_sizes_that_no_pruning_makes_are_refused(net, changed, message):
    net.extra, net.grouped = nn.LayerNorm(4), nn.Conv2d(4, 4, 1, groups=2)
    with pytest.raises(ValueError, match=message):
        shrink(net, changed)


def test_a_depthwise_layer_and_a_norm_without_parameters_shrink():
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6, affine=False, eps=0.1)
    )
    shrink(model, {"0.weight": (4, 1, 3, 3), "1.running_mean": (4,), "1.running_var": (4,)})
    assert (
        str(model[0])
        == "Conv2d(4, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=4, bias=False)"
    )
    assert model(torch.randn(2, 4, 8, 8)).shape == (2, 4, 4, 4)
    assert model[1].eps == 0.1


def rounded(network, calibration, x):
    """What the 8-bit network computes, from the numbers that are kept of it."""
    network = copy.deepcopy(network)

    def quantized(value, row, shape):
        scale, zero = (torch.tensor(row[key]).reshape(shape) for key in ("scale", "zero_point"))
        return ((value / scale + zero).clamp(-127, 127).round() - zero) * scale

    for name, row in calibration.items():
        module = network.get_submodule(name)
        shape = (-1, *[1] * (module.weight.dim() - 1))
        module.weight.data = quantized(module.weight.data, row["weight"], shape)
        if "_input_0" in row:
            module.register_forward_pre_hook(
                lambda _, args, row=row["_input_0"]: (quantized(args[0], row, (-1,)),)
            )
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_the_simulated_network_is_the_one_that_its_calibration_describes(
    tucker, images, loaders, quantizer, device
):
    steps = []
    train = partial(finetune, train=loaders[0], recipe=Recipe(1, 0.01), enable_progress_bar=False)
    simulated = quantize(
        tucker, images, quantizer, lambda network: steps.append(1) or train(network)
    )
    with torch.no_grad():
        found = simulated.network(images)
    calibration = simulated.calibration()
    assert sorted(calibration) == sorted(
        n for n, m in tucker.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    bits = {row["weight"]["quant_bits"] for row in calibration.values()}
    assert bits == {1 if quantizer == "bnn" else 8}
    network = simulated.unwrapped()
    torch.testing.assert_close(rounded(network, calibration, images), found, rtol=1e-3, atol=1e-3)
    moved = {
        key
        for key, value in tucker.state_dict().items()
        if not torch.equal(value, network.state_dict()[key])
    }
    assert bool(moved) == bool(steps) == (quantizer != "ptq")
    assert set(network.state_dict()) == set(tucker.state_dict())
    assert not any(m._backward_pre_hooks for m in network.modules())
    error = (found - network(images)).abs().max()
    if quantizer == "bnn":  # which rounds no inputs; the weights are those of the result
        assert error == 0
        assert set(network.stem.core.weight.unique().tolist()) == {-1, 1}
    else:
        assert 0 < error < 0.1 * found.abs().max()


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_a_network_on_a_device_is_quantized_there(tucker, images, loaders, quantizer, device):
    train = partial(finetune, train=loaders[0], recipe=Recipe(1, 0.01), enable_progress_bar=False)
    simulated = quantize(tucker.to(device), images, quantizer, train)
    values = [*simulated.network.parameters(), *simulated.network.buffers()]
    assert all(value.device.type == device.type for value in values)
    with torch.no_grad():
        assert simulated.network(images.to(device)).isfinite().all()
    assert set(simulated.unwrapped().state_dict()) == set(tucker.state_dict())


def test_calibration_takes_the_images_in_parts_and_finds_the_ranges_of_one_pass(
    tucker, monkeypatch
):
    images, sizes = torch.randn(150, 3, 8, 8, generator=torch.Generator().manual_seed(3)), []
    images[149] *= 5  # the largest of all are in the last part
    tucker.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = quantize(tucker, images).calibration()
    assert max(sizes) == 64
    assert sum(sizes) == 150
    monkeypatch.setattr(quantizing, "_BATCH", 150)
    assert found == quantize(tucker, images).calibration()
    first = next(name for name, module in tucker.named_modules() if isinstance(module, nn.Conv2d))
    assert found[first]["_input_0"]["scale"][0] * 127 == pytest.approx(float(images.abs().max()))


@pytest.mark.parametrize("quantizer", ["qat", "lsq", "lsq+"])
def test_training_takes_the_rounding_and_the_ranges_from_its_first_step_on(
    tucker, images, quantizer
):
    """What NNI does after each of the optimizer's steps changes neither."""
    large, seen = torch.cat([images[:64], 100 * images]), []

    def train(network):
        with torch.no_grad():
            seen.append(
                (
                    network(images),
                    {n: p.clone() for n, p in network.state_dict().items() if n.endswith("scale")},
                )
            )
            network(100 * images)

    found = quantize(tucker, large, quantizer, train)
    ((output, scales),) = seen
    assert 0 < (output - tucker(images)).abs().max() < 0.1 * output.abs().max()
    with torch.no_grad():
        assert torch.equal(found.network(images), output)
    assert all(torch.equal(p, found.network.state_dict()[n]) for n, p in scales.items())


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name != "ptq"])
def test_a_wrapped_network_can_be_trained_by_several_processes_after_an_accuracy(
    tucker, images, loaders, quantizer
):
    """DDP writes into the buffers; tensors of inference mode refuse that."""
    found = []

    def train(network):
        accuracy(network, loaders[0])
        found.extend(value.is_inference() for value in (*network.parameters(), *network.buffers()))

    quantize(tucker, images, quantizer, train)
    assert found
    assert not any(found)


def test_a_bad_quantizer_or_nothing_to_quantize_is_said(tucker, images):
    with pytest.raises(ValueError, match="quantizer: expected one of ptq, qat, .* found 'binary'"):
        quantize(tucker, images, "binary")
    with pytest.raises(
        ValueError, match="nothing to quantize in ReLU: no convolution or linear layer"
    ):
        quantize(nn.ReLU(), images)


def test_a_plan_and_sizes_make_the_pruned_structure(net):
    small = prune(lively(compress(net, PLAN)), torch.randn(1, 3, 8, 8), 0.4)
    made = restructure(net, PLAN)
    shrink(made, {key: tuple(value.shape) for key, value in small.state_dict().items()})
    assert str(made) == str(small)
