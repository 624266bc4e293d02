"""Rank candidates, what is left alone and why, and the plan's file."""

import copy
import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.search.space import RankSpace
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import parse_rank, rank_name
from nni_haloc.space.ranks import AllowedRanks, UnfitPattern, check_names, find_layers, macs
from nni_haloc.space.summary import LayerReport

RANK = st.one_of(st.none(), st.tuples(st.integers(1, 4096), st.integers(1, 4096)))


def spec(c, f, kind="conv", k=3):
    shape = (1, c) if kind == "linear" else (1, c, 8, 8)
    kernel = (k, k) if kind == "conv" else (1, 1)
    return LayerSpec(
        "layer",
        kind,
        c,
        f,
        (shape,),
        False,
        kernel,
        padding=(k // 2, k // 2) if kind == "conv" else (0, 0),
    )


@pytest.mark.parametrize(
    ("channels", "step"),
    [(4096, 256), (1024, 64), (512, 32), (128, 32), (96, 32), (64, 8), (40, 8), (32, 4), (24, 4)]
    + [(16, 2), (8, 2)],
)
def test_the_papers_step_is_coarser(channels, step):
    ranks = AllowedRanks(step="paper").candidates(spec(channels, channels))
    assert ranks[-1] == (step, step)
    assert all(r1 == r2 and r1 % step == 0 for r1, r2 in ranks[1:])


@pytest.mark.parametrize(
    ("channels", "step"),
    [(4096, 256), (1024, 64), (768, 32), (512, 32), (256, 32), (192, 16), (128, 16)]
    + [(112, 8), (64, 8), (40, 4), (32, 4), (24, 2), (16, 2), (8, 2)],
)
def test_candidates_are_multiples_of_the_step_and_cheaper_than_dense(channels, step):
    ranks = AllowedRanks().candidates(spec(channels, channels))
    assert ranks[0] is None
    assert all(r1 == r2 and r1 % step == 0 for r1, r2 in ranks[1:])
    assert ranks[-1] == (step, step)
    costs = [macs(spec(channels, channels), r) for r in ranks]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    assert (step, step) in ranks


def test_unequal_ranks_and_no_dense_are_options():
    ranks = AllowedRanks(step=8, equal=False, dense=False).candidates(spec(16, 32))
    assert set(ranks) == {
        (r1, r2)
        for r1 in (8, 16, 24, 32)
        for r2 in (8, 16)
        if macs(spec(16, 32), (r1, r2)) < macs(spec(16, 32), None)
    }


def test_matrices_have_one_rank():
    assert AllowedRanks().candidates(spec(64, 64, "pointwise")) == [None, (24,), (16,), (8,)]
    assert AllowedRanks(step=5).candidates(spec(16, 12, "linear")) == [None, (5,)]


@given(RANK)
def test_candidate_names_round_trip(rank):
    assert parse_rank(rank_name(rank), "conv") == rank


@pytest.mark.parametrize("name", ["r0", "16", "r16x", "r-2", "Dense", "r4x4x4"])
def test_other_names_are_not_ranks(name):
    with pytest.raises(ValueError, match="expected 'dense'"):
        parse_rank(name, "conv")
    with pytest.raises(ValueError, match="expected 'dense'"):
        parse_rank("r4x2", "linear")


@given(st.dictionaries(st.text(min_size=1), st.one_of(RANK, st.tuples(st.integers(1, 99)))))
def test_a_plan_round_trips_through_ranks_json(tmp_path_factory, ranks):
    path = tmp_path_factory.mktemp("plan") / "ranks.json"
    RankPlan(ranks, {"rule": "test", "budget": 0.5}).save(path)
    assert RankPlan.load(path) == RankPlan(ranks, {"rule": "test", "budget": 0.5})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "version None"),
        ('{"version": 99, "ranks": {}}', "version 99"),
        (
            '{"version": 1, "ranks": {"conv": [0, 4]}}',
            "layer 'conv': expected 'dense', .* found .0, 4.",
        ),
        ('{"version": 1, "ranks": {"conv": [true]}}', "layer 'conv'"),
        ('{"version": 1, "ranks": {"conv": "thin"}}', "found 'thin'"),
        ('{"version": 1, "ranks": {"conv": [1, 2, 3]}}', "layer 'conv'"),
    ],
)
def test_a_bad_plan_is_one_line_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "ranks.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        RankPlan.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Odd(nn.Module):
    """What a rank space has to leave alone, or to see twice."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.twice
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.tied_a, self.tied_b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied_b.weight = self.tied_a.weight
        self.idle = nn.Conv2d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.thin = nn.Conv2d(8, 1, 3, padding=1)
        self.skipped = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.alias(self.twice(x)[:, :, ::2])
        return self.thin(self.skipped(self.up(self.tied_b(self.tied_a(self.grouped(x))))))


def test_layers_are_found_with_all_their_calls_and_the_rest_has_a_reason():
    model = Odd().train()
    state = copy.deepcopy(model.state_dict())
    layers = find_layers(model, torch.randn(2, 8, 8, 8), AllowedRanks(exclude=("skip*",)))
    assert list(layers.specs) == ["twice"]
    assert layers.specs["twice"].input_shapes == ((2, 8, 8, 8), (2, 8, 4, 8))
    assert macs(layers.specs["twice"], None) == (8 * 8 + 4 * 8) * 8 * 8 * 9
    assert set(layers.left_alone) == {
        "grouped",
        "tied_a",
        "tied_b",
        "idle",
        "up",
        "thin",
        "skipped",
    }
    for name, word in (
        ("grouped", "grouped"),
        ("tied_a", "shared"),
        ("idle", "not called"),
        ("up", "ConvTranspose2d"),
        ("skipped", "excluded"),
    ):
        assert word in layers.left_alone[name]
    assert model.training
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("rank", "expected"), [(5, (5, 5)), ((6, 3), (6, 3)), ("dense", None)])
def test_a_pinned_layer_has_one_candidate_whatever_it_costs(rank, expected):
    allowed = AllowedRanks(pin={"lay*": rank, "layer": 2})  # the first pattern counts
    assert allowed.candidates(spec(8, 8)) == [expected]
    assert allowed.candidates(replace(spec(8, 8), name="other")) == AllowedRanks().candidates(
        spec(8, 8)
    )
    assert AllowedRanks(pin={"layer": 8}).candidates(spec(8, 8, k=1)) == [
        (8, 8)
    ]  # dearer than dense
    assert AllowedRanks(pin={"layer": 3}).candidates(spec(8, 8, "linear")) == [(3,)]


@pytest.mark.parametrize(
    "rank", [0, -1, True, 2.5, "r4", "thick", (1, 2, 3), (), (4, 0), None, [2.0, 1]]
)
def test_what_is_not_a_rank_cannot_be_pinned(rank):
    with pytest.raises(ValueError, match=r"pin 'a': expected a rank, \(r1, r2\) or 'dense', found"):
        AllowedRanks(pin={"a": rank})


class Pinnable(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(8, 12, 3, padding=1),
            nn.Conv2d(12, 8, 1),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.Conv2d(8, 1, 3),
        )


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (
            {"pin": {"7": 4}},
            "pin: no layer of Pinnable that can be searched matches '7'; expected one of 0, 1$",
        ),
        ({"pin": {"2": 4}}, "pin: no layer .* matches '2'; 2: grouped convolution"),
        ({"pin": {"0": 4}, "exclude": ("0",)}, "pin: no layer .* matches '0'; 0: excluded by name"),
        (
            {"pin": {"1": 4}, "kinds": ("conv",)},
            "pin: no layer .* matches '1'; 1: kind 'pointwise'",
        ),
        ({"pin": {"0": 9}}, r"pin: layer '0': ranks \[9, 9\] are above its channels \[12, 8\]"),
        (
            {"pin": {"0": (8, 12)}},
            r"pin: layer '0': ranks \[8, 12\] are above its channels \[12, 8\]",
        ),
        (
            {"pin": {"1": (4, 4)}},
            r"pin: layer '1' is of kind 'pointwise', which does not take the ranks \[4, 4\]",
        ),
        (
            {"exclude": ("0", "conv*")},
            r"exclude: no layer of Pinnable matches 'conv\*'",
        ),
    ],
)
def test_patterns_that_fit_nothing_are_refused(allowed, message):
    with pytest.raises(ValueError, match=message):
        find_layers(Pinnable(), torch.randn(1, 8, 8, 8), AllowedRanks(**allowed))


def test_a_layer_without_a_rank_to_search_may_be_pinned():
    layers = find_layers(
        Pinnable(), torch.randn(1, 8, 8, 8), AllowedRanks(pin={"0": "dense", "3": 1})
    )
    assert layers.candidates(AllowedRanks(pin={"0": "dense", "3": 1})) == {
        "0": {"dense": None},
        "1": {"dense": None, "r4": (4,), "r2": (2,)},
        "3": {"r1": (1, 1)},
    }


def test_ranks_json_is_readable(tmp_path):
    RankPlan({"a": (16, 8), "b": None}).save(tmp_path / "ranks.json")
    assert json.loads((tmp_path / "ranks.json").read_text())["ranks"] == {
        "a": [16, 8],
        "b": "dense",
    }


def test_the_report_has_every_layer_with_its_candidates_or_a_reason():
    """Attention's and functional calls' own parameters among them."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.norm, self.own = (
                Odd(),
                nn.BatchNorm2d(1),
                nn.Parameter(torch.randn(1, 1, 3, 3)),
            )

        def forward(self, x):
            return nn.functional.conv2d(self.norm(self.odd(x)), self.own)

    space = RankSpace(Mixed(), torch.randn(2, 8, 8, 8))
    rows = {row.layer: row for row in space.report()}
    layers = [
        name for name, m in space.original.named_modules() if isinstance(m, nn.modules.conv._ConvNd)
    ]
    assert list(rows) == ["own", *layers]
    assert rows["odd.twice"] == LayerReport(
        "odd.twice", "conv", (8, 8, 3, 3), ("dense", "r6", "r4", "r2"), ""
    )
    assert (rows["odd.up"].kind, rows["odd.up"].reason) == (
        "ConvTranspose2d",
        "ConvTranspose2d is not decomposed",
    )
    assert rows["own"].reason == "used by Mixed itself, not by a layer"
    assert all(bool(row.reason) != bool(row.candidates) for row in space.report())
    lines = str(space.report()).splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].split() == ["layer", "kind", "shape", "candidates", "reason"]


class Counting(nn.Module):
    """Its state changes whenever it is called."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(8, 8, 3, padding=1), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return self.conv(x)


def test_a_model_is_never_called_itself():
    model = Counting()
    RankSpace(model, torch.randn(2, 8, 8, 8), calibration=torch.randn(16, 8, 8, 8))
    assert (model.calls, float(model.seen)) == (0, 0)


class Reading(nn.Module):
    """Layers of which the network wants more than to call them."""

    def __init__(self):
        super().__init__()
        self.plain, self.functional, self.both, self.asked, self.keyword = (
            nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)
        )
        self.listed = [nn.Conv2d(8, 8, 3, padding=1)]  # no part of the network for torch
        self.deep = False

    def forward(self, x):
        x = self.plain(x).to(next(self.parameters()).dtype)
        x = nn.functional.conv2d(x, self.functional.weight, padding=1)
        x = self.both(x) + nn.functional.conv2d(x, self.both.weight, padding=1)
        x = self.asked(x)[:, : self.asked.out_channels]
        x = self.keyword(input=x)
        return self.listed[0](x) if x.sum() > 0 else x


def test_layers_that_are_more_than_called_are_left_alone():
    """A layer of another kind in their place would have the network fail when it is called."""
    model, x = Reading(), torch.randn(2, 8, 8, 8)
    layers = find_layers(model, x)
    assert list(layers.specs) == ["plain"]
    assert layers.left_alone == {
        "functional": "not called as a module",
        "both": "the network reads its 'weight'",
        "asked": "the network reads its 'out_channels'",
        "keyword": "called with more than its input, or by its name",
    }
    space = RankSpace(model, x)
    for candidate in space.candidates["plain"]:
        frozen = space.freeze({"plain": candidate})
        assert frozen(x).shape == x.shape
        assert candidate != "dense" or torch.equal(frozen(x), model(x))


def test_a_model_may_be_one_layer():
    layers = find_layers(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 8, 8))
    assert list(layers.specs) == [""]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(x + self.words.weight.mean())


class Unbatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.conv(x[0]).mean((1, 2)))


@pytest.mark.parametrize(
    ("model", "x", "reasons"),
    [
        (Tied(), torch.randn(2, 32), {"out": "its weight is shared with another layer"}),
        (
            Unbatched(),
            torch.randn(1, 8, 6, 6),
            {"conv": "called without a batch, on 8x6x6", "fc": "called without a batch, on 8"},
        ),
    ],
)
def test_what_cannot_be_another_layer_has_its_reason(model, x, reasons):
    layers = find_layers(model, x, AllowedRanks(kinds=("conv", "linear")))
    assert (layers.specs, layers.left_alone) == ({}, reasons)


@pytest.mark.parametrize("step", ["papper", 0, -2, 2.5])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(
        ValueError, match="^step: expected a number, 'paper', 'every' or None, found"
    ):
        AllowedRanks(step=step).candidates(spec(64, 64))


def test_every_rank_has_pairs_at_the_default_steps_alone():
    every = set(AllowedRanks(step="every", equal=False).candidates(spec(64, 64)))
    pairs, equal = (
        set(AllowedRanks(equal=False).candidates(spec(64, 64))),
        set(AllowedRanks(step=1).candidates(spec(64, 64))),
    )
    assert every == pairs | equal
    for kind in ("pointwise", "linear"):
        ranks = AllowedRanks(step="every", equal=False).candidates(spec(64, 64, kind))
        assert [r for (r,) in ranks[1:]] == list(range(31, 0, -1))
    assert AllowedRanks(step="every").candidates(spec(16, 16)) == AllowedRanks(step=1).candidates(
        spec(16, 16)
    )


@pytest.mark.parametrize(("channels", "some"), [(8, True), (1, False)])
def test_a_layer_without_ranks_says_whether_a_smaller_step_has_some(channels, some):
    """Of 8 channels and a 3x3 kernel, rank 1 has 8 + 9 + 8 weights in the place of 576."""
    network = nn.Conv2d(channels, channels, 3)
    layers = find_layers(nn.Sequential(network), torch.zeros(1, channels, 5, 5), AllowedRanks(16))
    reason = "no rank on the step grid is cheaper than the dense layer"
    finer = " (of a smaller rank_space.step some are)" * some
    assert layers.left_alone == {"0": reason + finer}


@pytest.mark.parametrize("option", ["exclude", "pin"])
def test_a_pattern_that_matches_nothing_is_told_the_layers_and_the_likely_one(option):
    network = nn.Sequential(OrderedDict((f"conv{i}", nn.Conv2d(4, 4, 3)) for i in range(10)))
    patterns = ("cnv4",) if option == "exclude" else {"cnv4": 2}
    with pytest.raises(UnfitPattern) as error:
        check_names(network, AllowedRanks(**{option: patterns}))
    assert str(error.value) == (
        f"{option}: no layer of Sequential matches 'cnv4'; expected one of "
        "conv0, conv1, conv2, conv3, conv4, conv5, conv6, conv7 and 2 more; "
        "did you mean 'conv4'?"
    )
