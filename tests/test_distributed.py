"""A search in two processes: both sample the same path and agree, and they find what one process finds on the whole batches."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys, torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from nni_haloc import Haloc, RankRules, RankSpace, Recipe, classification, mac_table
from nni_haloc.nas import run_search

processes, objective, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # Adam makes much of the last digit of a small gradient
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
)
x, y = torch.randn(96, 3, 8, 8), torch.randint(4, (96,))
mine = range(int(os.environ.get("LOCAL_RANK", 0)), len(x), processes)  # Lightning's own sampler would shuffle: another order for one
loaders = [DataLoader(Subset(TensorDataset(x, y), mine), 32 // processes) for _ in range(2)]
rules = RankRules(step=4, exclude=("0",))
costs = mac_table(model, x[:1], rules)
space = RankSpace(model, x[:1], costs, rules)
strategy = Haloc(costs, 0.6 * costs.original, approach_share=1.0, alpha_every=1, objective=objective, alpha_lr=0.1)
options = {"devices": processes, "accelerator": "cpu", "enable_progress_bar": False, "use_distributed_sampler": False}
if processes > 1:
    options["strategy"] = "ddp_find_unused_parameters_true"
run_search(space, classification(*loaders, Recipe(epochs=3, lr=0.05, schedule="constant"), **options), strategy)
import torch.distributed
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
found = {
    "alpha": {n: layer.alpha.tolist() for n, layer in strategy.mixed_layers.items()},
    "plan": strategy.plan().names,
    "sampled": {n: layer.sampled for n, layer in strategy.mixed_layers.items()},
    "scores": strategy.scores(),
    "weights": [float(p.double().sum()) for p in strategy.network().parameters()],
}
open(f"{out}/{processes}-{rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.parametrize("objective", ["settle", "paper"])
def test_two_processes_agree_and_are_one(tmp_path, objective):
    (tmp_path / "program.py").write_text(PROGRAM)
    for processes in (1, 2):
        done = subprocess.run(
            [sys.executable, "program.py", str(processes), objective, str(tmp_path)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second  # to the last digit
    assert first["plan"] == one["plan"]
    assert first["sampled"] == one["sampled"]
    for layer, alpha in one["alpha"].items():
        assert first["alpha"][layer] == pytest.approx(alpha, abs=1e-6)
    assert first["weights"] == pytest.approx(one["weights"], abs=1e-6)
