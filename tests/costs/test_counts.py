"""The counts of the paper's tables: numbers that are known, and other counters."""

import json
import re
import sys
from math import prod

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from nni_haloc.cli.main import app
from nni_haloc.costs.counts import count_macs, count_paper_macs, count_params
from nni_haloc.inputs.models import build_model
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.summary import space_sizes

IMAGE = torch.zeros(1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "size", "macs", "paper", "parameters"),
    [
        (
            "resnet20",
            32,
            9
            * (3 * 16 + 6 * 16**2 + (16 * 32 + 5 * 32**2) // 4 + (32 * 64 + 5 * 64**2) // 16)
            * 1024
            + 640,
            None,
            269_722,
        ),
        ("vgg16", 32, 313_201_664, None, 14_728_266),
        (
            "torchvision:resnet18",
            224,
            1_814_073_344,
            1_819_066_368,
            11_689_512,
        ),  # the paper's Table 3: 1819.07 M
        ("torchvision:mobilenet_v2", 224, 300_774_272, 314_194_496, 3_504_872),  # 314.19 M
    ],
)
def test_known_networks(name, size, macs, paper, parameters):
    model, x = build_model(name), torch.zeros(2, 3, size, size)
    assert (count_macs(model, x), count_params(model)) == (macs, parameters)
    assert paper is None or count_paper_macs(model, x) == paper


def by_hooks(model, x):
    """The paper's count as the modules tell it, without looking at operators."""
    found = []

    def count(module, args, out):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append(out.numel() * module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm2d):
            found.append(2 * out.numel())
        elif isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d)):
            found.append(args[0].numel() + out.numel())

    for module in model.eval().modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    return sum(found)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "squeezenet1_1"])
def test_the_papers_count_is_what_the_modules_tell(name):
    model = build_model(f"torchvision:{name}")
    assert count_paper_macs(model, IMAGE) == by_hooks(model, IMAGE)


def by_fvcore(model, x):
    """Multiply-accumulates of convolutions and linear layers, by operator."""
    found = (
        FlopCountAnalysis(model.eval(), x)
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
        .by_operator()
    )
    return found["conv"] + found["linear"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "googlenet"])
@pytest.mark.filterwarnings("ignore")
def test_fvcore_counts_the_same(name):
    model = build_model(
        f"torchvision:{name}", {"init_weights": False} if name == "googlenet" else {}
    ).eval()
    assert count_macs(model, IMAGE) == by_fvcore(model, IMAGE)


def test_the_rank_space_has_the_papers_size_before_the_design_principles():
    """Its sixteen 3x3 convolutions: 2.2e71 in the paper."""
    allowed = AllowedRanks("paper", kinds=("conv",), exclude=("conv1",))
    layers = find_layers(build_model("torchvision:resnet18"), IMAGE, allowed)
    sizes = space_sizes(layers, allowed)
    assert f"{sizes['all ranks']:.1e}" == "2.2e+71"
    assert (
        sizes["multiples of the step"]
        == (8 * 8) ** 4
        * (16 * 8)
        * (4 * 4) ** 3
        * (8 * 4)
        * (8 * 8) ** 3
        * (16 * 8)
        * (16 * 16) ** 3
    )
    assert sizes["r1 = r2, too"] == 8**4 * 8 * 4**3 * 4 * 8**3 * 8 * 16**3
    assert len(layers.specs) == 16


@pytest.fixture
def table(capsys, monkeypatch):
    """What `haloc table` prints, as lines."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        app(["table", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out.splitlines()

    return run


def test_table_prints_the_papers_size_by_the_readmes_command(table):
    lines = table("--model", "torchvision:resnet18", "--input", "3x224x224")
    (row,) = (line for line in lines if line.startswith("all ranks"))
    alone = prod([64**8, 128 * 64, 128**6, 256 * 128, 256**6, 512 * 256, 512**6])
    downsampling = prod([64, 128, 256])  # of a 1x1 kernel: a single rank
    every = alone * 64 * 3 * downsampling
    assert row.split()[-2:] == [f"{every:.1e}", f"{alone:.1e}"]
    assert f"{alone:.1e}" == "2.2e+71"


def numbers(lines, name):
    """The numbers in the row of a count."""
    (line,) = (line for line in lines if line.startswith(name))
    return line.removeprefix(name).replace(",", "").split()


def test_table_counts_before_and_after_a_plan(tmp_path, table):
    """Compare with fvcore's count of the network that has the plan's convolutions written out."""
    plan = {"version": 1, "ranks": {"block2.conv": [8, 4], "block3.conv": "dense"}, "chosen_by": {}}
    (tmp_path / "ranks.json").write_text(json.dumps(plan))
    lines = table(
        "--model", "digits_cnn", "--input", "1x8x8", "--batch", 2, "--plan", tmp_path / "ranks.json"
    )
    before, after, image = (
        build_model("digits_cnn").eval(),
        build_model("digits_cnn").eval(),
        torch.zeros(1, 1, 8, 8),
    )
    old = before.block2.conv
    after.block2.conv = nn.Sequential(
        nn.Conv2d(old.in_channels, 4, 1, bias=False),
        nn.Conv2d(4, 8, old.kernel_size, old.stride, old.padding, bias=False),
        nn.Conv2d(8, old.out_channels, 1, bias=old.bias is not None),
    )
    rows = {
        "MACs (convolutions and matrix products)": [
            by_fvcore(model, image) for model in (before, after)
        ],
        "MACs (the paper's count: normalisation and pooling, too)": [
            by_hooks(model, image) + 64 * (4 * 4 + 1) for model in (before, after)
        ],  # and the mean
        "parameters": [sum(p.numel() for p in model.parameters()) for model in (before, after)],
    }
    for name, (was, left) in rows.items():
        assert left < was
        assert numbers(lines, name) == [str(was), str(left), f"{100 * (was - left) / was:.2f}"]
    assert any(line.startswith("block3.conv") for line in lines)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)), "128"),
        (nn.Linear(32, 16), "5x32"),
    ],
)
def test_table_takes_a_shape_of_any_number_of_dimensions(model, shape, table, monkeypatch):
    monkeypatch.setattr("nni_haloc.inputs.models.build_model", lambda name: model)
    lines = table("--model", "mine", "--input", shape, "--batch", 3)
    example = torch.zeros(1, *map(int, shape.split("x")))
    assert numbers(lines, "MACs (convolutions and matrix products)") == [
        str(by_fvcore(model, example))
    ]


@pytest.mark.parametrize("shape", ["", "x", "128x", "3x0x8", "-3", "3,8,8"])
def test_a_shape_that_is_none_is_refused(shape, table):
    with pytest.raises(
        ValueError, match=f"^--input: expected a shape such as 3x224x224, found '{shape}'"
    ):
        table("--model", "digits_cnn", "--input", shape)


def test_table_of_a_model_without_parameters(tmp_path, table):
    (tmp_path / "ranks.json").write_text('{"version": 1, "ranks": {}}')
    lines = table("--model", "torch.nn:Identity", "--input", "4", "--plan", tmp_path / "ranks.json")
    assert numbers(lines, "parameters") == ["0", "0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^{file}: no such file$"),
        ("{", r"^{file}: not a JSON file"),
        (
            '{"version": 1, "ranks": {"nowhere": [4]}}',
            r"^{file}: the plan's layer 'nowhere' is not in DigitsCNN$",
        ),
    ],
)
def test_a_plan_that_cannot_be_read_is_named_before_anything_is_printed(
    content, message, tmp_path, table, capsys
):
    file = tmp_path / "ranks.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises((ValueError, OSError), match=message.format(file=re.escape(str(file)))):
        table("--model", "digits_cnn", "--input", "1x8x8", "--plan", file)
    assert capsys.readouterr().out == ""


def test_a_plan_that_the_model_does_not_run_with_is_named(tmp_path, table, monkeypatch):
    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.fc.weight

    monkeypatch.setattr("nni_haloc.inputs.models.build_model", lambda name: Nosy())
    (tmp_path / "ranks.json").write_text('{"version": 1, "ranks": {"fc": [2]}}')
    with pytest.raises(
        ValueError, match=r"ranks.json: Nosy does not run with the plan's layers \(AttributeError"
    ):
        table("--model", "mine", "--input", "8", "--plan", tmp_path / "ranks.json")
