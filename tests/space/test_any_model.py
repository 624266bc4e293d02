"""A rank space takes any `nn.Module`.

What can't be decomposed is left alone with its reason; the user's instance stays as it was.
"""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from nni_haloc.costs.analytic import activation_table, mac_table, param_table, roofline_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.latency import latency_table, measure_latency
from nni_haloc.plan.compression import compress, restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.search.space import RankSpace
from nni_haloc.space.modules import batches, call, copy_of, replace_modules
from nni_haloc.space.ranks import AllowedRanks, find_layers

RULES = AllowedRanks(kinds=("conv", "pointwise", "linear"))
IMAGES = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def conv():
    return nn.Conv2d(8, 8, 3, padding=1)


def reasons(space):
    return {row.layer: row.reason for row in space.report() if row.reason}


def lowest(space):
    return {layer: list(row)[-1] for layer, row in space.candidates.items()}


def works(space, x, expected):
    """Its networks run, in both modes, and the all-dense one gives what the model gives."""
    for sample in (lowest(space), dict.fromkeys(space.candidates, "dense")):
        network = space.freeze(sample)
        with torch.no_grad():
            out = network.eval()(*x)
        assert network.train()(*x).shape == expected.shape
    torch.testing.assert_close(out, expected)


@pytest.fixture(params=["layer", "encoder"])
def transformer(request):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return (layer if request.param == "layer" else nn.TransformerEncoder(layer, 2)).eval()


def test_a_transformer_is_counted_layer_by_layer(transformer):
    """Its fused operation is one that torch's counter does not know."""
    x = torch.randn(3, 10, 32)
    layers = len(transformer.layers) if isinstance(transformer, nn.TransformerEncoder) else 1
    linear = 10 * (4 * 32 * 32 + 2 * 32 * 64)
    assert count_macs(transformer, x) == layers * (
        linear + 2 * 10 * 10 * 32
    )  # and the two products of attention
    table = mac_table(transformer, x, RULES)
    assert len(table.costs) == 2 * layers
    assert table.original == count_macs(transformer, x)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformers_linear_layers_are_searched_and_its_networks_run_with_the_fused_operation(
    transformer,
):
    x = torch.randn(3, 10, 32)
    with torch.no_grad():
        expected = transformer(x)
    space = RankSpace(transformer, x, allowed=RULES, calibration=torch.randn(16, 10, 32))
    assert {name.split(".")[-1] for name in space.candidates} == {"linear1", "linear2"}
    assert all(
        "not called" in why or "is not decomposed" in why or "itself" in why
        for why in reasons(space).values()
    )
    assert torch.backends.mha.get_fastpath_enabled()
    works(space, (x,), expected)
    plan = RankPlan({layer: space.candidates[layer][name] for layer, name in lowest(space).items()})
    for network in (compress(transformer, plan), restructure(transformer, plan)):
        with torch.no_grad():
            assert network.eval()(x).shape == x.shape


def test_a_padded_batch_goes_through_a_compressed_transformer_encoder():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    example = {
        "src": torch.randn(2, 6, 32),
        "src_key_padding_mask": torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]]),
    }
    space = RankSpace(model, example, allowed=RULES)
    with torch.no_grad():
        assert space.freeze(lowest(space)).eval()(**example).shape == (2, 6, 32)


def test_lazy_layers_are_searched_in_the_copies_and_stay_lazy_in_the_users_model():
    model = nn.Sequential(
        nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(16)
    )
    space = RankSpace(model, IMAGES, allowed=RULES, calibration=torch.randn(8, 8, 6, 6))
    assert set(space.candidates) == {"0", "3"}
    assert isinstance(model[0], nn.LazyConv2d)
    assert all(isinstance(p, nn.UninitializedParameter) for p in (model[0].weight, model[3].weight))
    assert model.training
    with torch.no_grad():
        works(space, (IMAGES,), space.original(IMAGES))
    for table in (mac_table, param_table, activation_table):
        assert table(model, IMAGES, RULES).original > 0
    assert isinstance(model[0], nn.LazyConv2d)
    with pytest.raises(
        ValueError, match="the plan's layer 0: LazyConv2d has no weights yet; run the network once"
    ):
        compress(model, RankPlan({"0": (4, 4)}))


def test_a_lazy_layer_that_is_never_called_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.idle = conv(), nn.LazyConv2d(8, 3)

        def forward(self, x):
            return self.a(x)

    with pytest.raises(
        ValueError,
        match=r"^the example input does not reach 'idle', "
        r"a LazyConv2d without weights yet: take it away$",
    ):
        RankSpace(Idle(), IMAGES)


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_scripted_and_traced_layers_are_left_alone(how):
    inner = nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are to go, in some version of torch
        model = nn.Sequential(
            conv(), torch.jit.script(inner) if how == "scripted" else torch.jit.trace(inner, IMAGES)
        )
        space = RankSpace(model, IMAGES, allowed=RULES)
    assert set(space.candidates) == {"0"}
    assert reasons(space) == dict.fromkeys(("1.0", "1.3"), "in a scripted or traced module")
    assert [row.kind for row in space.report()] == ["conv", "Conv2d", "Linear"]
    assert all(p.is_leaf and p.requires_grad for p in space.freeze(lowest(space)).parameters())
    with torch.no_grad():
        expected = model(IMAGES)
        dict(space.freeze(lowest(space)).named_parameters())["1.0.weight"].zero_()
        assert torch.equal(model(IMAGES), expected)
    works(space, (IMAGES,), expected)


def test_a_model_that_is_a_scripted_layer_is_refused_in_one_line():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Sequential(conv()))
        with pytest.raises(
            ValueError, match=r"^nothing to search in \w+ \(0: in a scripted or traced module\)$"
        ):
            RankSpace(model, IMAGES)


@pytest.mark.parametrize(
    ("layer", "x"), [(conv(), IMAGES), (nn.Linear(32, 32), torch.randn(2, 32))]
)
def test_a_model_that_is_one_layer_is_refused_in_one_line_that_says_what_to_do(layer, x):
    with pytest.raises(
        ValueError,
        match=r"^\w+ is a layer itself, without a name to search it by: "
        r"pass nn.Sequential\(model\)$",
    ):
        RankSpace(layer, x, allowed=RULES)
    assert list(RankSpace(nn.Sequential(layer), x, allowed=RULES).candidates) == ["0"]
    with pytest.raises(ValueError, match="the plan's layer ''"):
        restructure(layer, RankPlan({"": (2,)}))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_of_older_weight_normalisation_are_left_alone():
    model = nn.Sequential(conv(), torch.nn.utils.weight_norm(conv()))
    with torch.no_grad():
        model[1].weight_g.mul_(2)
        expected = model(IMAGES)
    space = RankSpace(model, IMAGES)
    assert list(space.candidates) == ["0"]
    assert reasons(space) == {"1": "has forward hooks"}
    works(space, (IMAGES,), expected)
    network = space.freeze(lowest(space))
    network(IMAGES).sum().backward()  # the copy's weight comes from the copy's parameters
    assert network[1].weight_g.grad.abs().sum() > 0
    assert model[1].weight_g.grad is None
    copy_of(network)


def test_pruned_layers_are_left_alone():
    model = nn.Sequential(conv(), conv())
    torch.nn.utils.prune.random_unstructured(model[1], "weight", 0.5)
    assert reasons(RankSpace(model, IMAGES)) == {"1": "has forward hooks"}


class Remembering(nn.Module):
    """Keeps its last features, which a graph made."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = conv(), conv(), {}

    def forward(self, x):
        self.kept["a"] = [self.a(x)]
        return self.b(self.kept["a"][0])


def test_tensors_of_a_graph_among_the_attributes_are_copied_by_value():
    model = Remembering()
    expected = model(IMAGES).detach()
    kept = model.kept["a"][0]
    works(RankSpace(model, IMAGES), (IMAGES,), expected)
    assert model.kept["a"][0] is kept
    assert torch.equal(copy_of(model).kept["a"][0], kept)


def test_a_model_that_cannot_be_copied_is_refused_in_one_line_that_names_the_attribute():
    model = nn.Sequential(conv(), nn.Sequential(conv()))
    model[1].lock = threading.Lock()
    with pytest.raises(
        ValueError,
        match=r"^Sequential can't be copied: "
        r"the attribute 'lock' of its submodule '1' \(.*\); take",
    ):
        RankSpace(model, IMAGES)


class Two(nn.Module):
    """Takes two inputs and a flag."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(), conv(), nn.Linear(8, 16)

    def forward(self, left, right=None, scale=1.0):
        return self.head((self.a(left) + self.b(right) * scale).mean((2, 3)))


@pytest.mark.parametrize(
    "example",
    [(IMAGES, IMAGES + 1), {"left": IMAGES, "right": IMAGES + 1}, (IMAGES, IMAGES + 1, 1.0)],
    ids=["tuple", "dict", "flag"],
)
def test_a_model_may_take_several_inputs(example):
    torch.manual_seed(0)
    model, tables = Two(), {}
    space = RankSpace(model, example, allowed=RULES, calibration=example)
    assert {row.layer: row.shape for row in space.report()} == {
        "a": (8, 8, 3, 3),
        "b": (8, 8, 3, 3),
        "head": (16, 8),
    }
    assert space.specs["b"].input_shapes == (IMAGES.shape,)
    for make in (mac_table, param_table, activation_table):
        tables[make] = make(model, example, RULES)
    roofline_table(model, example, RULES, flops=1e9, bandwidth=1e9)
    assert tables[mac_table].original == count_macs(model, example) == 2 * 36 * 8 * 8 * 9 + 8 * 16
    plan = RankPlan({layer: space.candidates[layer][name] for layer, name in lowest(space).items()})
    with torch.no_grad():
        expected = call(model, example)
        assert call(restructure(model, plan), example).shape == expected.shape
        by_data, by_weights = (compress(model, plan, inputs) for inputs in (example, None))
        assert (call(by_data, example) - expected).norm() < (
            call(by_weights, example) - expected
        ).norm()
        torch.testing.assert_close(
            call(space.freeze(dict.fromkeys(space.candidates, "dense")), example), expected
        )


@pytest.mark.parametrize(
    "measure",
    [lambda x: latency_table(Two(), x, RULES), lambda x: measure_latency({"two": Two()}, x)],
)
def test_measuring_says_that_it_takes_one_input(measure):
    with pytest.raises(
        ValueError,
        match=r"^the example input: measuring takes networks of one input, "
        r"a tensor \(N, ...\), found a tuple$",
    ):
        measure((IMAGES, IMAGES))


def test_an_example_without_a_tensor_is_refused():
    with pytest.raises(
        ValueError, match="the example input: expected a tensor, a tuple or a dict with tensors"
    ):
        count_macs(nn.Identity(), ("text",))


def test_batches_cut_what_has_a_row_for_each_input():
    parts = list(
        batches(
            {
                "x": torch.arange(5),
                "more": (torch.arange(10).view(5, 2), "text"),
                "table": torch.zeros(3),
            },
            2,
        )
    )
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part["more"][0].shape for part in parts] == [(2, 2), (2, 2), (1, 2)]
    assert all(part["more"][1] == "text" and part["table"].shape == (3,) for part in parts)


class Looking(nn.Module):
    """Looks at its layers' class in several ways."""

    def __init__(self):
        super().__init__()
        self.good, self.also, self.checked, self.typed, self.skipped, self.doubled, self.last = (
            conv() for _ in range(7)
        )
        self.passes = []

    def forward(self, x):
        self.passes.append(1)
        x = self.also(self.good(x))
        if not isinstance(self.checked, nn.Conv2d):
            raise TypeError("a convolution is wanted\nreally")
        x = self.checked(x)
        if type(self.typed) is not nn.Conv2d:
            raise ValueError
        x = self.typed(x)
        if isinstance(self.skipped, nn.Conv2d):
            x = self.skipped(x)
        x = (
            self.doubled(x)
            if isinstance(self.doubled, nn.Conv2d)
            else torch.cat([self.doubled(x)] * 2)
        )
        return self.last(x)


def test_layers_with_which_the_network_fails_are_found_and_left_alone():
    model = Looking()
    with torch.no_grad():
        expected = copy.deepcopy(model)(IMAGES)
    space = RankSpace(model, IMAGES)
    assert list(space.candidates) == ["good", "also", "last"]
    fails = "the network fails with a low-rank layer in its place: "
    assert reasons(space) == {
        "checked": fails + "TypeError: a convolution is wanted",
        "typed": fails + "ValueError: ValueError",
        "skipped": "the network calls other layers with a low-rank layer in its place",
        "doubled": "the network's output has another shape with a low-rank layer in its place",
    }
    assert model.passes == []
    works(space, (IMAGES,), expected)


def test_a_network_that_works_is_run_twice(monkeypatch):
    passes = []

    class Counted(nn.Sequential):
        def forward(self, x):
            passes.append(1)
            return super().forward(x)

    find_layers(Counted(*(conv() for _ in range(5))), IMAGES)
    assert len(passes) == 2


class Unsure(nn.Module):
    """Fails only with both layers in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        assert isinstance(self.a, nn.Conv2d) or isinstance(self.b, nn.Conv2d)
        return self.b(self.a(x))


def test_of_layers_that_fail_together_one_is_searched():
    space = RankSpace(Unsure(), IMAGES)
    assert list(space.candidates) == ["a"]
    assert space.freeze(lowest(space))(IMAGES).shape == IMAGES.shape


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (lambda layer: layer.register_forward_hook(lambda *_: None), "has forward hooks"),
        (lambda layer: layer.register_forward_pre_hook(lambda *_: None), "has forward hooks"),
        (lambda layer: layer.register_full_backward_hook(lambda *_: None), "has backward hooks"),
        (
            lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
            "has backward hooks",
        ),
        (lambda layer: setattr(layer, "forward", layer.forward), "has a forward of its own"),
    ],
)
def test_layers_with_hooks_are_left_alone(hook, reason):
    """Another layer would not have them."""
    model = nn.Sequential(conv(), conv())
    hook(model[1])
    space = RankSpace(model, IMAGES)
    assert list(space.candidates) == ["0"]
    assert reasons(space) == {"1": reason}


def test_a_hook_that_doubles_a_layers_output_still_does():
    model = nn.Sequential(conv(), conv()).eval()
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        expected = model(IMAGES)
    works(RankSpace(model, IMAGES), (IMAGES,), expected)
    assert len(model[1]._forward_hooks) == 1
    assert not model[1]._forward_pre_hooks


def test_replacing_other_layers_leaves_a_transformers_fused_operation_on():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(32, 32))
    replace_modules(model, {"1": nn.Identity()})
    assert layer.activation_relu_or_gelu == 1
