"""Wrapped networks are taken for what is in the wrapper, with its own layer names."""

import copy

import pytest
import torch
from helpers.networks import SmallNet
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from nni_haloc.chain.exporting import export_program
from nni_haloc.chain.pruning import prune
from nni_haloc.chain.quantizing import quantize
from nni_haloc.costs.analytic import activation_table, mac_table, param_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.latency import latency_table, measure_latency
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.sensitivity import sensitivities
from nni_haloc.runs.compress_model import compress_model
from nni_haloc.runs.saved import load, save
from nni_haloc.search.space import RankSpace
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.training.finetuning import accuracy, finetune, recalibrate
from nni_haloc.training.recipe import Recipe
from nni_haloc.training.reconstruction import reconstruct_blocks
from nni_haloc.utils.wrapped import unwrapped

PLAN = RankPlan({"stem": (2, 2), "point": (4,)})
QUIET = {"enable_progress_bar": False}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    place = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{place}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_inside(*names, in_place=False):
    """A wrapper that compiles parts of a network."""

    def wrap(net):
        for name in names:
            module = net.get_submodule(name)
            if in_place:
                module.compile()
            else:
                net.set_submodule(name, torch.compile(module))
        return net

    return wrap


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "torch.compile": torch.compile,
    "AveragedModel": AveragedModel,
    "Fabric": lambda net: Fabric(accelerator="cpu").setup(net),
    "one in another": lambda net: nn.DataParallel(torch.compile(net)),
    "a compiled part": compiled_inside("body"),
    "compiled layers": compiled_inside("body.0", "point", "head"),
    "compiled in place": compiled_inside("", "body", "point", in_place=True),
    "all of it, in and around": lambda net: torch.compile(compiled_inside("body.0", "body")(net)),
    "none": lambda net: net,
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@wrappers
def test_every_entrance_takes_a_wrapped_network(
    net, images, labels, loaders, tmp_path, wrap, one_process, monkeypatch
):
    monkeypatch.setattr(  # a compiled network must not be run as one
        "torch._dynamo.eval_frame.OptimizedModule.__call__",
        lambda *_: pytest.fail("the compiled network was run"),
    )
    wrapped = wrap(net)
    inner, x = unwrapped(wrapped), images[:1]
    assert type(inner) is SmallNet
    space = RankSpace(wrapped, x, calibration=images)
    assert space.candidates == RankSpace(inner, x).candidates
    assert type(space.freeze(dict.fromkeys(space.candidates, "dense"))) is SmallNet
    for table in (mac_table, param_table, activation_table):
        assert table(wrapped, x) == table(inner, x)
    assert count_macs(wrapped, x) == count_macs(inner, x)
    assert find_layers(wrapped, x) == find_layers(inner, x)
    found, expected = (
        sensitivities(model, space.modules_by_layer, images[:8], labels[:8])
        for model in (wrapped, inner)
    )
    assert found == expected
    network = compress(wrapped, PLAN, images)
    assert set(network.state_dict()) == set(compress(inner, PLAN).state_dict())
    save(tmp_path, wrap(network), PLAN)
    assert type(load(tmp_path, wrapped)) is SmallNet
    small = compress(inner, PLAN)
    assert reconstruct_blocks(wrap(small), wrapped, images, ["stem"], epochs=1)


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")
def test_entrances_that_take_their_time_take_one_too(net, images, loaders, tmp_path, one_process):
    wrapped = WRAPPERS["one in another"](net)
    timing = Timing(rounds=1, min_run_time=0.0001)
    table = latency_table(wrapped, images[:1], AllowedRanks(step=4), timing=timing)
    assert set(table.costs) == {"body.0", "point"}
    measure_latency({"net": wrapped}, images[:1], rounds=1, min_run_time=0.001)
    export_program(wrapped, images[:2], tmp_path / "net.pt2")
    assert type(quantize(wrapped, images).unwrapped()) is SmallNet
    assert prune(wrapped, images[:2], 0.5).stem.out_channels == 4
    data = DataLoader(loaders[0].dataset, 16)
    result = compress_model(wrapped, data, data, metric="macs", budget=0.7, epochs=1)
    assert type(result.model) is SmallNet


@wrappers
@pytest.mark.filterwarnings("ignore:.*has shuffling enabled.*", "ignore:.*sync_dist=True.*")
def test_trainings_take_a_wrapped_network(net, loaders, wrap, one_process):
    wrapped = wrap(net)
    inner = unwrapped(wrapped)
    assert accuracy(wrapped, loaders[0]) == accuracy(inner, loaders[0])
    before = inner.head.weight.clone()
    recalibrate(wrapped, loaders[0], 2)
    data = DataLoader(loaders[0].dataset, 16)
    assert finetune(wrapped, data, Recipe(1, 0.1), data, teacher=wrapped, **QUIET) is wrapped
    assert not torch.equal(unwrapped(wrapped).head.weight, before)


def result_of(net, data):
    result = compress_model(net, data, data, metric="macs", budget=0.7, epochs=1, verbose=False)
    return result.plan, result.model.state_dict()


@pytest.mark.filterwarnings("ignore:.*has shuffling enabled.*", "ignore:.*sync_dist=True.*")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("names", [("body",), ("body.0", "point"), ("stem", "body.0", "body")])
def test_a_network_that_is_compiled_in_part_gives_the_same_plan_and_weights(
    net, loaders, tmp_path, names, in_place
):
    """Hooks on layers of a compiled part, by which they are seen, would be passed over."""
    data = DataLoader(loaders[0].dataset, 16)
    plan, weights = result_of(copy.deepcopy(net), data)
    compiled = compiled_inside(*names, in_place=in_place)(net)
    before = {name: id(module) for name, module in compiled.named_modules()}
    found, values = result_of(compiled, data)
    assert found.ranks == plan.ranks
    assert list(values) == list(weights)
    assert all(torch.equal(values[name], weights[name]) for name in weights)
    assert {name: id(module) for name, module in compiled.named_modules()} == before
    save(tmp_path, compiled, RankPlan({}))
    assert set(load_file(tmp_path / "weights.safetensors")) == set(SmallNet().state_dict())


def test_what_is_not_compiled_is_itself():
    net = SmallNet()
    assert unwrapped(net) is net
    net.body.compile()
    assert unwrapped(net).stem is net.stem
    assert unwrapped(net).body is not net.body
    assert unwrapped(net).body[0].weight is net.body[0].weight
