"""The counts of the paper's tables: numbers that are known, and other counters."""

import json

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from test_cli import haloc
from torch import nn

from nni_haloc.counts import network_counts, space_sizes
from nni_haloc.models import build_model
from nni_haloc.predictors.analytic import count_macs, count_paper_macs, count_params
from nni_haloc.ranks import RankRules, find_layers

IMAGE = torch.zeros(1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "size", "macs", "paper", "parameters"),
    [
        ("resnet20", 32, 9 * (3 * 16 + 6 * 16**2 + (16 * 32 + 5 * 32**2) // 4 + (32 * 64 + 5 * 64**2) // 16) * 1024 + 640, None, 269_722),
        ("vgg16", 32, 313_201_664, None, 14_728_266),
        ("torchvision:resnet18", 224, 1_814_073_344, 1_819_066_368, 11_689_512),  # the paper's Table 3: 1819.07 M
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


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "googlenet"])
@pytest.mark.filterwarnings("ignore")
def test_fvcore_counts_the_same(name):
    model = build_model(f"torchvision:{name}", {"init_weights": False} if name == "googlenet" else {}).eval()
    found = FlopCountAnalysis(model, IMAGE).unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert count_macs(model, IMAGE) == found["conv"] + found["linear"]


def test_the_rank_space_has_the_papers_size_before_the_design_principles():
    """Its sixteen 3x3 convolutions: 2.2e71 in the paper."""
    rules = RankRules(kinds=("conv",), exclude=("conv1",))
    layers = find_layers(build_model("torchvision:resnet18"), IMAGE, rules)
    sizes = space_sizes(layers, rules)
    assert f"{sizes['all ranks']:.1e}" == "2.2e+71"
    assert sizes["multiples of the step"] == (8 * 8) ** 4 * (16 * 8) * (4 * 4) ** 3 * (8 * 4) * (8 * 8) ** 3 * (16 * 8) * (16 * 16) ** 3
    assert sizes["r1 = r2, too"] == 8**4 * 8 * 4**3 * 4 * 8**3 * 8 * 16**3
    assert len(layers.specs) == 16


def test_table_counts_before_and_after_a_plan(tmp_path):
    plan = {"version": 1, "ranks": {"block2.conv": [8, 8]}, "chosen_by": {}}
    (tmp_path / "ranks.json").write_text(json.dumps(plan))
    done = haloc("table", "--model", "digits_cnn", "--input", "1x8x8", "--plan", str(tmp_path / "ranks.json"))
    assert done.returncode == 0, done.stderr
    for name, count in network_counts(build_model("digits_cnn"), torch.zeros(1, 1, 8, 8)).items():
        assert any(line.startswith(name) and f"{count:,}" in line for line in done.stdout.splitlines())
    assert "block2.conv" in done.stdout
