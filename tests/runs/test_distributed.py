"""A search in two processes: both sample the same path and agree.

They find what one process finds on the whole batches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import commands
from helpers.paths import DIGITS

import nni_haloc
from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.from_settings import allowed_ranks_of
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.limits import limits_of
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.search.updates import HalocModule
from nni_haloc.training import curves as history
from nni_haloc.training.recipe import Recipe
from nni_haloc.utils.errors import HalocError
from nni_haloc.utils.processes import check_startable, is_first, start_together

PROGRAM = """
import json, os, sys, torch
from pytorch_lightning import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from nni_haloc import Classification, Haloc, AllowedRanks, RankSpace, Recipe, mac_table
from nni_haloc.search.strategy import run_search

processes, objective, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # Adam makes much of the last digit of a small gradient
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
)
x, y = torch.randn(96, 3, 8, 8), torch.randint(4, (96,))
# Lightning's own sampler would shuffle: another order for one
mine = range(int(os.environ.get("LOCAL_RANK", 0)), len(x), processes)
loaders = [DataLoader(Subset(TensorDataset(x, y), mine), 32 // processes) for _ in range(2)]
rules = AllowedRanks(step=4, exclude=("0",))
costs = mac_table(model, x[:1], rules)
space = RankSpace(model, x[:1], costs, rules)
strategy = Haloc(costs, 0.6, approach_share=1.0, alpha_every=1, objective=objective, alpha_lr=0.1)
options = {"devices": processes, "accelerator": "cpu", "enable_progress_bar": False}
options["use_distributed_sampler"] = False
if processes > 1:
    options["strategy"] = "ddp_find_unused_parameters_true"
class Losses(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        losses.append(module.latest.tolist())

losses = []
recipe = Recipe(epochs=3, lr=0.05, schedule="constant")
run_search(space, Classification(*loaders, recipe, callbacks=[Losses()], **options), strategy)
import torch.distributed
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
found = {
    "alpha": {n: layer.alpha.tolist() for n, layer in strategy.mixed_layers.items()},
    "losses": losses,
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
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first == second  # to the last digit
    assert first["plan"] == one["plan"]
    assert first["sampled"] == one["sampled"]
    assert first["losses"] == [pytest.approx(pair, abs=1e-6) for pair in one["losses"]]
    for layer, alpha in one["alpha"].items():
        assert first["alpha"][layer] == pytest.approx(alpha, abs=1e-6)
    assert first["weights"] == pytest.approx(one["weights"], abs=1e-6)


def test_a_layer_that_one_process_does_not_call_counts_as_nothing_there(net, images, loaders):
    """It has a place in what is exchanged.

    Else each process would read another layer's numbers, or wait for ever.
    """

    class Other:
        """This process beside one that has called ``stem`` and not ``point``.

        Neither has called ``body.0``.
        """

        world_size, strategy = 2, property(lambda self: self)

        def reduce(self, mine, reduce_op):
            sent.append(mine)
            return (mine + theirs) / 2 if theirs is not None else mine

    def exchanged(ce, called):
        for layer in mixed:
            layer.pending = torch.ones(len(layer.names)) if layer.label in called else None
        task = [
            torch.full_like(layer.alpha.detach(), 2.0) if layer.label in called else None
            for layer in mixed
        ]
        ce, task = HalocModule._averaged(
            SimpleNamespace(trainer=Other(), _mixed=mixed), torch.tensor(ce), task
        )
        return float(ce), {x.label: (t, x.pending) for x, t in zip(mixed, task, strict=True)}

    space = RankSpace(net, images[:1])
    strategy = Haloc(space.costs, 1.0)
    run_search(
        space,
        Classification(*loaders, Recipe(1, 0.01), enable_progress_bar=False, limit_train_batches=1),
        strategy,
    )
    mixed, sent, theirs = list(strategy.mixed_layers.values()), [], None
    exchanged(3.0, {"stem"})
    (theirs,) = sent
    ce, means = exchanged(5.0, {"stem", "point"})
    assert ce == 4.0
    assert means["body.0"] == (None, None)
    for layer, share in (("stem", 1.0), ("point", 0.5)):
        task, pending = means[layer]
        assert (task.unique().tolist(), pending.unique().tolist()) == ([2 * share], [share])


def haloc(*arguments, **environment):
    command = [
        str(Path(sys.executable).with_name("haloc")),
        *map(str, arguments),
    ]  # a script: Lightning starts the others by its name
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
    )


def test_a_run_in_two_processes_leaves_one_folder(tmp_path):
    changes = [
        "trainer.devices=2",
        "data.batch_size=32",
        "search.epochs=2",
        "finetune.epochs=2",
        "finetune.schedule=onecycle",
    ]
    words = [word for change in changes for word in ("--set", change)]
    done = haloc("run", DIGITS, "--out", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "out/log.txt").read_text()
    for line in ("search epoch 2", "fine-tuning epoch 2", "INFO plan: ", "INFO compressed: "):
        assert log.count(line) == 1, log
    assert (
        "search: 2 epochs of 17 iterations, 34 in all" in log
    )  # as many as one process has with batches of 64
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["stages"]["finetune"]
    assert metrics["top1"] > 0.9
    network = nni_haloc.load(tmp_path / "out")
    assert count_macs(network, torch.zeros(1, 1, 8, 8)) == metrics["macs"]
    assert len(history.read(tmp_path / "out/search/history.csv")["iteration"]) == 34
    again = haloc("run", DIGITS, "--out", tmp_path / "out", "--resume", *words)
    assert "fine-tuning: 2 of 2 epochs are done" in again.stderr
    stages = json.loads((tmp_path / "out/metrics.json").read_text())["stages"]
    assert stages["finetune"]["top1"] == metrics["top1"]
    other = haloc("run", DIGITS, "--out", tmp_path / "out", "--resume", *words[2:])
    assert (other.returncode, "made with other settings" in other.stderr) == (2, True)


ALONE = """
import nni_haloc, torch
from torch.utils.data import DataLoader
def attempt(make):
    try:
        make({"devices": 2, "accelerator": "cpu"})
    except ValueError as error:
        print(error)
loader = DataLoader([(torch.zeros(3), 0)])
recipe = nni_haloc.Recipe(1)
attempt(lambda options: nni_haloc.finetune(torch.nn.Linear(3, 2), loader, recipe, **options))
attempt(lambda options: nni_haloc.Classification(loader, loader, recipe, **options))
from nni_haloc.cli.main import main
import sys
sys.argv[1:] = ["run", RUN, "--set", "trainer.devices=2"]
main()
"""


@pytest.mark.parametrize(("arguments", "found"), [(["-c"], "python -c"), (["-"], "standard input")])
def test_a_program_in_no_file_can_not_be_run_twice_and_is_refused_at_once(
    tmp_path, arguments, found
):
    """Lightning would start `python -c` without the program.

    The first process would wait for the second.
    """
    program = ALONE.replace("RUN", repr(str(DIGITS)))
    command = [
        sys.executable,
        "-W",
        "ignore",
        *arguments,
        *([program] if "-c" in arguments else []),
    ]
    done = subprocess.run(
        command, input=program, capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    line = (
        f"devices: 2 processes can only be started from a script or python -m MODULE, found {found}"
    )
    assert (done.returncode, done.stdout.splitlines()) == (2, [line, line]), done.stderr
    assert done.stderr.splitlines()[-1] == f"haloc: trainer: {line}"
    assert "Traceback" not in done.stderr


def test_the_second_process_and_a_script_are_not_refused(monkeypatch):
    trainer = SimpleNamespace(num_devices=2, strategy=SimpleNamespace(launcher=object()))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [__file__])
    check_startable(trainer)
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(ValueError, match="python -c"):
        check_startable(trainer)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_startable(trainer)


def latency_config():
    changes = {"cost.metric": "latency_ms", "trainer.devices": 2}
    return load_config(DIGITS, changes), build_model("digits_cnn"), torch.zeros(1, 1, 8, 8)


def test_the_others_read_what_the_first_measured(tmp_path, monkeypatch):
    config, model, image = latency_config()
    counts = mac_table(model, image)
    CostTable("latency_ms", counts.costs, counts.fixed).save(tmp_path / "costs.json")
    before = (tmp_path / "costs.json").read_bytes()
    monkeypatch.setenv("LOCAL_RANK", "1")
    (limit,) = limits_of(config, model, image, allowed_ranks_of(config), RunFolder(tmp_path))
    assert limit.costs.costs == counts.costs
    assert (tmp_path / "costs.json").read_bytes() == before


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "SLURM_NTASKS"])
def test_a_schedulers_own_numbers_do_not_make_a_second_process(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert is_first()
    assert not start_together()


def test_processes_that_start_together_need_a_table(tmp_path, monkeypatch):
    config, model, image = latency_config()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(
        HalocError,
        match=r"cost.table: several processes need a measured table: make one with haloc measure",
    ):
        limits_of(config, model, image, allowed_ranks_of(config), RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("variable", "value", "status", "line"),
    [
        ("NNI_HALOC_PARAMETERS", '{"search.lrr": 1}', 2, "search.lrr: unknown key"),
        ("TORCHELASTIC_RUN_ID", "x", 1, "expected no torchrun"),
    ],
)
def test_one_process_of_a_trial_asks_for_parameters(tmp_path, variable, value, status, line):
    """The manager answers once: the others would wait for ever.

    They are handed what the first was given.
    """
    environment = {"NNI_OUTPUT_DIR": str(tmp_path), variable: value}
    done = commands.haloc(DIGITS, module="nni_haloc.trial", environment=environment)
    assert (done.returncode, line in done.stderr) == (status, True), done.stderr
