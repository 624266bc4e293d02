"""A search that was killed goes on as if nothing had happened.

A state that does not belong is refused.
"""

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import Fork, haloc
from helpers.paths import DIGITS
from helpers.states import differences

from nni_haloc.inputs.config import load_config
from nni_haloc.runs.identity import finetuning_identity, search_identity
from nni_haloc.training import checkpoint
from nni_haloc.training.random_states import random_states, set_random_states
from nni_haloc.utils.errors import UnusableCheckpoint

SHORT = [
    "--set",
    "search.epochs=3",
    "--set",
    "search.schedule=onecycle",
    "--set",
    "finetune.epochs=2",
    "--set",
    "finetune.schedule=step",
]
STATE = Path("search", "checkpoint.ckpt")


def killed_after(path, *words, **options):
    """Run a command until ``path`` is there, and then end it as a power cut would.

    Returns the number of epochs that the file holds.
    """
    process = Fork(*words, **options)
    try:
        end = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
        process.remove()
    return checkpoint.read(path)["epochs"]


def loaded(folder, state=STATE):
    return torch.load(folder / state, weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = haloc("run", DIGITS, "--out", folder, *SHORT)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_search_killed_after_an_epoch_resumes_to_the_same_state(undisturbed, tmp_path):
    """Ranks, weights, alphas, optimizers, rates, scores and every random state, bit by bit."""
    assert killed_after(tmp_path / STATE, "search", DIGITS, "--out", tmp_path, *SHORT) < 3
    midway = loaded(tmp_path)
    done = haloc("search", DIGITS, "--out", tmp_path, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    assert "search epoch 1:" not in done.stderr
    assert "search epoch 3:" in done.stderr
    assert json.loads((tmp_path / "ranks.json").read_text()) == json.loads(
        (undisturbed / "ranks.json").read_text()
    )
    ours, theirs = loaded(tmp_path), loaded(undisturbed)
    assert list(differences(ours, theirs)) == []
    # What must have been in it for that to mean something:
    weights, alphas = midway["optimizer_states"]
    assert any("momentum_buffer" in state for state in weights["state"].values())
    assert all(state["exp_avg_sq"].any() for state in alphas["state"].values())
    assert len(alphas["state"]) == sum(key.endswith(".alpha") for key in midway["state_dict"]) == 3
    assert midway["lr_schedulers"][0]["last_epoch"] == 17 * (midway["epoch"] + 1)
    assert set(midway["haloc_search"]["scores"]) == {"block2.conv", "block3.conv", "block4.conv"}
    assert not any(
        optimizer["state"] for optimizer in ours["optimizer_states"]
    )  # half of a finished search's file, of no use any more
    assert {p.name for p in (tmp_path / "search").iterdir()} == {"checkpoint.ckpt", "history.csv"}


def test_a_run_killed_in_fine_tuning_goes_on_there(undisturbed, tmp_path):
    state = Path("finetuning", "checkpoint.ckpt")
    assert killed_after(tmp_path / state, "run", DIGITS, "--out", tmp_path, *SHORT) == 1
    done = haloc("run", DIGITS, "--out", tmp_path, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    assert "search epoch" not in done.stderr
    assert "fine-tuning epoch 1:" not in done.stderr
    assert "fine-tuning epoch 2:" in done.stderr
    assert list(differences(loaded(tmp_path, state), loaded(undisturbed, state))) == []
    assert (tmp_path / "weights.safetensors").read_bytes() == (
        undisturbed / "weights.safetensors"
    ).read_bytes()
    ours, theirs = (
        json.loads((folder / "metrics.json").read_text())["stages"]
        for folder in (tmp_path, undisturbed)
    )
    assert list(ours) == ["original", "search", "finetune"]
    for stages in (ours, theirs):
        for figures in stages.values():
            for key in ("latency_ms", "images_per_s"):  # measured anew
                figures.pop(key, None)
    assert ours["finetune"].keys() == {"top1", "test_top1", "macs", "params", "bytes"}
    assert ours == theirs


def test_a_trial_that_nni_starts_again_goes_on(undisturbed, tmp_path):
    settings = DIGITS.read_text()
    settings = settings.replace("digits.safetensors", str(DIGITS.with_name("digits.safetensors")))
    settings = settings.replace(
        "epochs: 10, lr: 0.02, alpha", "epochs: 3, schedule: onecycle, lr: 0.02, alpha"
    )
    settings = settings.replace("epochs: 10, lr: 0.02, schedule: onecycle", "epochs: 1, lr: 0.02")
    (tmp_path / "run.yml").write_text(settings)
    trial, folder = tmp_path / "run.yml", tmp_path / "haloc"
    options = {"module": "nni_haloc.trial", "environment": {"NNI_OUTPUT_DIR": str(tmp_path)}}
    assert killed_after(folder / STATE, trial, **options) < 3
    assert (done := haloc(trial, **options)).returncode == 0, done.stderr
    log = (folder / "log.txt").read_text()
    assert log.count("search epoch 1:") == log.count("search epoch 3:") == 1
    assert list(differences(loaded(folder)["state_dict"], loaded(undisturbed)["state_dict"])) == []
    (tmp_path / "run.yml").write_text(
        settings.replace("alpha_lr: 0.03", "alpha_lr: 0.01")
    )  # the same folder, other settings
    assert (done := haloc(trial, **options)).returncode == 0, done.stderr
    log = (folder / "log.txt").read_text()
    assert "made with other settings (search.alpha_lr was 0.03, now 0.01); starting anew" in log
    assert log.count("search epoch 1:") == 2


def test_the_state_of_other_settings_is_refused_in_one_line(undisturbed):
    before = {
        p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and p.name != "log.txt"
    }
    done = haloc(
        "search",
        DIGITS,
        "--out",
        undisturbed,
        *SHORT,
        "--set",
        "search.lr=0.5",
        "--set",
        "seed=1",
        "--resume",
    )
    assert done.returncode == 2
    message = "made with other settings (search.lr was 0.02, now 0.5, seed was 0, now 1)"
    message += "; start without --resume or use another --out"
    assert done.stderr.splitlines()[-1] == f"haloc: {undisturbed / STATE}: {message}"
    assert "Traceback" not in done.stderr
    assert before == {
        p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and p.name != "log.txt"
    }


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 1000, lambda b: None]
)
def test_a_damaged_state_is_one_line(undisturbed, tmp_path, damage):
    path = tmp_path / "checkpoint.ckpt"
    content = damage((undisturbed / STATE).read_bytes())
    if content is None:
        torch.save({"epoch": 1}, path)  # somebody else's file
    else:
        path.write_bytes(content)
    with pytest.raises(
        UnusableCheckpoint, match=r"checkpoint\.ckpt: not a checkpoint that can be read \("
    ) as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_a_state_that_would_run_code_is_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"epoch": 1, "nni_haloc": {"facts": Trap()}}, tmp_path / "checkpoint.ckpt")
    with pytest.raises(
        UnusableCheckpoint, match=r"not a checkpoint that can be read \(Weights only load failed\)$"
    ):  # and no advice to
        checkpoint.read(tmp_path / "checkpoint.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_a_state_depends_on_the_settings_of_the_search_and_on_what_its_files_hold(tmp_path):
    def identity(**changes):
        return search_identity(
            load_config(DIGITS, {key.replace("__", "."): value for key, value in changes.items()})
        )

    for key, value in {
        "finetune__epochs": 3,
        "threads": 2,
        "data__workers": 2,
        "data__score": "val",
        "search__tensorboard": True,
        "trainer__logger": "tensorboard",
    }.items():
        assert identity(**{key: value}) == identity(), key
    for key, value in {
        "budget__fraction": 0.5,
        "search__epochs": 4,
        "seed": 1,
        "rank_space__step": 4,
        "data__batch_size": 32,
    }.items():
        shown = rf"settings \({key.replace('__', '.')} was .*, now {value}(\.0)?\); start without"
        with pytest.raises(UnusableCheckpoint, match=shown):
            checkpoint.check_same(tmp_path, identity(), identity(**{key: value}))
    weights = tmp_path / "copy.safetensors"
    weights.write_bytes(DIGITS.with_name("digits.safetensors").read_bytes())
    assert identity(weights=str(weights)) == identity()
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(
        UnusableCheckpoint,
        match=r"other settings \(weights is a file of other content now\); start without",
    ):
        checkpoint.check_same(tmp_path, identity(), identity(weights=str(weights)))
    table = tmp_path / "also.json"
    table.write_text('{"version": 1, "metric": "params", "fixed": 1, "costs": {}}')
    limits = [{"metric": "params", "fraction": 0.5, "table": str(table)}]
    before = identity(budget__also=limits)
    assert identity(budget__also=limits) == before
    table.write_text('{"version": 1, "metric": "params", "fixed": 2, "costs": {}}')
    assert identity(budget__also=limits) != before


def test_random_states_of_torch_numpy_and_python_come_back():
    def draws():
        return [
            *torch.rand(3).tolist(),
            *np.random.rand(3),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        ]

    draws()
    states = random_states()
    first = draws()
    assert draws() != first
    set_random_states(states)
    assert draws() == first


def test_a_write_that_is_cut_off_leaves_the_old_state(tmp_path, monkeypatch):
    files, path = checkpoint._WholeFiles(), tmp_path / "checkpoint.ckpt"
    files.save_checkpoint({"epoch": 1}, path)

    def cut_off(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}


def test_no_latency_is_measured_again(tmp_path):
    """Of any limit: a search that goes on with other costs would not be the same search."""
    also = "budget.also=[{metric: latency_ms, absolute: 1000.0}]"
    words = [
        "search",
        DIGITS,
        "--out",
        tmp_path,
        "--set",
        "search.epochs=1",
        "--set",
        also,
        "--set",
        "cost.batch_size=16",
    ]
    assert (done := haloc(*words)).returncode == 0, done.stderr
    tables = [(tmp_path / name).read_text() for name in ("costs.json", "costs-also0.json")]
    assert (done := haloc(*words, "--resume")).returncode == 0, done.stderr
    assert "measuring" not in done.stderr
    assert [(tmp_path / name).read_text() for name in ("costs.json", "costs-also0.json")] == tables


def test_settings_that_follow_from_scale_are_told_by_scale(tmp_path):
    plain, scaled = (search_identity(load_config(DIGITS, {"scale": n})) for n in (1, 0.1))
    for there, here, words in (
        (scaled, plain, r"scale was 0\.1, now 1\.0"),
        (plain, scaled, r"scale was 1\.0, now 0\.1"),
    ):
        with pytest.raises(UnusableCheckpoint, match=rf"\({words}, .*, and \d+ more\)"):
            checkpoint.check_same(tmp_path, there, here)
    checkpoint.check_same(tmp_path, plain, {**plain, "scale": 0.5})  # nothing follows from it


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"rank_space.step": 4}, {}, "rank_space.step was 4, now left out"),
        ({}, {"rank_space.step": "paper"}, "rank_space.step was left out, now 'paper'"),
        ({}, {"finetune.lr": 0.5}, r"finetune.lr was 0\.\d+, now 0.5"),
        (
            {},
            {"search.lr": 0.5, "finetune.lr": 0.5},
            r"search.lr was 0\.\d+, now 0.5, finetune.lr was 0\.\d+, now 0.5",
        ),
    ],
)
def test_changed_settings_are_told_as_the_settings_have_them(tmp_path, before, now, words):
    there, here = (finetuning_identity(load_config(DIGITS, each)) for each in (before, now))
    with pytest.raises(UnusableCheckpoint, match=rf"other settings \({words}\); start without"):
        checkpoint.check_same(tmp_path, there, here)
