"""A run's settings: every mistake is one line that names the file and the key."""

import math
import re

import pytest
import torch
import yaml
from helpers.paths import DIGITS, ROOT

from nni_haloc.inputs.config import Config, dump_config, load_config, parse_config
from nni_haloc.runs.stages.training import recipe_of
from nni_haloc.utils.errors import HalocError, SettingsError

GOOD = {
    "model": {"name": "digits_cnn"},
    "weights": "w.pt",
    "data": {"name": "digits"},
    "budget": {"fraction": 0.3},
}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "w.pt").touch()

    def write(content):
        path = tmp_path / "run.yml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def merged(dotted, value):
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    *sections, key = dotted.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[key] = value
    return content


def test_defaults_are_filled_in_and_paths_are_relative_to_the_file(write, tmp_path):
    config = load_config(write(GOOD))
    assert isinstance(config, Config)
    assert config.weights == str(tmp_path / "w.pt")
    assert (config.search.objective, config.rank_space.dense, config.finetune.schedule) == (
        "settle",
        True,
        "step",
    )
    assert config.budget.of(200.0) == 60.0
    assert config.rule == "sensitivity-knapsack"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (merged("serch", {}), "serch: unknown key"),
        (merged("search.lrr", 0.1), "search.lrr: unknown key"),
        (merged("search.epochs", "ten"), "search.epochs: .*valid number, found 'ten'"),
        (merged("search.epochs", 0), "search.epochs: .*greater than 0, found 0"),
        (
            merged("rank_space.step", "papper"),
            "rank_space.step: expected a positive integer, 'auto' or 'paper', found 'papper'",
        ),
        (merged("search.lam", -1), "search.lam: .*found -1"),
        (merged("search.lr", float("nan")), "search.lr: .*found nan"),
        (
            merged("search.objective", "other"),
            "search.objective: .*'settle' or 'paper', found 'other'",
        ),
        (merged("rank_space.kinds", ["convs"]), "rank_space.kinds.0: .*found 'convs'"),
        (merged("rank_space", "space.yml"), "rank_space: .*space.yml: no such file"),
        (merged("rank_space", None), "rank_space: .*found None"),
        (merged("budget", {}), "budget: expected either 'fraction' or 'absolute'"),
        (merged("budget.absolute", 5.0), "budget: expected either"),
        (merged("budget.fraction", 1.5), "budget.fraction: .*found 1.5"),
        (merged("budget.fraction", True), "budget.fraction: .*found True"),
        (
            merged("budget.also", [{"metric": "params"}]),
            "budget.also.0: expected either 'fraction' or 'absolute'",
        ),
        (merged("budget.also", [{"fraction": 0.5}]), "budget.also.0.metric: missing"),
        (
            merged("budget.also", [{"metric": "joules", "fraction": 0.5}]),
            "budget.also.0.metric: .*found 'joules'",
        ),
        (merged("budget.also", {"metric": "params"}), "budget.also: .*found dict"),
        (
            merged("rank_space.pin", {"a": "thick"}),
            r"rank_space.pin.a: expected a rank, \[r1, r2\] or 'dense', found 'thick'",
        ),
        (merged("rank_space.pin", {"a": [4, 0]}), "rank_space.pin.a: expected a rank"),
        (merged("rank_space.pin", ["a"]), "rank_space.pin: .*found list"),
        (
            merged("search.alpha_optimizer", "lion"),
            "search.alpha_optimizer: .*'adam' or 'sgd', found 'lion'",
        ),
        (merged("search.min_use", 1.5), "search.min_use: .*found 1.5"),
        (merged("weights", "none.pt"), "weights: no such file or folder: .*none.pt"),
        (merged("data", {"name": "folder", "size": 3}), "data: root: data 'folder' needs a folder"),
        (merged("data", {"name": "folder", "root": "."}), "data: size"),
        (merged("data.name", "mnist"), "data.name: .*found 'mnist'"),
        (
            merged("data.in_memory", "gpu"),
            "data.in_memory: expected false, true or 'device', found 'gpu'",
        ),
        (merged("data.in_memory", 1), "data.in_memory: expected false, true or 'device', found 1"),
        (
            merged("data", {"name": "digits", "in_memory": "device", "workers": 4}),
            "data: workers: expected 0 .*found 4; set workers: 0, or in_memory: true",
        ),
        (
            merged("search", {"epochs": 2, "warmup_epochs": 2}),
            "search.warmup_epochs: must be below search.epochs .2.",
        ),
        (merged("seed", -1), "seed: .*found -1"),
        (merged("preset", "fast"), "preset: .*found 'fast'"),
        (
            {k: v for k, v in GOOD.items() if k != "model"},
            "model: missing; haloc settings model explains it",
        ),
        (
            merged("prune", {"sparsity": 30}),
            "prune.sparsity: input should be less than 1, found 30; write 0.3 for 30 %",
        ),
        ("- a\n- b\n", "expected keys and values, found list"),
        ("a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("", "expected keys and values, found nothing"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(write, content, message):
    with pytest.raises(HalocError, match=message) as error:
        load_config(write(content))
    assert "run.yml" in str(error.value) or "space.yml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(HalocError, match=r"none\.yml: no such file$"):
        load_config(tmp_path / "none.yml")


def test_a_tuners_parameters_are_dotted_keys(write):
    config = load_config(
        write(GOOD), {"budget.absolute": 5e6, "search.lam": 0.5, "rank_space.dense": False}
    )
    assert (
        config.budget.absolute,
        config.budget.fraction,
        config.search.lam,
        config.rank_space.dense,
    ) == (5e6, None, 0.5, False)
    with pytest.raises(HalocError, match="search.lambda: unknown key"):
        load_config(write(GOOD), {"search.lambda": 0.5})
    with pytest.raises(HalocError, match="'weights' is not a section"):
        load_config(write(GOOD), {"weights.x": 1})


def test_a_tuner_may_change_one_budget_of_several(write):
    also = [{"metric": "params", "fraction": 0.4}, {"metric": "latency_ms", "absolute": 2.5}]
    config = load_config(write(merged("budget.also", also)), {"budget.absolute": 5e6})
    assert (config.budget.absolute, config.budget.fraction) == (5e6, None)
    assert [(limit.metric, limit.of(100.0)) for limit in config.budget.also] == [
        ("params", 40.0),
        ("latency_ms", 2.5),
    ]


def test_pinned_ranks_are_numbers_pairs_or_dense(write):
    config = load_config(
        write(merged("rank_space.pin", {"layer1.*": 16, "conv1": "dense", "fc": [8, 4]}))
    )
    assert config.rank_space.pin == {"layer1.*": 16, "conv1": "dense", "fc": (8, 4)}


def test_the_rank_space_may_have_a_file_of_its_own(write, tmp_path):
    (tmp_path / "space.yml").write_text("step: 4\nexclude: [stem]\n")
    config = load_config(write(merged("rank_space", "space.yml")), {"rank_space.dense": False})
    assert (config.rank_space.step, config.rank_space.exclude, config.rank_space.dense) == (
        4,
        ["stem"],
        False,
    )


def test_the_papers_preset_is_the_paper_and_nothing_else(write):
    config = load_config(write(merged("preset", "paper")))
    assert (config.rank_space.dense, config.rank_space.equal, config.rank_space.decomposition) == (
        False,
        True,
        "hosvd",
    )
    assert config.search.clip is None
    assert (config.search.objective, config.search.select) == ("paper", "argmax")
    assert config.rule == "search"
    assert load_config(write({**merged("preset", "paper"), "rule": "uniform"})).rule == "uniform"
    assert (config.search.start, config.search.alpha_every, config.search.approach_share) == (
        "uniform",
        1,
        1.0,
    )
    with pytest.raises(
        HalocError, match="rank_space.dense: preset 'paper' sets it to False, found True"
    ):
        load_config(write({**merged("preset", "paper"), "rank_space": {"dense": True}}))


PAGE = ROOT / "docs" / "explanation" / "paper.md"
LINES = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", PAGE.read_text(), re.MULTILINE))


def test_every_setting_of_the_papers_preset_is_in_the_papers_table(write):
    """Line by line; what the paper does not say is in the table as ours."""
    image_net = {"name": "folder", "root": ".", "size": 224}
    space = {"kinds": ["conv"], "exclude": ["conv1"]}
    content = {**GOOD, "preset": "paper", "data": image_net, "rank_space": space}
    resolved = dump_config(load_config(write(content)))
    found = {
        f"{section}.{key}": value
        for section in ("rank_space", "search", "finetune")
        for key, value in resolved[section].items()
    }
    found |= {key: resolved[key] for key in ("rule", "recalibration_batches")}
    found["data.batch_size"] = resolved["data"]["batch_size"]
    assert {key: yaml.safe_load(value.strip("`")) for key, value in LINES.items()} == found


@pytest.mark.parametrize(
    ("data", "rate"),
    [
        ({"name": "digits"}, 0.1),
        ({"name": "cifar10", "root": "."}, 0.1),
        ({"name": "folder", "root": ".", "size": 32}, 0.1),
        ({"name": "folder", "root": ".", "size": [32, 224]}, 0.01),
    ],
)
def test_the_papers_rate_is_that_of_its_images(write, data, rate):
    content = {**merged("preset", "paper"), "data": data}
    assert load_config(write(content)).finetune.lr == rate
    changed = {"finetune.lr": 0.5, "finetune.epochs": 3, "recalibration_batches": 9}
    config = load_config(write(content), changed)
    assert (config.finetune.lr, config.finetune.epochs, config.recalibration_batches) == (0.5, 3, 9)


def test_the_papers_schedule_is_a_fifth_every_55_epochs(write):
    section = load_config(write(merged("preset", "paper"))).finetune
    recipe = recipe_of(section)
    weight = torch.nn.Parameter(torch.ones(1))
    made = recipe.optimizers([weight], steps_per_epoch=2)
    rates = []
    for _ in range(section.epochs):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        for _ in range(2):
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.1 * 0.2 ** (epoch // 55) for epoch in range(220)])


def test_numbers_may_have_exponents_without_a_point(write):
    text = "{model: {name: digits_cnn}, weights: w.pt, data: {name: digits}, "
    config = load_config(write(text + "budget: {absolute: 1e6}}"))
    assert config.budget.absolute == 1e6


def test_the_rank_spaces_file_may_be_changed(write, tmp_path):
    (tmp_path / "space.yml").write_text("step: 4\n")
    assert load_config(write(GOOD), {"rank_space": "space.yml"}).rank_space.step == 4


def test_scale_takes_its_root_of_epochs_and_images():
    run = ROOT / "examples" / "digits" / "run.yml"
    whole, small = load_config(run), load_config(run, {"scale": 0.04, "train.epochs": 100})
    assert (small.search.epochs, small.finetune.epochs, small.train.epochs) == (2, 2, 20)
    assert small.data.share == pytest.approx(0.2 * whole.data.share)
    least = load_config(run, {"scale": 1e-4, "finetune.epochs": 0, "search.warmup_epochs": 5})
    assert (least.search.epochs, least.search.warmup_epochs, least.finetune.epochs) == (1, 0, 0)
    for scale, images, left in ((0.5, 512, 256), (1e-4, 512, 64), (1e-4, 20, 20), (1.0, 512, 512)):
        changes = {"scale": scale, "rank_space": {"calibration_images": images}}
        assert load_config(run, changes).rank_space.calibration_images == left
    assert (
        parse_config(small.model_dump(mode="json"), "kept", run.parent) == small
    )  # what a run keeps is not scaled again


def test_weights_to_be_trained_need_not_be_there(write, tmp_path):
    changes = {"weights": "none.safetensors"}
    with pytest.raises(HalocError, match="weights: no such file"):
        load_config(write(GOOD), changes)
    assert load_config(write(GOOD), changes, training=True).weights == str(
        tmp_path / "none.safetensors"
    )


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (30, r"found 30; write 0\.3 for 30 %, or budget: \{absolute: 30\}, a number in the m.*"),
        (450, r"found 450; write budget: \{absolute: 450\}, a number in the metric's unit"),
        ("30%", r"found '30%'; write 0\.3"),
        ("12.5 %", r"found '12\.5 %'; write 0\.125"),
        ("half", "found 'half'"),
        (True, "found True"),
        (0, "found 0"),
        (math.nan, "found nan"),
    ],
)
@pytest.mark.parametrize("key", ["budget", "budget.fraction"])
def test_a_budget_that_is_no_fraction_is_told_what_may_be_meant(key, given, remedy):
    message = f"{key}.*: expected a fraction of the original's cost"
    with pytest.raises(SettingsError, match=f"{message}, above 0 to 1, {remedy}$"):
        load_config(DIGITS, {key: given})


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights", "none.pt"), ("finetune.epochz", 3), ("scale", 2), ("budget.fraction", 30)],
)
def test_a_change_that_is_wrong_is_told_by_the_place_that_it_comes_from(key, value):
    with pytest.raises(SettingsError, match=f"^here {key}: (?!.*run.yml)"):
        load_config(DIGITS, {"seed": 1, key: value}, places={"seed": "there", key: f"here {key}"})
