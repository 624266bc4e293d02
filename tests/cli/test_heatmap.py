"""The heat map of one layer: every pair of ranks, in a picture and in numbers."""

import json
import sys

import matplotlib.image
import pytest

from nni_haloc.cli.main import app
from nni_haloc.costs.table import CostTable
from nni_haloc.results.heatmap import draw_heatmap

DIGITS = (
    "--model",
    "digits_cnn",
    "--input",
    "1x8x8",
    "--step",
    "16",
    "--rounds",
    "1",
    "--threads",
    "1",
)


def heatmap(*words):
    app(["heatmap", *DIGITS, *map(str, words)], standalone_mode=False)


@pytest.mark.parametrize("metric", ["latency_ms", "cycles"])
def test_every_pair_of_ranks_is_drawn_and_kept(tmp_path, monkeypatch, metric):
    monkeypatch.setattr("nni_haloc.results.heatmap.CACHE", tmp_path / "cache.json")
    heatmap("--layer", "block2.conv", "--metric", metric, "--out", tmp_path / "map.png")
    table = CostTable.load(tmp_path / "map.json")
    row = table.costs["block2.conv"]
    assert set(row) == {"dense", "r16", "r16x32", "r32x16", "r32"}
    assert table.metric == metric
    picture = matplotlib.image.imread(tmp_path / "map.png")
    colours = {tuple(pixel) for pixel in picture[::5, ::5].reshape(-1, picture.shape[-1])}
    assert len(colours) > 20  # a colour bar, not axes alone
    if metric == "cycles":
        assert row["r16"] < row["r32"]


def test_measuring_for_a_map_goes_on_and_one_row_of_ranks_is_drawn(tmp_path):
    out = tmp_path / "map.png"
    heatmap("--layer", "block2.conv", "--out", out)
    before = json.loads((tmp_path / "map.json").read_text())["runs"]
    heatmap("--layer", "block2.conv", "--out", out)
    assert json.loads((tmp_path / "map.json").read_text())["runs"] == before
    draw_heatmap({(8, r): float(r) for r in (8, 16, 24)}, 12.0, "ms", "one row", out)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--layer", "block9.conv"),
        ("--layer", "classifier"),
        ("--step", "0"),
        ("--metric", "macs"),
        ("--out", "map.json"),
    ],
)
def test_bad_options_are_one_line(option, value, monkeypatch, capsys):
    arguments = {"--layer": "block2.conv", option: value}
    from nni_haloc.cli.main import main

    words = [word for pair in arguments.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["haloc", "heatmap", *DIGITS, *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("haloc: ")
    assert option in message
    assert message.count("\n") == 1
