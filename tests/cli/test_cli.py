"""The command line as a user meets it: exit status, one line, no traceback."""

import json
import re

import pytest
import torch
from helpers.commands import haloc
from helpers.paths import DIGITS

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", DIGITS, "--set", "search.lrr=1"], "haloc: .*search.lrr: unknown key"),
        (["run", DIGITS, "--set", "search.lr"], "--set: expected KEY=VALUE"),
        (["run", "none.yml"], "haloc: none.yml: no such file"),
        (["check", "none.yml"], "haloc: none.yml: no such file"),
        (
            ["results", "abc123", "--folder", "/nowhere"],
            "haloc: experiment 'abc123': no such experiment in /nowhere",
        ),
        (["search", DIGITS, "--set", "search.lrr=1"], "haloc: .*search.lrr: unknown key"),
        (
            ["front", "none", "--budgets", "0.5"],
            "haloc: none: no such folder; expected the folder of a search",
        ),
        (
            ["front", "none", "--budgets", "half"],
            "haloc: --budgets: expected fractions separated by commas, found 'half'",
        ),
        (
            ["throughput", DIGITS, "--on", "torch,tpu"],
            "haloc: --on: expected some of torch, torch-compile, onnxruntime, openvino, "
            "executorch, tensorrt, eyeriss, cuda, found 'tpu'",
        ),
        (
            ["run", DIGITS, "--set", "cost.device=tpu"],
            "haloc: cost: device 'tpu', dtype 'float32': torch cannot use it here",
        ),
        (["frobnicate"], "No such command"),
        (
            ["run", DIGITS, "--out", DIGITS],
            "haloc: .*run.yml: expected a folder that can be written to, found: a file",
        ),
        (
            ["run", DIGITS, "--set", "data.mean=[0.1, 0.2]", "--set", "data.std=[1.0]"],
            "haloc: .*std: expected as many numbers as mean",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message, tmp_path):
    done = haloc(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
    if done.stderr.startswith("haloc"):
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["check", "none.yml"], ["run", DIGITS, "--set", "search.lrr=1"]]
)
def test_a_process_of_its_own_prints_what_a_forked_one_does(arguments):
    """Importing everything, and Python's end, print nothing; most tests fork their commands."""
    alone, forked = (haloc(*arguments, fresh=fresh) for fresh in (True, False))
    for name in ("returncode", "stdout", "stderr"):
        assert getattr(alone, name) == getattr(forked, name)


def test_an_impossible_budget_names_the_cheapest_network_and_leaves_no_plan(tmp_path):
    done = haloc("run", DIGITS, "--out", tmp_path, "--set", "budget.fraction=0.01", fresh=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = "14.9 k MACs is below the cheapest network, 84.9 k MACs, 0.0568 of the original's"
    assert (
        f"haloc: --set budget.fraction: {message}; set 0.057 or more"
        in done.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "ranks.json").exists()


def test_an_impossible_latency_budget_says_how_the_measured_costs_are_used_again(tmp_path):
    settings = ["cost.metric=latency_ms", "cost.memory_format=contiguous", "rank_space.step=16"]
    options = [word for text in settings for word in ("--set", text)]
    done = haloc("run", DIGITS, "--out", tmp_path, *options, "--budget", "0.001")
    table = tmp_path / "costs.json"
    end = f"; the costs are kept: --set cost.table={table} reads them"
    assert done.stderr.splitlines()[-1].endswith(end)
    assert CostTable.load(table).metric == "latency_ms"


def test_a_pattern_of_the_command_line_that_fits_no_layer_names_its_option(tmp_path):
    done = haloc("run", DIGITS, "--out", tmp_path, "--set", "rank_space.exclude=[nothere]")
    start = "haloc: --set rank_space.exclude: no layer of DigitsCNN matches 'nothere'; expected"
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith(start)
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(f" ERROR {line.removeprefix('haloc: ')}")


def test_a_search_of_a_model_that_does_not_take_the_images_is_one_line(tmp_path):
    torch.save(build_model("resnet20").state_dict(), tmp_path / "weights.pt")
    done = haloc(
        "search",
        DIGITS,
        "--out",
        tmp_path,
        "--set",
        "model.name=resnet20",
        "--set",
        f"weights={tmp_path / 'weights.pt'}",
    )
    assert done.returncode == 2
    assert (
        "haloc: model: expected a network for the data's images, 1x8x8 (channels, height, width), "
        "found resnet20, which fails on them (" in done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stderr


def test_a_search_needs_no_rule_in_the_file_and_a_run_by_the_default_rule_does_not_replace_it(
    tmp_path,
):
    settings = DIGITS.read_text().replace("rule: search\n", "")
    weights = str(DIGITS.with_name("digits.safetensors"))
    (tmp_path / "run.yml").write_text(settings.replace("digits.safetensors", weights))
    short = ["--out", tmp_path / "out", "--set", "search.epochs=1"]
    done = haloc("search", tmp_path / "run.yml", *short)
    assert done.returncode == 0, done.stderr
    assert "--rule search" in done.stdout
    plan = (tmp_path / "out" / "ranks.json").read_bytes()
    done = haloc("run", tmp_path / "run.yml", *short, "--resume")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    last = done.stderr.splitlines()[-1]
    assert "holds a search, and the rule is 'sensitivity-knapsack'; go on with 'rule: s" in last
    assert (tmp_path / "out" / "ranks.json").read_bytes() == plan


def test_settings_that_do_not_fit_lose_nothing_of_an_earlier_run(finished):
    def left():
        return {
            p: p.read_bytes()
            for p in finished.rglob("*")
            if p.is_file() and p.name not in ("log.txt", "costs.json")
        }

    before = left()
    done = haloc(
        "run",
        DIGITS,
        "--out",
        finished,
        "--set",
        "budget.fraction=0.01",
        "--set",
        f"cost.table={finished / 'costs.json'}",
    )
    assert done.returncode == 2
    assert "below the cheapest network" in done.stderr
    assert before == left()


def test_a_trial_with_bad_settings_fails_with_the_same_line_in_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
    settings = DIGITS.read_text().replace("epochs: 10, lr:", "epochs: 10, lrr:")
    (tmp_path / "run.yml").write_text(
        settings.replace("digits.safetensors", str(DIGITS.with_name("digits.safetensors")))
    )
    done = haloc("run.yml", cwd=tmp_path, module="nni_haloc.trial", fresh=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "run.yml: search.lrr: unknown key" in (tmp_path / "haloc" / "log.txt").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    short = ["--set", "search.epochs=2", "--set", "finetune.epochs=1"]
    done = haloc("run", DIGITS, "--out", folder, *short)
    assert done.returncode == 0, done.stderr
    return folder


WRONG_OPTIONS = {
    "prune --sparsity 30": "--sparsity: input should be less than 1, found 30.0",
    "prune --pruner l3": "--pruner: ",
    "prune --epochs -1": "--epochs: ",
    "prune --set prune.lr=-1": "--set prune.lr: ",
    "prune --sparsity 0.5 --set prune.sparsity=30": "--set prune.sparsity: ",
    "quantize --quantizer int4": "--quantizer: ",
    "quantize --epochs -1": "--epochs: ",
    "bench --threads 0": "--threads: expected numbers above 0, found 0",
    "bench --batch 0": "--batch: expected numbers above 0, found [0]",
    "bench --runtimes onnx": "--runtimes: expected one of ",
    "bench --split train": "--split: expected one of ",
    "front --budgets 7": "--budgets: ",
}


@pytest.mark.parametrize("words", WRONG_OPTIONS)
def test_a_wrong_option_of_a_command_on_a_run_is_named_not_a_file(finished, words):
    command, *options = words.split()
    done = haloc(command, finished, *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"haloc: {WRONG_OPTIONS[words]}"), done.stderr


def test_a_run_leaves_its_folder(finished):
    from nni_haloc.runs.run import flatten

    assert {p.name for p in finished.iterdir()} == {
        "costs.json",
        "finetuning",
        "layers.json",
        "log.txt",
        "metrics.json",
        "model.json",
        "ranks.json",
        "search",
        "search.json",
        "weights.safetensors",
    }
    content = json.loads((finished / "metrics.json").read_text())
    stages = content["stages"]
    assert list(stages) == ["original", "search", "finetune"]
    counted = {"macs", "params", "images", "chance"}
    assert set(stages["original"]) == {"top1", "test_top1", "latency_ms", *counted}
    figures = {"macs", "params", "latency_ms", "images_per_s", "bytes"}
    assert set(stages["finetune"]) == {"top1", "test_top1", *figures}
    metrics = flatten(stages)
    assert {"default", "speedup", "macs_reduction", "params_reduction"} < set(metrics)
    assert all(
        type(v) in (int, float) for v in metrics.values()
    )  # NNI's page goes blank for good on a nested one
    assert metrics["macs_reduction"] >= 0.7
    assert metrics["default"] > 0.9
    assert content["config"]["search"]["epochs"] == 2


def test_the_folders_network_has_the_reported_accuracy(finished):
    from nni_haloc.costs.counts import count_macs
    from nni_haloc.inputs.data import digits
    from nni_haloc.runs.saved import load
    from nni_haloc.training.finetuning import accuracy

    figures = json.loads((finished / "metrics.json").read_text())["stages"]["finetune"]
    network, data = load(finished), digits()
    assert accuracy(network, data.loader("test", 64))[0] == pytest.approx(figures["test_top1"])
    assert count_macs(network, data.images("test", 1)) == figures["macs"]


def test_latency_can_be_the_budget(tmp_path):
    """With a table made before: on so small a network no rank need be faster than dense."""
    model, image = build_model("digits_cnn"), torch.randn(1, 1, 8, 8)
    counts = mac_table(model, image)
    costs = {
        layer: {name: cost / 1e6 for name, cost in row.items()}
        for layer, row in counts.costs.items()
    }
    CostTable("latency_ms", costs, counts.fixed / 1e6).save(tmp_path / "table.json")
    settings = [
        "cost.metric=latency_ms",
        f"cost.table={tmp_path / 'table.json'}",
        "search.epochs=1",
        "finetune.epochs=0",
        "budget.absolute=0.5",
    ]
    done = haloc(
        "run",
        DIGITS,
        "--out",
        tmp_path / "out",
        *(word for setting in settings for word in ("--set", setting)),
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "ranks.json").read_text())["chosen_by"]
    assert (facts["metric"], facts["budget"]) == ("latency_ms", 0.5)
    assert facts["cost"] <= 0.5


def test_a_run_may_measure_its_own_table(tmp_path):
    """It searches, or says in one line that no rank is faster; it leaves the table in any case."""
    settings = [
        "cost.metric=latency_ms",
        "cost.batch_size=16",
        "search.epochs=1",
        "finetune.epochs=0",
        "budget.fraction=1.0",
    ]
    done = haloc(
        "run",
        DIGITS,
        "--out",
        tmp_path,
        *(word for setting in settings for word in ("--set", setting)),
    )
    table = CostTable.load(tmp_path / "costs.json")
    assert table.metric == "latency_ms"
    assert table.identity["input"] == [16, 1, 8, 8]
    gains = any(cost < row["dense"] for row in table.costs.values() for cost in row.values())
    assert done.returncode == (0 if gains else 2), done.stderr
    if not gains:
        assert "haloc: nothing to search in DigitsCNN" in done.stderr.splitlines()[-1]
        assert (
            "no rank is cheaper than the dense layer in latency_ms" in done.stderr.splitlines()[-1]
        )


@pytest.mark.parametrize("accelerator", ["gpu", "abacus"])
def test_an_accelerator_that_is_not_there_loses_nothing_of_an_earlier_run(tmp_path, accelerator):
    if accelerator == "gpu" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    (tmp_path / "ranks.json").write_text("{}")
    done = haloc("search", DIGITS, "--out", tmp_path, "--set", f"trainer.accelerator={accelerator}")
    assert done.returncode == 2
    key = "trainer.accelerator"
    assert re.search(rf": (--set )?{re.escape(key)}: ", done.stderr.splitlines()[-1])
    assert (tmp_path / "ranks.json").exists()


RULE = ["--rule", "uniform", "--budget", "0.4", "--set", "finetune.epochs=0"]


def test_run_takes_a_rule_and_a_budget_and_ends_with_a_table(tmp_path):
    done = haloc("run", DIGITS, "--out", tmp_path, *RULE)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["config"]["rule"] == "uniform"
    assert content["parameters"] == {
        "rule": "uniform",
        "budget.fraction": 0.4,
        "finetune.epochs": 0,
    }
    stages = content["stages"]
    assert stages["finetune"]["macs"] <= 0.4 * stages["original"]["macs"]
    heading, top1, *_ = (line for line in done.stdout.splitlines() if line[:1] in "┃│")
    assert re.findall(r"\w+", heading) == ["original", "compressed", "change"]
    for stage in ("original", "finetune"):
        assert f"{100 * stages[stage]['top1']:.2f} %" in top1
    assert f"results: {tmp_path}" in done.stdout
    assert f"haloc report {tmp_path}" in done.stdout
    assert f"haloc bench {tmp_path}" in done.stdout
    assert "deprecated" not in done.stderr


def test_baseline_is_deprecated_and_does_the_same(tmp_path):
    done = haloc("baseline", DIGITS, *RULE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == (
        "haloc baseline is deprecated: use haloc run --rule uniform"
    )
    content = json.loads((tmp_path / "haloc-baseline-uniform" / "metrics.json").read_text())
    assert content["config"]["rule"] == "uniform"
    assert content["config"]["budget"]["fraction"] == 0.4


@pytest.mark.parametrize("command", ["run", "baseline"])
def test_a_rule_that_is_none_is_one_line_with_the_names(command):
    done = haloc(command, DIGITS, "--rule", "fair")
    assert done.returncode == 2
    assert re.fullmatch(
        r"haloc: --rule: expected one of .*uniform, energy, .*nni-random, found 'fair'\n",
        done.stderr,
    )


def test_json_is_all_that_a_run_prints(tmp_path):
    done = haloc("run", DIGITS, "--out", tmp_path, *RULE, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["folder"] == str(tmp_path)
    assert content["stages"] == json.loads((tmp_path / "metrics.json").read_text())["stages"]
    assert "original: " in done.stderr


def test_json_is_all_that_bench_prints(finished):
    done = haloc("bench", finished, "--batch", 2, "--threads", 1, "--runtimes", "torch", "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content == json.loads((finished / "bench.json").read_text())
    assert {row["stage"] for row in content["rows"]} == {"original", "compressed"}
    assert {row["runtime"] for row in content["rows"]} == {"torch"}


MODEL = ["--model", "digits_cnn", "--input", "1x8x8"]


def test_json_of_a_table_has_layers_rank_space_and_counts(tmp_path):
    (tmp_path / "ranks.json").write_text('{"version": 1, "ranks": {"block2.conv": [8, 4]}}')
    done = haloc("table", *MODEL, "--plan", tmp_path / "ranks.json", "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert [layer["layer"] for layer in content["layers"]][1] == "block2.conv"
    assert content["layers"][1]["candidates"][0] == "dense"
    assert content["rank_space"]["searched"] <= content["rank_space"]["all"]
    assert content["rank_space_3x3"]["all"] <= content["rank_space"]["all"]
    before, after = content["counts"]["original"], content["counts"][str(tmp_path / "ranks.json")]
    assert before == {"macs": 1493632, "macs_paper": 1507008, "params": 65834}
    assert all(after[key] < before[key] for key in before)


def test_json_of_measuring_says_where_the_table_is(tmp_path):
    out = tmp_path / "costs.json"
    short = ["--rounds", 1, "--min-run-time", 0.001, "--threads", 1]
    done = haloc("measure", *MODEL, *short, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    table = CostTable.load(out)
    assert (content["file"], content["metric"]) == (str(out), "latency_ms")
    assert content["original"] == pytest.approx(table.original)
    assert content["entries"] == sum(map(len, json.loads(out.read_text())["runs"].values()))
    assert content["spread"] is None  # of a single round it is unknown
