"""What a search leaves of its course, and the figures of it."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from test_cli import DIGITS, haloc

from nni_haloc import history
from nni_haloc.config import load_config
from nni_haloc.figures import discrepancy, losses, rank_bars
from nni_haloc.history import COLUMNS
from nni_haloc.job import Job
from nni_haloc.predictors import CostTable, param_table
from nni_haloc.ranks import RankPlan
from nni_haloc.run import search
from nni_haloc.tables import rules_of
from nni_haloc.yaml_files import ConfigError

TRAINED = ["--model", "digits_cnn", "--weights", DIGITS.with_name("digits.safetensors")]
SETTINGS = {"search.epochs": 2, "search.lam": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    job = Job(load_config(DIGITS, SETTINGS), folder)
    strategy = search(job)
    return folder, job, strategy


def test_every_iteration_has_a_row(folder):
    folder, job, strategy = folder
    rows = history.read(folder / "search" / "history.csv")
    assert tuple(rows) == COLUMNS
    batches = [len(job.loader(split, shuffle=True)) for split in ("train", "val")]
    assert rows["iteration"] == list(range(2 * max(batches)))
    assert all(math.isfinite(value) for column in rows.values() for value in column)
    assert rows["expected_cost"][-1] == pytest.approx(float(strategy.expected_cost().detach()), rel=1e-4)
    params = param_table(job.model, job.example, rules_of(job.config))
    expected = params.fixed + sum(p * params.costs[layer][name] for layer, row in strategy.probabilities.items() for name, p in row.items())
    assert rows["expected_params"][-1] == pytest.approx(expected, rel=1e-4)
    assert max(rows["approach_loss"]) > 0


def test_a_search_that_goes_on_keeps_its_rows(folder, tmp_path):
    whole = history.read(folder[0] / "search" / "history.csv")

    def stop(metrics):
        raise KeyboardInterrupt

    config = load_config(DIGITS, SETTINGS)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        search(Job(config, tmp_path), lambda metrics: next(reports) or stop(metrics))
    search(Job(config, tmp_path), resume=True)
    again = history.read(tmp_path / "search" / "history.csv")
    assert again["iteration"] == whole["iteration"]
    np.testing.assert_allclose(again["train_loss"], whole["train_loss"], rtol=1e-4)


reports = itertools.chain([True], itertools.repeat(False))


def test_the_figures_are_drawn(folder, tmp_path):
    done = haloc("plot", folder[0], folder[0], "--out", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}{suffix}" for name in ("loss", "parameters", "ranks") for suffix in (".png", ".svg")}


def test_curves_and_bars_are_what_they_are_of(folder):
    (line,) = losses({"a": [3.0, 1.0, 2.0, 6.0]}, window=2).axes[0].lines
    assert list(line.get_ydata()) == [2.0, 1.5, 4.0]
    plan = RankPlan.load(folder[0] / "ranks.json").ranks
    axes = rank_bars({"a": plan}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [rank[0] if rank else 0 for rank in plan.values()]
    assert [text.get_text() for text in axes.texts] == ["dense"] * sum(rank is None for rank in plan.values())


def test_pairs_of_ranks_have_the_share_and_the_error_that_tensorly_finds():
    torch.manual_seed(0)
    weight = torch.randn(24, 16, 3, 3)
    for share, rows in discrepancy(weight, (0.2, 0.4), points=6).items():
        assert len(rows) >= 4
        for r1, r2, error in rows:
            parameters = 16 * r2 + 9 * r1 * r2 + 24 * r1
            assert abs(parameters - share * weight.numel()) <= (9 * r2 + 24) / 2 + 1e-6
            (core, factors), _ = partial_tucker(weight.numpy(), rank=[int(r1), int(r2)], modes=[0, 1], n_iter_max=300, tol=1e-8)
            best = np.linalg.norm(weight.numpy() - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])) / weight.norm()
            assert error == pytest.approx(float(best), rel=0.01)
        assert any(abs(r1 - r2) <= 1 for r1, r2, _ in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected folders of searches, or --layer"),
        (["none"], "none/search/history.csv: no such file"),
        (["--layer", "block1.conv"], "--layer: expected --model and --weights, too"),
        (
            ["--layer", "fc", "--model", "digits_cnn", "--weights", DIGITS.with_name("digits.safetensors")],
            "--layer: expected a convolution",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, message, tmp_path):
    done = haloc("plot", *arguments, "--out", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_figure_3_is_drawn(tmp_path):
    done = haloc("plot", "--layer", "block2.conv", *TRAINED, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "discrepancy.png").exists()


def test_folders_of_one_name_are_told_apart(tmp_path):
    """As those of an experiment's trials are."""
    from nni_haloc.figures import _names

    folders = [tmp_path / "a" / "haloc", tmp_path / "b" / "haloc"]
    assert _names(folders) == {"a/haloc": folders[0], "b/haloc": folders[1]}
    assert list(_names([*folders, folders[0]])) == ["a/haloc", "b/haloc"]
    assert list(_names([tmp_path / "x", tmp_path / "y"])) == ["x", "y"]


@pytest.mark.parametrize(
    "content", ["", "iteration,train_loss\n", "iteration,train_loss,approach_loss,expected_cost,expected_params\n0,1,"]
)
def test_a_damaged_history_does_not_keep_a_search_from_going_on(tmp_path, content):
    (tmp_path / "history.csv").write_text(content)
    past = history.History(tmp_path / "history.csv", None, CostTable("params", {"a": {"dense": 1.0}}, 0.0))
    past.on_train_start(SimpleNamespace(current_epoch=1, num_training_batches=5), None)
    assert past.rows == []


def test_a_history_without_rows_is_named(tmp_path):
    (tmp_path / "history.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ConfigError, match=r"history.csv: expected the columns .* \(no rows\)"):
        history.read(tmp_path / "history.csv")
