"""The page of a run: what it says, and that nothing of a run's files can harm who opens it.

A browser opens it in test_browser.py.
"""

import base64
import json
import shutil
import string
from xml.etree import ElementTree

import pytest
from helpers.pages import Page
from helpers.paths import DIGITS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nni_haloc.cli.main import main
from nni_haloc.inputs.config import load_config
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results.html_report import _name_of, _speed, html_report
from nni_haloc.results.plan_table import PlanFiles, plan_content, print_plan, timing_lines
from nni_haloc.runs.run import flatten
from nni_haloc.training.curves import EPOCH_COLUMNS, add_epoch, read

STAGES = {
    "original": {"top1": 0.8589, "macs": 41_152_260},
    "search": {"cost": 12.0, "original_cost": 100.0, "budget": 12.5},
    "finetune": {"top1": 0.8532, "macs": 12_345_678, "latency_ms": 2.125},
}


@pytest.fixture
def folder(tmp_path):
    """Of a run by a rule: neither search nor history."""
    RankPlan({"a": (8, 8), "b": None, "c": (4, 6)}, {"rule": "uniform", "budget": 12.5}).save(
        tmp_path / "ranks.json"
    )
    config = load_config(
        DIGITS,
        {
            "rule": "uniform",
            "search.clip": None,
            "rank_space.pin": {"block1.*": [2, 4]},
            "scale": 0.25,
        },
    )
    content = {
        "version": 2,
        "stages": STAGES,
        "parameters": {"rule": "uniform"},
        "config": config.model_dump(mode="json"),
        "versions": {"torch": "9.8.7"},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    costs = {
        "a": {"dense": 100.0, "r8": 25.0},
        "b": {"dense": 50.0},
        "c": {"dense": 10.0, "r4x6": 5.0},
    }
    (tmp_path / "costs.json").write_text(
        json.dumps({"version": 1, "metric": "macs", "fixed": 0, "costs": costs})
    )
    return tmp_path


@pytest.fixture
def command(monkeypatch):
    """`haloc report`, in this process: another takes seconds to import torch."""

    def report(*arguments):
        monkeypatch.setattr("sys.argv", ["haloc", "report", *map(str, arguments)])
        main()

    return report


def test_a_page_says_what_the_folder_holds_and_leaves_out_the_rest(folder):
    page = Page(html_report(folder))
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["original"] == ["85.89 %", "41,152,260"]  # nothing is invented for its latency
    assert rows["compressed"] == ["85.32 %", "2.125", "12,345,678"]
    assert (
        not {"pruned", "quantized (simulated)", "float32 in ONNX Runtime", "int8 in ONNX Runtime"}
        & rows.keys()
    )
    dearer = "the cheapest: dense takes {} more of the network's cost"
    assert rows["a"] == ["8", "2", "100", "25", "25.0 %", dearer.format("46.9 %")]
    assert rows["b"] == ["dense", "1", "50", "50", "100.0 %", "dense: every low rank is dearer"]
    assert rows["c"] == ["4 x 6", "2", "10", "5", "50.0 %", dearer.format("3.1 %")]
    assert all(text in page.text for text in ("digits_cnn", "9.8.7", "uniform", "12.5", "0.8532"))
    assert page.tags.count("img") == 1  # the ranks
    assert not any(text in page.text for text in ("Curves", "Side by side", "top-1, pruned"))
    assert "haloc front" not in page.text


def test_a_tightened_plan_and_a_missed_budget_are_told(folder, capsys):
    timed = {"measured_share": 0.495, "of_budget": 0.99, "table_factor": 1.446}
    facts = {"rule": "uniform", "timed": timed}
    plan = RankPlan({"a": (8, 8), "b": None, "c": (4, 6)}, facts)
    plan.save(folder / "ranks.json")
    content = json.loads((folder / "metrics.json").read_text())
    content["stages"]["finetune"] |= {"latency_ms_of_budget": 1.071, "budget_met": 0.0}
    (folder / "metrics.json").write_text(json.dumps(content))
    said = [
        "timed as a whole, before training: 49.5 % of the original's latency, 99.0 % of the budget",
        "tightened: low ranks take 1.45 times what the table says, so by the table a part of the "
        "budget is left",
    ]
    page = Page(html_report(folder)).text
    assert all(line in page for line in said)
    missed = "Doubtful: the network takes 107.1 % of its budget of latency_ms, measured at the end"
    assert missed in page
    files = PlanFiles.read(folder)
    print_plan(files)
    assert capsys.readouterr().out.splitlines()[-3:-1] == said
    assert plan_content(files)["timed"] == timed


def test_a_plan_that_was_not_tightened_says_nothing_of_it(folder):
    page = Page(html_report(folder)).text
    assert "tightened" not in page
    assert "timed as a whole" not in page
    assert timing_lines(RankPlan({}, {"timed": {"table_factor": 1.0}})) == []
    (enlarged,) = timing_lines(RankPlan({}, {"timed": {"table_factor": 0.8}}))
    assert enlarged.startswith("enlarged: low ranks take 0.8 times what the table says")
    assert timing_lines(RankPlan({}, {"timed": "odd"})) == []


def test_the_original_is_counted_back_from_what_version_1_says_was_reduced(folder):
    flat = {
        "default": 0.9,
        "macs": 443008,
        "macs_reduction": 1 - 443008 / 1493632,
        "params": 5,
        "params_reduction": 1.0,
    }
    rewrite(folder / "metrics.json", flat)
    rows = {row[0]: row[1:] for row in Page(html_report(folder)).rows}
    assert rows["original"] == ["1,493,632"]
    assert rows["compressed"] == ["90.00 %", "443,008", "5"]


def test_the_settings_repeat_the_run(folder, tmp_path):
    """`scale` is already in the numbers of epochs and images: taken again, they would be fewer."""
    page = Page(html_report(folder))
    (download,) = [
        address for address in page.addresses if address.startswith("data:application/yaml;base64,")
    ]
    (tmp_path / "run.yml").write_bytes(base64.b64decode(download.partition(",")[2]))
    ran = load_config(
        DIGITS,
        {
            "rule": "uniform",
            "search.clip": None,
            "rank_space.pin": {"block1.*": [2, 4]},
            "scale": 0.25,
        },
    )
    assert ran.search.epochs == 5
    assert load_config(tmp_path / "run.yml") == ran.model_copy(update={"scale": 1.0})


FLAT = {
    "default": 0.81, "baseline_top1": 0.9, "latency_ms": 2.0, "baseline_latency_ms": 3.0,
    "speedup": 1.5, "images_per_s": 64000.0, "macs": 50, "macs_reduction": 0.5,
    "params": 30, "params_reduction": 0.7, "haloc_top1": 0.89, "haloc_bytes": 4000,
    "pruned_top1": 0.84, "pruned_macs": 20, "pruned_params": 10, "pruned_latency_ms": 1.5,
    "pruned_bytes": 2500, "quantized_top1": 0.83, "int8_top1": 0.81, "onnx_latency_ms": 0.75,
    "int8_latency_ms": 0.25, "int8_bytes": 1200,
}  # fmt: skip
"""What a run with `prune` and `quantize` left in version 1 of ``metrics.json``."""
CHAIN = {
    "original": {"top1": 0.9, "macs": 100, "params": 100, "latency_ms": 3.0},
    "search": {"cost": 40.0, "original_cost": 100.0, "budget": 50.0},
    "finetune": {"top1": 0.89, "macs": 50, "params": 30, "latency_ms": 2.0, "bytes": 4000},
    "prune": {"top1": 0.84, "macs": 20, "params": 10, "latency_ms": 1.5, "bytes": 2500},
    "quantize": {"top1": 0.83, "int8_top1": 0.81, "onnx_latency_ms": 0.75,
                 "int8_latency_ms": 0.25, "int8_bytes": 1200, "bytes": 2500},
}  # fmt: skip
"""What such a run leaves today."""
ROWS = {
    "network": ["top-1", "latency, ms", "MACs", "parameters", "file of weights"],
    "original": ["90.00 %", "3", "100", "100"],
    "compressed": ["89.00 %", "2", "50", "30", "4.0 kB"],
    "pruned": ["84.00 %", "1.5", "20", "10", "2.5 kB"],
    "quantized (simulated)": ["83.00 %"],
    "float32 in ONNX Runtime": ["0.75"],
    "int8 in ONNX Runtime": ["81.00 %", "0.25", "1.2 kB"],
}


def rewrite(path, figures):
    """Put other figures into ``metrics.json``: flat ones in version 1, by stage in version 2."""
    path.parent.mkdir(exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    for key in ("version", "stages", "metrics"):
        content.pop(key, None)
    nested = any(isinstance(value, dict) for value in figures.values())
    facts = {"version": 2, "stages": figures} if nested else {"metrics": figures}
    path.write_text(json.dumps({**content, **facts}))


def shown(folder):
    """Return the rows of the page that are networks: title to cells."""
    return {row[0]: row[1:] for row in Page(html_report(folder)).rows if row[0] in ROWS}


@pytest.mark.parametrize("figures", [CHAIN, FLAT], ids=["today", "version 1"])
def test_each_stage_of_a_chain_is_a_row(folder, figures):
    """In version 1 ``default`` is the last stage's top-1, and not the compressed network's."""
    rewrite(folder / "metrics.json", figures)
    page = Page(html_report(folder))
    assert shown(folder) == ROWS
    assert (
        "Latency is that of a batch of 128, in torch unless a row names another runtime."
        in page.text
    )
    assert "top-1 89.00 % original 90.00 % latency 2 ms 1.50 times as fast" in page.text
    assert "top-1, pruned 84.00 % 1.5 ms top-1, int8 81.00 % 0.25 ms in ONNX Runtime" in page.text


OF = {
    "pruned": {key: value for key, value in FLAT.items() if key.startswith("pruned_")},
    "quantized": {
        key: value
        for key, value in FLAT.items()
        if key.startswith(("quantized_", "onnx_", "int8_"))
    },
}
"""What the stages' commands left in folders of their own in version 1."""


def own_folder(path, figures):
    """Make a stage's own folder."""
    rewrite(path / "metrics.json", figures)
    RankPlan({"a": (8, 8)}).save(path / "ranks.json")
    (path / "weights.safetensors").write_bytes(bytes(2500))


def test_stages_made_by_commands_of_their_own_are_the_same_rows(folder):
    """After `haloc prune` and `haloc quantize` the run's metrics do not name them."""
    run = {name: CHAIN[name] for name in ("original", "search", "finetune")}
    rewrite(folder / "metrics.json", run)
    own_folder(folder / "quantized", {"quantize": CHAIN["quantize"]})
    own_folder(folder / "pruned", {"prune": CHAIN["prune"]})
    assert shown(folder) == ROWS
    assert list(shown(folder)) == list(ROWS)  # in the order of the pipeline


def test_stages_of_commands_of_version_1_are_the_same_rows(folder):
    """The run's ``default`` is the compressed network's top-1 then, and it has no size of files."""
    own = {key for figures in OF.values() for key in figures} | {"haloc_top1", "haloc_bytes"}
    run = {key: value for key, value in FLAT.items() if key not in own}
    rewrite(folder / "metrics.json", {**run, "default": 0.89})
    (folder / "weights.safetensors").write_bytes(bytes(4000))
    own_folder(folder / "pruned", {"default": 0.84, **OF["pruned"]})
    own_folder(folder / "quantized", {"default": 0.81, **OF["quantized"]})
    assert shown(folder) == ROWS


@pytest.mark.parametrize("figures", [{"prune": CHAIN["prune"]}, {"default": 0.84, **OF["pruned"]}])
def test_the_page_of_a_stages_own_folder_has_its_row_and_no_other(folder, figures):
    rewrite(folder / "metrics.json", figures)
    (folder / "weights.safetensors").write_bytes(bytes(2500))
    rows = shown(folder)
    assert rows["pruned"] == ROWS["pruned"]
    assert not {"original", "compressed"} & rows.keys()
    assert "top-1, pruned 84.00 % 1.5 ms" in Page(html_report(folder)).text


def test_a_setting_of_several_keys_on_the_command_line_is_shown(folder):
    content = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(
        json.dumps({**content, "parameters": {"prune": {"sparsity": 0.375}}})
    )
    assert "{'sparsity': 0.375}" in Page(html_report(folder)).text


BENCH = {
    "version": 1,
    "torch": {"runtime": "torch 9.8", "device": "a processor", "threads": 1},
    "onnxruntime": None, "split": "val", "rounds": 7,
    "rows": [
        {"stage": "pruned", "runtime": "torch", "precision": "float32", "file_bytes": 29000,
         "macs": 2_500_000, "params": 6323, "top1": 0.9, "batch_size": 32, "latency_ms": 3.5,
         "spread_ms": 1.75, "images_per_s": 9142.9},
        {"stage": "pruned", "runtime": "onnxruntime", "precision": "int8", "batch_size": 32,
         "reason": "<b>none</b>"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("speedup", "words"),
    [(1.5, "1.50 times as fast"), (1.0, "1.00 times as fast"), (1 / 1.027, "2.7 % slower")],
)
def test_a_network_that_is_slower_is_called_slower(speedup, words):
    assert _speed(speedup) == words


def test_every_figure_that_is_reported_has_a_name_for_people():
    reported = flatten(CHAIN | {"original": CHAIN["original"] | {"images": 360, "chance": 0.1}})
    assert [key for key in reported if "_" in _name_of(key)] == []


def test_the_table_of_bench_is_on_the_page(folder):
    (folder / "bench.json").write_text(json.dumps(BENCH))
    page = Page(html_report(folder))
    assert [row[1:] for row in page.rows if row[0] == "pruned"] == [
        ["torch", "float32", "32", "3.5", "1.8", "9,143", "29", "2.5 M", "6,323", "90.00 %"],
        ["onnxruntime", "int8", "32", "<b>none</b>"],
    ]
    assert all(
        text in page.text
        for text in (
            "images/s",
            "top-1 (val)",
            "the median of 7 medians",
            "a processor, torch 9.8, threads: 1",
        )
    )


def test_curves_of_a_search_and_of_every_training_are_drawn(folder):
    (folder / "search").mkdir()
    (folder / "search" / "history.csv").write_text(
        "iteration,train_loss,approach_loss,expected_cost,expected_params\n0,1,1,1,1\n1,0.5,1,1,1\n"
    )
    for stage in ("finetuning", "pruned", "quantized"):
        for epoch in range(3):
            add_epoch(folder / stage / "history.csv", epoch, 1.0 - epoch / 4, 0.5)
    page = html_report(folder)
    texts = Page(page).texts
    assert Page(page).tags.count("img") == 6
    trainings = ("Fine-tuning", "Fine-tuning of the pruned network", "Quantization-aware training")
    assert all(
        f"{training}: loss, and top-1 on validation images" in texts for training in trainings
    )
    assert f"haloc front {folder} --budgets" in page
    assert page == html_report(folder)  # not of the time it is made at


def test_an_epoch_that_is_done_again_replaces_the_rows_from_there(tmp_path):
    file = tmp_path / "finetuning" / "history.csv"
    for epoch, top1 in ((0, 0.1), (1, 0.2), (2, 0.3), (2, 0.4), (3, 0.5)):
        add_epoch(file, epoch, 1.0, top1)
    assert read(file, EPOCH_COLUMNS)["val_top1"] == [0.1, 0.2, 0.4, 0.5]
    add_epoch(file, 0, 1.0, 0.9)
    assert read(file, EPOCH_COLUMNS)["val_top1"] == [0.9]
    file.write_text("damaged")
    add_epoch(file, 1, 1.0, 0.8)
    assert read(file, EPOCH_COLUMNS)["epoch"] == [1.0]


def test_a_trials_folder_has_the_runs_in_it(folder, tmp_path, command, capsys):
    trial = tmp_path / "TRIAL"
    shutil.copytree(folder, trial / "haloc", ignore=shutil.ignore_patterns("TRIAL"))
    assert "85.32 %" in html_report(trial)
    command(trial)
    assert capsys.readouterr().out == f"{trial / 'report.html'}\n"
    assert (trial / "report.html").read_text() == html_report(trial)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ranks.json", None, "ranks.json: no such file; expected the folder of a finished run"),
        ("ranks.json", "{", "ranks.json: not a JSON file"),
        (
            "ranks.json",
            f'{{"version": 1, "ranks": {{"a": [{10**400}]}}}}',
            "numbers too large to draw",
        ),
        ("metrics.json", "[" * 10**5, "metrics.json: not a JSON file"),
        ("metrics.json", "[]", "metrics.json: expected keys and values, found list"),
        (
            "metrics.json",
            '{"config": 3}',
            "metrics.json: config: expected keys and values, found int",
        ),
        (
            "metrics.json",
            '{"version": 2, "stages": {"prune": 1}}',
            "metrics.json: prune: expected figures, found int",
        ),
        (
            "metrics.json",
            '{"version": 3, "stages": {}}',
            "metrics.json: expected metrics of version 2, found 3",
        ),
        ("costs.json", "{}", "costs.json: expected a cost table"),
        ("search/history.csv", "a,b\n", "search/history.csv: expected the columns"),
        ("pruned/metrics.json", "[]", "pruned/metrics.json: expected keys and values, found list"),
        ("pruned/history.csv", "a,b\n", "pruned/history.csv: expected the columns"),
        ("bench.json", "{", "bench.json: not a JSON file"),
        (
            "bench.json",
            '{"version": 2}',
            "bench.json: expected a bench of version 1, found version 2",
        ),
        (
            "bench.json",
            '{"version": 1, "rows": []}',
            "bench.json: expected what haloc bench writes",
        ),
        (
            "bench.json",
            json.dumps(BENCH | {"rows": 3}),
            "bench.json: expected what haloc bench writes",
        ),
        (
            "bench.json",
            json.dumps(BENCH | {"rows": [{"latency_ms": "x"}]}),
            "bench.json: expected what haloc bench writes",
        ),
        (
            "bench.json",
            json.dumps(BENCH | {"rows": [{"macs": 10**400}]}),
            "bench.json: expected what haloc bench writes",
        ),
    ],
)
def test_a_damaged_file_is_named_on_one_line(folder, file, content, message):
    path = folder / file
    if path.parent != folder:
        own_folder(path.parent, {"prune": CHAIN["prune"]})
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as found:
        html_report(folder)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_page_that_cannot_be_written_is_one_line(folder, command, capsys):
    with pytest.raises(SystemExit) as found:
        command(folder, "--out", folder / "ranks.json" / "x.html")
    assert found.value.code == 2
    errors = capsys.readouterr().err
    assert "x.html: expected a file that can be written" in errors
    assert errors.count("\n") == 1


TEXT = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            '"><img src=x onerror=alert(1)>',
            "$\\frac$",
            "x" * 3000,
            "\x00",
        ]
    ),
    st.text(string.printable, max_size=30),
)
PLAIN = st.one_of(
    TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2)
)


FIGURES = st.sampled_from(sorted({key for figures in CHAIN.values() for key in figures}))


def test_a_layer_of_any_name_is_drawn(tmp_path):
    """``$`` begins a formula in figures, a control character ends an SVG file."""
    names = [
        "<script>alert(1)</script>",
        "$\\frac$",
        "$x",
        "a$",
        "x" * 3000,
        "x" * 2999 + "y",
        "\x00",
        "名",
        "-->",
    ]
    (tmp_path / "ranks.json").write_text(
        json.dumps({"version": 1, "ranks": {name: [4] for name in names}})
    )
    (address,) = [
        address
        for address in Page(html_report(tmp_path)).addresses
        if address.startswith("data:image/svg+xml;base64,")
    ]
    image = base64.b64decode(address.partition(",")[2])
    ElementTree.fromstring(image)
    assert sum(b"<script" in line for line in image.splitlines()) == 0
    assert len(image) < 300_000


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.dictionaries(
        TEXT, st.one_of(st.none(), st.tuples(st.integers(1, 10**6))), max_size=4
    ),
    facts=st.dictionaries(TEXT, PLAIN, max_size=3),
    metrics=st.dictionaries(st.one_of(TEXT, st.sampled_from(sorted(FLAT))), PLAIN, max_size=4),
    stages=st.dictionaries(
        st.one_of(TEXT, st.sampled_from(sorted(CHAIN))),
        st.dictionaries(st.one_of(TEXT, FIGURES), PLAIN, max_size=4),
        max_size=3,
    ),
    version=st.sampled_from([1, 2]),
    config=st.dictionaries(TEXT, PLAIN, max_size=3),
)
def test_names_and_values_of_files_are_text_whatever_they_are(
    tmp_path, layers, facts, metrics, stages, version, config
):
    known = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "ul",
        "li", "span", "strong", "section", "div", "table", "thead", "tbody", "tr", "th", "td",
        "dl", "dt", "dd", "figure", "img", "figcaption", "pre", "code", "a",
    }  # fmt: skip
    (tmp_path / "ranks.json").write_text(
        json.dumps(
            {
                "version": 1,
                "ranks": {k: "dense" if v is None else list(v) for k, v in layers.items()},
                "chosen_by": facts,
            }
        )
    )
    content = {"config": config, "parameters": metrics, "versions": facts}
    content |= {"metrics": metrics} if version == 1 else {"version": 2, "stages": stages}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:  # drawing is slow, and tested above
        patch.setattr(
            "nni_haloc.results.html_report._drawn",
            lambda plan, folder: {"ranks": ("", "data:image/svg+xml;base64,")},
        )
        page = html_report(tmp_path)
    page.encode()
    parsed = Page(page)
    assert set(parsed.tags) <= known
    assert all(address.startswith("data:") for address in parsed.addresses)
