"""SIGKILL at random moments of a search, a fine-tuning, a stage or a measuring.

The same command goes on, and ends as if not disturbed. A process that was killed is followed by
another, which may be killed too, until one comes to its end; then the next folder is begun. Two
moments of each in CI, twenty in the slow suite, ``HALOC_SLOW=1``. Every fourth kill waits for a
file that is just being written.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import DIGITS
from helpers.short_runs import SHORT
from helpers.states import differences
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

MOMENTS = 20 if os.environ.get("HALOC_SLOW") else 2
FILES = {
    ".json": lambda path: json.loads(path.read_text()),
    ".safetensors": load_file,
    ".csv": lambda path: np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2),
    ".ckpt": lambda path: torch.load(path, weights_only=True),
}


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    """Return a folder after its search, one after its fine-tuning, and how long each took."""
    searched = tmp_path_factory.mktemp("searched")
    searching = commands.done("search", DIGITS, "--out", searched, *SHORT)
    tuned = shutil.copytree(searched, tmp_path_factory.mktemp("tuned"), dirs_exist_ok=True)
    return (
        searched,
        searching,
        tuned,
        commands.done("run", DIGITS, "--out", tuned, *SHORT, "--resume"),
    )


def whole_files(folder):
    """Return the folder's files, each of which must be readable.

    What a killed process was writing stands beside them under another name.
    """
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in FILES}
    for path in found:
        FILES[path.suffix](folder / path)
    return found


def killed_again_and_again(commands, seed, folders, seconds, words, killed=lambda folder: None):
    """Kill until there were enough moments, and then go on to the end.

    Returns the folders that came to one.
    """
    draw, moments, caught, ended = random.Random(seed), 0, 0, []
    folder = next(folders)
    while moments < MOMENTS or not ended:
        if moments < MOMENTS:
            writing = moments % 4 == 1
            delay = draw.uniform(0, 0.5 if writing else 1) * seconds
            running = commands.killed(folder, delay, writing, *words(folder))
            moments += running
            caught += running and bool(list(folder.rglob("*.part")))
        else:
            commands.done(*words(folder))
            running = False
        whole_files(folder)
        if running:
            killed(folder)
        else:
            ended.append(folder)
            folder = next(folders)
    print(f"{moments} moments, {caught} of them while a file was written, {len(ended)} folders")
    return ended


def counted(content):
    """Return what ``metrics.json`` says of each stage, but for what was timed."""
    return {
        name: {
            key: value
            for key, value in figures.items()
            if key not in ("images_per_s", "speedup") and not key.endswith("latency_ms")
        }
        for name, figures in content["stages"].items()
    }


def fresh(tmp_path, start=None):
    for number in range(10**6):
        folder = tmp_path / str(number)
        if start is None:
            folder.mkdir()
        else:
            shutil.copytree(start, folder)
        yield folder


def test_a_search_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(
    commands, undisturbed, tmp_path
):
    expected, seconds, _, _ = undisturbed
    ended = killed_again_and_again(
        commands,
        0,
        fresh(tmp_path),
        seconds,
        lambda folder: ["search", DIGITS, "--out", folder, *SHORT, "--resume"],
    )
    for folder in ended:
        assert whole_files(folder) == whole_files(expected)
        for name in (
            "ranks.json",
            "costs.json",
            "weights.safetensors",
            "search.json",
            "search/history.csv",
        ):
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
        assert (
            list(
                differences(
                    *(
                        torch.load(f / "search" / "checkpoint.ckpt", weights_only=True)
                        for f in (folder, expected)
                    )
                )
            )
            == []
        )
        assert not (folder / "search" / "checkpoint.ckpt.part").exists()


def test_a_fine_tuning_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(
    commands, undisturbed, tmp_path
):
    searched, _, expected, seconds = undisturbed
    ended = killed_again_and_again(
        commands,
        1,
        fresh(tmp_path, searched),
        seconds,
        lambda folder: ["run", DIGITS, "--out", folder, *SHORT, "--resume"],
    )
    for folder in ended:
        assert whole_files(folder) == whole_files(expected)
        for name in (
            "ranks.json",
            "costs.json",
            "weights.safetensors",
            "model.json",
            "search.json",
            "search/history.csv",
        ):
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
        state = Path("finetuning", "checkpoint.ckpt")
        assert (
            list(
                differences(*(torch.load(f / state, weights_only=True) for f in (folder, expected)))
            )
            == []
        )
        ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, expected))
        assert counted(ours) == counted(theirs)
        assert list(ours["stages"]) == ["original", "search", "finetune"]
        assert ours["config"] == theirs["config"]


@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_a_stage_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(
    commands, undisturbed, tmp_path, stage
):
    source = undisturbed[2]
    before = {
        name: (source / name).read_bytes()
        for name in ("ranks.json", "weights.safetensors", "metrics.json")
    }
    options = {
        "prune": ["--pruner", "taylor", "--sparsity", 0.3],
        "quantize": ["--quantizer", "qat", "--set", "quantize.int8=false"],
    }

    def words(folder):
        return [stage, source, "--out", folder, "--epochs", 3, *options[stage], "--resume"]

    expected = tmp_path / "expected"
    seconds = commands.done(*words(expected))
    for folder in killed_again_and_again(commands, 3, fresh(tmp_path), seconds, words):
        assert whole_files(folder) == whole_files(expected)
        assert (folder / "weights.safetensors").read_bytes() == (
            expected / "weights.safetensors"
        ).read_bytes()
        assert (
            list(
                differences(
                    *(
                        torch.load(f / "checkpoint.ckpt", weights_only=True)
                        for f in (folder, expected)
                    )
                )
            )
            == []
        )
        ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, expected))
        assert counted(ours) == counted(theirs)
        assert list(ours["stages"]) == [stage]
    assert before == {name: (source / name).read_bytes() for name in before}


def test_a_measuring_that_is_killed_at_any_moment_keeps_its_entries_and_measures_none_twice(
    commands, tmp_path
):
    rounds, space = 2, tmp_path / "space.yml"  # of two rounds there are never more
    space.write_text("kinds: [conv]\n")

    def words(folder):
        options = [
            "--rank-space",
            space,
            "--rounds",
            rounds,
            "--min-run-time",
            0.01,
            "--threads",
            1,
        ]
        return [
            "measure",
            "--model",
            "digits_cnn",
            "--input",
            "1x8x8",
            *options,
            "--out",
            folder / "costs.json",
        ]

    def runs(folder):
        """Entry to its times, as they are written."""
        path = folder / "costs.json"
        content = json.loads(path.read_text(), parse_float=str) if path.exists() else {"runs": {}}
        found = {
            (layer, name): times
            for layer, row in content["runs"].items()
            for name, times in row.items()
        }
        return found | {"network": content.get("network", [])}

    kept = {}

    def keeps(folder):
        before, now = kept.get(folder, {}), runs(folder)
        assert all(now[entry][: len(times)] == times for entry, times in before.items())
        kept[folder] = now

    whole = tmp_path / "whole"
    whole.mkdir()
    seconds = commands.done(*words(whole))
    expected = {entry: len(times) for entry, times in runs(whole).items()}
    assert {count for entry, count in expected.items() if entry != "network"} == {rounds}
    for folder in killed_again_and_again(commands, 2, fresh(tmp_path), seconds, words, keeps):
        keeps(folder)
        assert {entry: len(times) for entry, times in runs(folder).items()} == expected
        commands.done(*words(folder))
        assert re.search(r"measured 0 of 0", commands.output.read_text())
        keeps(folder)
