"""The families of timm that the documentation names; slow, and for who has timm installed."""

import os
import random
import re
import warnings

import pytest
import torch
from helpers.site import PAGES

from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.ranks import AllowedRanks, find_layers

SECTION = PAGES["docs/how-to/data-and-networks.md"].partition("### Families of timm")[2]
NAMES = re.findall(r"`(\w+)`", SECTION.partition("<!-- end of timm -->")[0].partition(":\n\n")[2])
ALL = AllowedRanks(kinds=("conv", "pointwise", "linear"))


def test_there_are_as_many_families_as_the_pages_say():
    of_all = re.search(r"each of (\d+) families", SECTION)[1]
    assert len(set(NAMES)) == len(NAMES) == int(of_all)
    convolutional = SECTION.partition("Most layers are linear")[0].partition(":\n\n")[2]
    said = re.search(r"(\d+) convolutional\s+families of timm's", PAGES["README.md"])[1]
    assert len(re.findall(r"`(\w+)`", convolutional)) == int(said)


@pytest.mark.skipif(not os.environ.get("HALOC_SLOW"), reason="slow: HALOC_SLOW=1 runs it")
@pytest.mark.parametrize("name", NAMES)
def test_a_random_plan_runs_without_values(name):
    timm = pytest.importorskip("timm")
    with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, pretrained=False).eval()
        x = torch.empty(2, *model.pretrained_cfg.get("input_size", (3, 224, 224)))
        draw = random.Random(0)
        candidates = find_layers(model, x, ALL).candidates(ALL)
        ranks = {layer: draw.choice(list(row.values())) for layer, row in candidates.items()}
        compressed = restructure(model, RankPlan(ranks)).eval()
        assert any(ranks.values())
        assert compressed(x).shape == model(x).shape
