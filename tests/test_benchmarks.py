"""A study at a small scale: from images and weights by its command to the table of the page."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import torch
from benchmarks import report
from helpers.paths import ROOT
from PIL import Image

from nni_haloc.inputs.models import build_model


def small_data(folder):
    """Ten classes of random 32 x 32 images: 40 to calibrate, 20 to validate; random weights."""
    random = np.random.default_rng(0)
    with tarfile.open(folder / "cifar10-jpeg.tar.gz", "w:gz") as tar:
        for label in range(10):
            for number in (*range(4), 4500, 4501):
                content = io.BytesIO()
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(content, "JPEG")
                entry = tarfile.TarInfo(f"cifar10/train/class{label}/{number:04}.jpg")
                entry.size = content.tell()
                content.seek(0)
                tar.addfile(entry, content)
    torch.manual_seed(0)
    network = build_model("resnet20", {})
    torch.save(network.state_dict(), folder / "resnet20-cifar10-jpeg-45k.pt")


def test_the_study_without_labels_makes_its_table(tmp_path):
    small_data(tmp_path)
    rows = tmp_path / "rows.jsonl"
    words = ["resnet20", "--data", tmp_path, "--method", "uniform", "--out", rows]
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "minutes.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {(row["budget"], row["weights"]) for row in found} == {
        (budget, weights)
        for budget in (0.6, 0.45, 0.28)
        for weights in ("decomposed", "reconstructed")
    }
    assert all(row["macs"] <= row["budget"] for row in found)
    pairs = zip(found[::2], found[1::2], strict=True)
    assert all(after["divergence"] < before["divergence"] for before, after in pairs)
    *_, decomposed, reconstructed = report.minutes(found, "resnet20").splitlines()
    assert decomposed.startswith("| uniform | decomposed |")
    assert reconstructed.startswith("|  | reconstructed |")
    before = rows.read_text()
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert rows.read_text() == before, "rows that are there are not made again"
