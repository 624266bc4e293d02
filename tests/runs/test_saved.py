"""From a plan to a network, to a folder and back; what is loaded is never trusted."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.compression import compress, restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.saved import load, save
from nni_haloc.search.space import RankSpace
from nni_haloc.space.layers import LowRankConv2d, TuckerConv2d
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.training.finetuning import recalibrate

PLAN = RankPlan(
    {"block2.conv": (12, 12), "block3.conv": None, "block4.conv": (24, 16)}, {"rule": "test"}
)


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return build_model("digits_cnn").eval()


def test_a_run_round_trips_through_its_folder(digits, tmp_path):
    x, network = torch.randn(3, 1, 8, 8), compress(digits, PLAN).eval()
    save(tmp_path, network, PLAN, {"name": "digits_cnn", "arguments": {}})
    for loaded in (load(tmp_path), load(tmp_path, digits)):
        torch.testing.assert_close(loaded(x), network(x), rtol=0, atol=0)
        assert not loaded.training
    assert RankPlan.load(tmp_path / "ranks.json") == PLAN


def test_loading_imports_neither_nni_nor_lightning(digits, tmp_path):
    save(tmp_path, compress(digits, PLAN), PLAN, {"name": "digits_cnn", "arguments": {}})
    program = (
        "import sys, nni_haloc, torch\n"
        "def there(*names): return [m for m in sys.modules if m.split('.')[0] in names]\n"
        "quick = there('nni', 'pytorch_lightning', 'tensorly', 'scipy', 'sklearn')\n"
        "net = nni_haloc.load(sys.argv[1]); net(torch.randn(1, 1, 8, 8))\n"
        "all_ = 'nni', 'pytorch_lightning', 'torchmetrics', 'torchvision', 'sklearn', 'pydantic'\n"
        "print(quick, there(*all_))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] []"


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, nni_haloc\n"
        "heavy = 'nni', 'torch', 'numpy', 'scipy'\n"
        "print([m for m in sys.modules if m.split('.')[0] in heavy])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_every_public_name_is_there():
    import nni_haloc

    assert all(getattr(nni_haloc, name) is not None for name in nni_haloc.__all__)
    assert callable(nni_haloc.compress)
    assert callable(nni_haloc.finetune)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nni_haloc.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"block9.conv": (2, 2)}, "'block9.conv' is not in DigitsCNN"),
        ({"block2.bn": (2, 2)}, "block2.bn"),
        ({"classifier": (2, 2)}, "'classifier' is of kind 'linear'"),
        ({"block2.conv": (2,)}, "'block2.conv' is of kind 'conv'"),
        ({"block2.conv": (64, 2)}, "'block2.conv': ranks .64, 2. are above its channels .32, 32."),
    ],
)
def test_a_plan_of_another_network_is_refused_by_layer(digits, ranks, message):
    for make in (compress, restructure):
        with pytest.raises(ValueError, match=message):
            make(digits, RankPlan(ranks))


def small(inputs=1, width=16, outputs=10, bias=True):
    """A network whose every size can be another one."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, bias=bias),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, outputs),
    )


OTHER_SIZES = [
    ({"inputs": 3}, r"0\.weight: expected \[16, 3, 3, 3\], .* found \[16, 1, 3, 3\]; give"),
    ({"width": 8}, r"0\.weight: expected \[8, 1, 3, 3\], .* found \[16, 1, 3, 3\]; give"),
    ({"width": 24}, r"0\.weight: expected \[24, 1, 3, 3\], .* found \[16, 1, 3, 3\]; give"),
    ({"outputs": 5}, r"5\.weight: expected \[5, 32\], .* found \[10, 32\]; give"),
    ({"bias": False}, r"[Uu]nexpected key.*0\.bias"),
]


@pytest.mark.parametrize(("sizes", "message"), OTHER_SIZES)
def test_a_network_of_other_sizes_is_told_the_layer_and_both_shapes(tmp_path, sizes, message):
    plan = RankPlan({"2": (8, 6)})
    save(tmp_path, compress(small(), plan), plan)
    with pytest.raises(ValueError, match=rf"weights\.safetensors: .*{message}") as error:
        load(tmp_path, small(**sizes))
    assert "\n" not in str(error.value)


def test_a_folder_that_lacks_something_names_the_file(digits, tmp_path):
    save(tmp_path, compress(digits, PLAN), PLAN)
    with pytest.raises(FileNotFoundError, match=r"model\.json.*load\(folder, model\)"):
        load(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load(tmp_path, digits)
    save(tmp_path, digits, PLAN)  # dense weights beside a plan of ranks
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load(tmp_path, digits)
    (tmp_path / "ranks.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ranks\.json"):
        load(tmp_path, digits)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": s},
    ],
)
def test_weights_load_from_the_usual_files(digits, tmp_path, wrap):
    torch.save(wrap(digits.state_dict()), tmp_path / "weights.pth")
    save_file(digits.state_dict(), tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        fresh = build_model("digits_cnn")
        load_weights(fresh, tmp_path / name)
        assert all(
            torch.equal(a, b)
            for a, b in zip(fresh.state_dict().values(), digits.state_dict().values(), strict=True)
        )


class Trap:
    def __reduce__(self):
        return (print, ("the file ran code",))


def test_a_file_that_would_run_code_is_refused(digits, tmp_path, capsys):
    for write in (
        lambda p: torch.save({"state_dict": Trap()}, p),
        lambda p: p.write_bytes(pickle.dumps(Trap())),
    ):
        write(tmp_path / "weights.pt")
        with pytest.raises(
            ValueError, match=r"weights\.pt: not a file of weights that can be loaded safely"
        ) as error:
            load_weights(digits, tmp_path / "weights.pt")
        assert "\n" not in str(error.value)
        assert "trust" not in str(error.value)  # torch's advice to load it all the same
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "os:system", "arguments": {"command": "echo ran code"}}',
        "[]",
        "{",
        '{"arguments": {}}',
    ],
)
def test_a_folder_does_not_say_what_code_to_call(digits, tmp_path, capfd, content):
    save(tmp_path, compress(digits, PLAN), PLAN)
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.json"):
        load(tmp_path)
    assert "ran code" not in capfd.readouterr().out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(digits, tmp_path, bad):
    state = digits.state_dict()
    name = next(key for key in state if key.endswith("weight"))
    state[name] = state[name].clone()
    state[name].flatten()[3] = bad
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=rf"w\.pt: {name}: expected finite numbers, found NaN or infinity"
    ):
        load_weights(digits, tmp_path / "w.pt")


def test_weights_of_another_network_are_refused(digits, tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: does not fit the model: .*block1") as error:
        load_weights(digits, tmp_path / "w.pt")
    assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_weights(digits, tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_weights(digits, tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet21", {}, "model 'resnet21'"),
        ("torchvision:resnet0", {}, "resnet0"),
        ("nowhere.at_all:net", {}, "nowhere"),
        ("math:sqrt", {"x": 1}, "math:sqrt"),
        ("builtins:dict", {}, "expected an nn.Module.*found dict"),
        ("resnet20", {"classes": 3}, "classes"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, arguments)


@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
)
def test_the_backbone_of_a_torchvision_model_is_not_fetched(name, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        torchvision.models.WeightsEnum,
        "get_state_dict",
        lambda weights, *_, **__: fetched.append(weights) or {},
    )
    with torch.device("meta"):
        model = build_model(f"torchvision:{name}")
    assert not fetched
    assert len(list(model.backbone.parameters())) > 50


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("RuntimeError('no\\nluck')", r"RuntimeError\('no\\nluck'\)"),
        ("KeyError(3)", r"KeyError\(3\)"),
    ],
)
def test_a_factory_that_fails_is_named_in_one_line(error, shown, tmp_path, monkeypatch):
    (tmp_path / "failing_factory.py").write_text(f"def net():\n    raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_factory", raising=False)
    with pytest.raises(
        ValueError, match=f"^model 'failing_factory:net': its factory fails: {shown}$"
    ):
        build_model("failing_factory:net")


def test_models_come_from_torchvision_and_from_any_factory():
    assert (
        json.dumps(
            sum(
                p.numel()
                for p in build_model("torchvision:resnet18", {"num_classes": 7}).parameters()
            )
        )
        == "11180103"
    )
    assert isinstance(
        build_model("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear
    )


@pytest.fixture(scope="module")
def mobile():
    """Return a compressed network, and a batch for it.

    It has inverted residuals, grouped convolutions and factors of both kinds.
    """
    torch.manual_seed(0)
    model = build_model("torchvision:mobilenet_v2", {"num_classes": 10}).eval()
    space = RankSpace(
        model,
        torch.randn(1, 3, 64, 64),
        allowed=AllowedRanks(kinds=("conv", "pointwise", "linear")),
        decomposition="hosvd",
    )
    network = space.freeze(
        {layer: list(row)[len(row) // 2] for layer, row in space.candidates.items()}
    ).eval()
    recalibrate(
        network, [(torch.randn(32, 3, 64, 64), None)]
    )  # else its outputs are below what half precision can hold
    assert any(isinstance(m, LowRankConv2d) for m in network.modules())
    assert any(isinstance(m, TuckerConv2d) for m in network.modules())
    return network, torch.randn(2, 3, 64, 64)


def test_a_compressed_network_is_exported(mobile):
    network, x = mobile
    exported = torch.export.export(network, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), network(x), rtol=0, atol=0)


def test_a_compressed_network_is_compiled(mobile):
    network, x = mobile
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(network, backend="aot_eager", fullgraph=True)(x),
            network(x),
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_compressed_network_is_copied_and_its_state_goes_round(mobile, tmp_path):
    network, x = mobile
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    torch.save(network.state_dict(), tmp_path / "state.pt")
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin(x), network(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_compressed_network_runs_in_other_formats(mobile, dtype):
    """The error is a few times that of rounding alone, no more.

    Rounding alone: in float64, with all weights, and all that modules give on, rounded.
    """
    network, x = mobile
    other = copy.deepcopy(network).to(dtype).to(memory_format=torch.channels_last)
    exact, rounded = copy.deepcopy(network).double(), copy.deepcopy(network).to(dtype).double()
    for module in rounded.modules():
        module.register_forward_hook(lambda module, _, y: y.to(dtype).double())
    with torch.no_grad():
        out = other(x.to(dtype).contiguous(memory_format=torch.channels_last))
        expected = exact(x.double())
        spread = (rounded(x.to(dtype).double()) - expected).norm()
    assert out.dtype == dtype
    off = (out.double() - expected).norm()
    assert off <= 8 * spread + 1e-12 * expected.norm()


def test_a_folder_that_is_not_there_is_told_as_such(tmp_path):
    with pytest.raises(TypeError, match="model: expected the original network, found 'resnet20'"):
        load(tmp_path, "resnet20")
    with pytest.raises(FileNotFoundError, match=r"none: no such folder$"):
        load(tmp_path / "none")
