"""What a search leaves of its course, and the figures of it."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorly
import torch
from helpers.paths import DIGITS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensorly.decomposition import partial_tucker
from torch import nn

from nni_haloc.cli.main import app
from nni_haloc.costs.analytic import param_table
from nni_haloc.costs.from_settings import allowed_ranks_of
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.plan.by_hand import Candidate, LayerRow
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results import plots
from nni_haloc.results.figures import discrepancy, losses, parameters, plan_rows, rank_bars
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import search_only
from nni_haloc.runs.stages.choose_ranks import search
from nni_haloc.search.history import History
from nni_haloc.training import curves as history
from nni_haloc.training.curves import COLUMNS
from nni_haloc.utils.errors import HalocError

TRAINED = ["--model", "digits_cnn", "--weights", DIGITS.with_name("digits.safetensors")]
SETTINGS = {"search.epochs": 2, "search.lam": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    config = load_config(DIGITS, SETTINGS)
    return folder, Job(config, folder), search_only(config, folder)


def test_every_iteration_has_a_row(folder):
    folder, job, strategy = folder
    rows = history.read(folder / "search" / "history.csv")
    assert tuple(rows) == COLUMNS
    batches = [len(job.loader(split, shuffle=True)) for split in ("train", "val")]
    assert rows["iteration"] == list(range(2 * max(batches)))
    assert all(math.isfinite(value) for column in rows.values() for value in column)
    assert rows["expected_cost"][-1] == pytest.approx(
        float(strategy.expected_cost().detach()), rel=1e-4
    )
    params = param_table(job.model, job.example, allowed_ranks_of(job.config))
    expected = params.fixed + sum(
        p * params.costs[layer][name]
        for layer, row in strategy.probabilities.items()
        for name, p in row.items()
    )
    assert rows["expected_params"][-1] == pytest.approx(expected, rel=1e-4)
    assert max(rows["approach_loss"]) > 0


def test_a_search_that_goes_on_keeps_its_rows(folder, tmp_path):
    whole = history.read(folder[0] / "search" / "history.csv")

    def stop(metrics):
        raise KeyboardInterrupt

    config = load_config(DIGITS, SETTINGS)
    job = Job(config, tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)), job.active():
        search(job, lambda metrics, place: next(reports) or stop(metrics))
    search_only(config, tmp_path, resume=True)
    again = history.read(tmp_path / "search" / "history.csv")
    assert again["iteration"] == whole["iteration"]
    np.testing.assert_allclose(again["train_loss"], whole["train_loss"], rtol=1e-4)


reports = itertools.chain([True], itertools.repeat(False))


def test_the_figures_of_two_searches_are_drawn(folder, tmp_path, monkeypatch):
    """Both are in each of them, and their numbers are those of the files."""
    other = tmp_path / "other"
    (other / "search").mkdir(parents=True)
    rows = (folder[0] / "search" / "history.csv").read_text().splitlines()
    (other / "search" / "history.csv").write_text("\n".join(rows[:9]))
    RankPlan({"block1.conv": (4, 4)}).save(other / "ranks.json")
    found = {}
    drawn = plots._save
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, path: (found.update({path.name: figure}), drawn(figure, path)),
    )
    plots.draw_searches([folder[0], other], tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {
        f"{name}{suffix}" for name in ("loss", "parameters", "ranks") for suffix in (".png", ".svg")
    }
    for figure in found.values():
        assert [text.get_text() for text in figure.legends[0].texts] == [folder[0].name, "other"]
    whole = [
        value / 1e3
        for value in history.read(folder[0] / "search" / "history.csv")["expected_params"]
    ]
    for line, values in zip(found["parameters"].axes[0].lines, (whole, whole[:8]), strict=True):
        assert list(line.get_ydata()) == values
    assert (
        len(found["ranks"].axes[0].patches)
        == len(RankPlan.load(folder[0] / "ranks.json").ranks) + 1
    )


def course(iterations, losses=None):
    """A history's columns."""
    return {
        "iteration": iterations,
        "train_loss": losses or [1.0] * len(iterations),
        "expected_params": [2e3] * len(iterations),
    }


@pytest.mark.parametrize("length", [1, 2, 20, 25, 26, 200])
def test_a_short_history_is_seen(length):
    """One point, in the place of a line of 25 iterations, was not."""
    for figure in (
        losses({"a": course(list(range(length)))}),
        parameters({"a": course(list(range(length)))}),
    ):
        (line,) = figure.axes[0].lines
        assert len(line.get_xdata()) >= max(1, length // 2)
        assert line.get_marker() not in ("None", "", None)
        assert len(range(0, len(line.get_xdata()), line.get_markevery())) >= min(
            10, len(line.get_xdata())
        )


def test_a_history_is_drawn_where_its_iterations_are_and_not_across_its_gaps():
    columns = course([100, 101, 102, 103, 200, 300, 301], [4.0, 2.0, 6.0, 2.0, 9.0, 5.0, 1.0])
    lines = losses({"a": columns}, window=2).axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[101, 102, 103], [200], [301]]
    assert [list(line.get_ydata()) for line in lines] == [[3.0, 4.0, 4.0], [9.0], [3.0]]
    assert [list(line.get_xdata()) for line in parameters({"a": columns}).axes[0].lines] == [
        [100, 101, 102, 103],
        [200],
        [300, 301],
    ]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=60), st.integers(1, 30))
def test_a_running_mean_is_that_of_the_iterations_before(steps, window):
    x = [sum(steps[: i + 1]) for i in range(len(steps))]
    y = [float(i * i % 17) for i in range(len(steps))]
    drawn = {}
    for line in losses({"a": course(x, y)}, window).axes[0].lines:
        drawn |= dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    value = dict(zip(x, y, strict=True))
    for at, mean in drawn.items():
        before = [
            value[i] for i in itertools.takewhile(value.__contains__, range(at, at - window, -1))
        ]
        assert mean == pytest.approx(sum(before) / len(before))
    assert max(drawn) == x[-1]


def test_many_runs_are_told_apart_without_colour():
    names = "abcdefghijklmnop"
    lines = losses({name: course(list(range(40))) for name in names}).axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(names)


@pytest.mark.parametrize("length", [8, 30, 70])
def test_labels_fit_into_the_figures(length, tmp_path):
    """Names of folders and of layers."""
    names = [f"{letter}{'n' * length}" for letter in "abc"]
    plans = {
        name: {f"layer{i}.{'x' * length}": (4, 8) if i else None for i in range(5)}
        for name in names
    }
    for figure in (losses({name: course(list(range(9))) for name in names}), rank_bars(plans)):
        figure.savefig(tmp_path / "f.png")
        shown = figure.get_tightbbox()
        assert shown.x0 >= -0.02
        assert shown.y0 >= -0.02
        assert shown.x1 <= figure.get_figwidth() + 0.02
        assert shown.y1 <= figure.get_figheight() + 0.02


def test_curves_and_bars_are_what_they_are_of(folder):
    (line,) = losses({"a": course([0, 1, 2, 3], [3.0, 1.0, 2.0, 6.0])}, window=2).axes[0].lines
    assert list(line.get_ydata()) == [2.0, 1.5, 4.0]
    plan = RankPlan.load(folder[0] / "ranks.json").ranks
    (axes,) = rank_bars({"a": plan}).axes
    ranks = [rank[0] for rank in plan.values() if rank]
    assert lengths(axes) == ranks
    assert sorted(text.get_text() for text in axes.texts) == sorted(
        ["dense"] * (len(plan) - len(ranks)) + [str(rank) for rank in ranks]
    )


def lengths(axes):
    """Of the bars that show a rank."""
    return [bar.get_width() for bar in axes.patches if bar.get_data_transform() == axes.transData]


@pytest.mark.parametrize("layers", [1, 3, 20, 64])
def test_rows_of_layers_do_not_overlap(layers):
    """Neither the names at the left, nor the ranks at the bars; the first layer is on top."""
    names = [f"layer{i // 9}.{i % 9}.conv" for i in range(layers)]
    plan = {name: (8 * i + 8,) * 2 if i % 7 else None for i, name in enumerate(names)}
    rows = [
        LayerRow(name, Candidate("r8", 1.0, 0.1), Candidate("dense", 2.0, 0.0), None, None, "")
        for name in names
    ]
    for figure in (rank_bars({"a": plan}), plan_rows(rows, "macs")):
        figure.canvas.draw()
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        for texts in (axes.get_yticklabels(), axes.texts):
            boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: -box.y0)
            assert len(boxes) == layers
            assert all(a.y0 > b.y1 - 0.5 for a, b in itertools.pairwise(boxes))


def test_the_picture_of_a_plan_has_its_costs_and_sensitivities():
    dense = Candidate("dense", 100.0, 0.0)
    rows = [
        LayerRow("a", Candidate("r8", 40.0, 0.2), dense, Candidate("r4", 20.0, 0.5), dense, ""),
        LayerRow("b", dense, dense, None, None, ""),
        LayerRow("fc", dense, dense, None, None, "left alone: linear", left_alone=True),
    ]
    costs, moves = plan_rows(rows, "macs").axes
    assert [bar.get_width() for bar in costs.patches] == [100, 100, 40, 100]
    found = {line.get_label(): list(line.get_xdata()) for line in moves.lines}
    edge = moves.get_xlim()[0]
    assert found["next cheaper"] == [0.5]
    assert found["chosen"] == [0.2, pytest.approx(edge)]
    bare = [
        LayerRow("a", Candidate("r8", 4.0, None), Candidate("dense", 9.0, None), *[None] * 2, "")
    ]
    assert len(plan_rows(bare, "macs").axes) == 1


def test_both_ranks_are_shown_where_they_differ():
    output, input_ = rank_bars({"a": {"conv": (8, 2), "fc": (4,), "last": None}}).axes
    assert (output.get_xlabel(), input_.get_xlabel()) == ("rank r1 (output)", "rank r2 (input)")
    assert (lengths(output), lengths(input_)) == ([8, 4], [2, 4])


def test_a_dense_layer_does_not_look_like_rank_0():
    """A bar from the left of the axes to their right, which says so."""
    (axes,) = rank_bars({"a": {"conv": (8, 8), "last": None}, "b": {"last": (6, 6)}}).axes
    (bar,) = (bar for bar in axes.patches if bar.get_data_transform() != axes.transData)
    box, whole = bar.get_window_extent(), axes.get_window_extent()
    assert (box.x0, box.x1) == pytest.approx((whole.x0, whole.x1))
    (text,) = (text for text in axes.texts if text.get_text() == "dense")
    assert box.y0 < (text.get_window_extent().y0 + text.get_window_extent().y1) / 2 < box.y1


def test_pairs_of_ranks_have_the_share_and_the_error_that_tensorly_finds():
    torch.manual_seed(0)
    weight = torch.randn(24, 16, 3, 3)
    for share, rows in discrepancy(weight, (0.2, 0.4), points=6).items():
        assert len(rows) >= 4
        for r1, r2, error in rows:
            parameters = 16 * r2 + 9 * r1 * r2 + 24 * r1
            assert abs(parameters - share * weight.numel()) <= (9 * r2 + 24) / 2 + 1e-6
            (core, factors), _ = partial_tucker(
                weight.numpy(), rank=[int(r1), int(r2)], modes=[0, 1], n_iter_max=300, tol=1e-8
            )
            best = (
                np.linalg.norm(
                    weight.numpy() - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
                )
                / weight.norm()
            )
            assert error == pytest.approx(float(best), rel=0.01)
        assert any(abs(r1 - r2) <= 1 for r1, r2, _ in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected folders of searches, or --layer"),
        (["none"], "none/search/history.csv: no such file"),
        (
            ["none", "--model", "resnet20"],
            "FOLDER and --model: expected folders of searches, or --layer",
        ),
        (
            ["none", "--weights", "w.pt"],
            "FOLDER and --weights: expected folders of searches, or --layer",
        ),
        (
            ["none", "--layer", "conv1"],
            "FOLDER and --layer: expected folders of searches, or --layer",
        ),
        (["--layer", "block1.conv"], "--layer: expected --model and --weights, too"),
        (["--layer", "fc", *TRAINED], "--layer: expected a convolution"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        app(["plot", *map(str, arguments), "--out", str(tmp_path)], standalone_mode=False)


def test_figure_3_is_drawn_of_a_model_by_a_factory_in_the_current_folder(tmp_path, monkeypatch):
    """Of kernels that small shares leave no rank, too."""
    (tmp_path / "my_factory.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(2, 2, 3))\n"
    )
    save_file(nn.Sequential(nn.Conv2d(2, 2, 3)).state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--layer", "0", "--model", "my_factory:net", "--weights", "w.safetensors"]
    app(["plot", *words], standalone_mode=False)
    assert (tmp_path / "discrepancy.png").exists()


def test_a_search_without_a_plan_is_named(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "history.csv").write_text(",".join(COLUMNS) + "\n0,1,1,1,1\n")
    with pytest.raises(FileNotFoundError, match=r"ranks.json: no such file$"):
        plots.draw_searches([tmp_path], tmp_path)


def test_folders_of_one_name_are_told_apart(tmp_path):
    """As those of an experiment's trials are."""
    from nni_haloc.results.plots import _names

    folders = [tmp_path / "a" / "haloc", tmp_path / "b" / "haloc"]
    assert _names(folders) == {"a/haloc": folders[0], "b/haloc": folders[1]}
    assert list(_names([*folders, folders[0]])) == ["a/haloc", "b/haloc"]
    assert list(_names([tmp_path / "x", tmp_path / "y"])) == ["x", "y"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "iteration,train_loss\n",
        "iteration,train_loss,approach_loss,expected_cost,expected_params\n0,1,",
    ],
)
def test_a_damaged_history_does_not_keep_a_search_from_going_on(tmp_path, content, monkeypatch):
    monkeypatch.setattr(History, "_write_state", lambda *_: None)
    (tmp_path / "history.csv").write_text(content)
    params = CostTable("params", {"a": {"dense": 1.0}}, 0.0)
    past = History(tmp_path / "history.csv", tmp_path / "search.json", None, params)
    past.on_train_start(SimpleNamespace(current_epoch=1, num_training_batches=5), None)
    assert past.rows == []


def test_a_history_without_rows_is_named(tmp_path):
    (tmp_path / "history.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(HalocError, match=r"history.csv: expected the columns .* \(no rows\)"):
        history.read(tmp_path / "history.csv")
