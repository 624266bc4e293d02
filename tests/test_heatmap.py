"""The heat map of one layer: every pair of ranks, in a picture and in numbers."""

import json

import matplotlib.image
import pytest

from nni_haloc.heatmap import heatmap_main

DIGITS = ("--model", "digits_cnn", "--input", "1x8x8", "--step", "16", "--rounds", "1", "--threads", "1")


@pytest.mark.parametrize("metric", ["latency_ms", "cycles"])
def test_every_pair_of_ranks_is_drawn_and_kept(tmp_path, monkeypatch, metric):
    monkeypatch.setattr("nni_haloc.heatmap.CACHE", tmp_path / "cache.json")
    heatmap_main([*DIGITS, "--layer", "block2.conv", "--metric", metric, "--out", str(tmp_path / "map.png")])
    content = json.loads((tmp_path / "map.json").read_text())
    assert set(content["costs"]) == {f"r{r1}x{r2}" for r1 in (16, 32) for r2 in (16, 32)}
    assert content["metric"] == metric
    assert min(content["dense"], *content["costs"].values()) > 0
    assert matplotlib.image.imread(tmp_path / "map.png").std() > 0
    if metric == "cycles":
        assert content["costs"]["r16x16"] < content["costs"]["r32x32"]


@pytest.mark.parametrize(
    ("option", "value"), [("--layer", "block9.conv"), ("--layer", "classifier"), ("--step", "0"), ("--metric", "macs")]
)
def test_bad_options_are_one_line(tmp_path, option, value):
    arguments = {"--layer": "block2.conv", option: value}
    with pytest.raises(ValueError, match=option) as error:
        heatmap_main([*DIGITS, *(word for pair in arguments.items() for word in pair)])
    assert "\n" not in str(error.value)
