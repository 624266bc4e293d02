"""`haloc check`: what would fail in every trial is refused before anything runs, on one line.

NNI's own classes are the oracle for its own keys; each other line of the tables is a mistake that
ends a real experiment.
"""

import datetime
import importlib.metadata
import math
import re
import shutil
import sys
import textwrap

import pytest
import torch
import yaml
from helpers.commands import haloc
from helpers.paths import EXAMPLES
from nni.experiment.config import ExperimentConfig, utils
from safetensors.torch import save_file
from typer.testing import CliRunner

from nni_haloc.cli.main import app
from nni_haloc.experiments import algorithms
from nni_haloc.experiments.check import check_experiment
from nni_haloc.inputs.models import build_model
from nni_haloc.runs import job
from nni_haloc.utils.errors import HalocError

READY = "trials run run.yml, searching budget.fraction"
EXPERIMENT = yaml.safe_load((EXAMPLES / "digits" / "haloc.yml").read_text())
RUN = yaml.safe_load((EXAMPLES / "digits" / "run.yml").read_text())
MAXIMIZE = {"optimize_mode": "maximize"}
OWN = '''
    """A user's own tuners and networks."""
    from nni.tuner import Tuner
    from torch import nn

    print("a word that is nobody's business")

    class Fixed(Tuner):
        def __init__(self, budget=0.5):
            self.budget = budget
        def update_search_space(self, space):
            pass
        def generate_parameters(self, number, **others):
            return {"budget.fraction": self.budget}

    class OtherNames(Fixed):
        def generate_parameters(self, number, **others):
            return {"budget_fraction": self.budget}

    class Ends(Fixed):
        def __init__(self):
            raise SystemExit("no licence")

    class Picky(Fixed):
        def update_search_space(self, space):
            raise KeyError("depth")

    class Lazy(Fixed):
        def generate_multiple_parameters(self, numbers, **others):
            return []

    def small(classes=10):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(),
            nn.Linear(256, classes),
        )

    def three():
        return 3
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits example, with a module of the user's own beside it."""
    folder = tmp_path_factory.mktemp("code") / "digits"
    shutil.copytree(EXAMPLES / "digits", folder)
    (folder / "own_things.py").write_text(textwrap.dedent(OWN))
    sys.path.insert(0, str(folder))
    from own_things import small

    sys.path.remove(str(folder))
    save_file(small().state_dict(), folder / "small.safetensors")
    (folder / "empty.safetensors").touch()
    (folder / "table.json").write_text('{"version": 1, "metric": "macs"}')
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def experiment(folder):
    """Call with changes of an experiment's file and of its settings; a None takes a key away."""

    def make(changes=None, settings=None):
        for name, content, new in (
            ("haloc.yml", EXPERIMENT, changes or {}),
            ("run.yml", RUN, settings or {}),
        ):
            whole = {k: v for k, v in {**content, **new}.items() if k not in new or v is not None}
            (folder / name).write_text(yaml.safe_dump(whole))
        return folder / "haloc.yml"

    return make


def tuner(name, **arguments):
    return {"tuner": {"name": name, **({"classArgs": arguments} if arguments else {})}}


def own(name, **arguments):
    section = {"className": f"own_things.{name}", "codeDirectory": "."}
    return {"tuner": {**section, **({"classArgs": arguments} if arguments else {})}}


def advisor(name, **arguments):
    section = {"className": f"{algorithms.ADVISORS}.{name}", "codeDirectory": "."}
    return {"tuner": {**section, **({"classArgs": arguments} if arguments else {})}}


def space(key, kind, *values):
    return {"searchSpace": {key: {"_type": kind, "_value": list(values)}}}


def refused(file, message):
    with pytest.raises(HalocError, match=message) as error:
        check_experiment(file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert str(file.parent) in str(error.value)


WRONG = {
    # the tuner, the assessor
    "a slip": (tuner("TPEE"), r"tuner\.name: .* found 'TPEE'; did you mean 'TPE'\?$"),
    "a slip in small letters": (tuner("gridsaerch"), r"did you mean 'GridSearch'\?$"),
    "no such tuner": (tuner("Gradient"), r"tuner\.name: expected one of PPO, .* found 'Gradient'$"),
    "an assessor as tuner": (tuner("Medianstop"), "found the assessor 'Medianstop'$"),
    "a tuner as assessor": ({"assessor": {"name": "TPE"}}, r"assessor\.name: .*the tuner 'TPE'$"),
    "a plain assessor": (
        {"assessor": "Medianstop"},
        r"assessor: expected keys and values, such as \{name: Medianstop\}, found 'Medianstop'$",
    ),
    "a slip in the assessor": (
        {"assessor": {"name": "Medianstopp"}},
        r"did you mean 'Medianstop'\?$",
    ),
    "max": (
        tuner("TPE", optimize_mode="max"),
        r"tuner\.classArgs: optimize_mode: expected one of maximize, minimize, found 'max'; did",
    ),
    "max, where it means nothing": (
        tuner("GridSearch", optimize_mode="max"),
        "found 'max'; did you mean",
    ),
    "max, of an assessor": (
        {"assessor": {"name": "Medianstop", "classArgs": {"optimize_mode": "max"}}},
        r"assessor\.classArgs: optimize_mode: .*'max'; did you mean",
    ),
    "the worst network": (
        tuner("TPE", optimize_mode="minimize"),
        r"optimize_mode: expected 'maximize', because the trials report their top-1, found 'minim",
    ),
    "the worst network, by default": (tuner("TPE"), "'minimize', the default of TPE$"),
    "a slip in the arguments": (
        tuner("TPE", optimise_mode="maximize"),
        r"classArgs: optimise_mode: unknown key; did you mean 'optimize_mode'\?$",
    ),
    "an argument out of its range": (
        tuner("Evolution", **MAXIMIZE, population_size=-1),
        "population_size should be in range",
    ),
    "an argument of another type": (
        {"assessor": {"name": "Medianstop", "classArgs": {"start_step": "soon"}}},
        r"assessor\.classArgs: start_step should be int",
    ),
    "a seed that is none": (tuner("Random", seed="x"), r"tuner\.classArgs: .*'x'"),
    "no tuner": ({"tuner": None}, r"tuner: missing; expected one such as \{name: TPE"),
    "a tuner without a name": ({"tuner": {"classArgs": {}}}, r"tuner\.name: missing"),
    "two tuners": ({"advisor": {"name": "TPE"}}, "expected either a tuner or an advisor"),
    "a package that is missing": (tuner("Anneal"), r"Anneal needs the package hyperopt, .*\(pip"),
    "NAS": (tuner("RegularizedEvolutionTuner"), "searchSpace: .* does not take it: Unsupported"),
    "a network": (tuner("NetworkMorphism"), "expected settings and their values for a trial"),
    # budgets of a trial
    "NNI's own Hyperband": (
        tuner("hyperband"),
        r"tuner: NNI 3.0's own ends .* className: nni_haloc\.experiments\.advisors\.Hyperband and",
    ),
    "no epoch": (advisor("Hyperband", R=0), "tuner: classArgs: expected R above 0, and eta of 2"),
    "the same epochs": (advisor("Hyperband", R=4, eta=1), "tuner: classArgs: expected R above 0"),
    "a budget that the tuner draws, too": (
        {**advisor("Hyperband"), **space("finetune.epochs", "choice", 1, 2)},
        r"searchSpace\.finetune\.epochs: expected no values, because TRIAL_BUDGET sets it",
    ),
    "a table of a budget": (
        {
            "trialCommand": "python3 -m nni_haloc.trial measure --model digits_cnn",
            **advisor("Hyperband"),
            **space("part", "choice", "0/2", "1/2"),
        },
        "haloc measure: unrecognized arguments: --TRIAL_BUDGET",
    ),
    "numbers between whole ones": (
        {**tuner("Random"), **space("finetune.epochs", "uniform", 1, 3)},
        r"finetune\.epochs: .*integer",
    ),
    "halves of whole ones": (
        {**tuner("Random"), **space("finetune.epochs", "quniform", 1, 3, 0.5)},
        r"finetune\.epochs: .*integer",
    ),
    "an argument that PBT lacks": (tuner("PBT", fractoin=0.5), "did you mean 'fraction'"),
    # tuners of one's own
    "no such class": (own("Missing"), "own_things.Missing can't be imported: .*no attribute"),
    "no such module": (
        {"tuner": {"className": "own_thing.Fixed", "codeDirectory": "."}},
        r"tuner\.className: own_thing\.Fixed: no module own_thing in ",
    ),
    "no module at all": (
        {"tuner": {"className": "Fixed", "codeDirectory": "."}},
        r"className: expected module\.Class, found 'Fixed'$",
    ),
    "no folder": ({"tuner": {"className": "own_things.Fixed"}}, r"tuner\.codeDirectory: missing"),
    "no such folder": (
        {"tuner": {"className": "own_things.Fixed", "codeDirectory": "there"}},
        r"tuner\.codeDirectory: no such folder: .*there$",
    ),
    "a name and a class": (
        {"tuner": {"name": "TPE", "className": "own_things.Fixed", "codeDirectory": "."}},
        "expected either name or className, found both$",
    ),
    "an argument that the class lacks": (own("Fixed", b=1), "classArgs: b: unknown key"),
    "a class that ends the process": (own("Ends"), "ends its process with status 1: no licence$"),
    "a class that refuses the space": (own("Picky"), "Picky does not take it: KeyError: 'depth'$"),
    "a class that has nothing": (own("Lazy"), "own_things.Lazy makes no parameters of this space$"),
    "a class with other names": (own("OtherNames"), "budget_fraction: unknown key"),
    # the search space
    "no space": ({"searchSpace": None}, "searchSpace: missing"),
    "an empty space": ({"searchSpace": {}}, "GridSearch does not take it: Search space is empty$"),
    "no such file": (
        {"searchSpace": None, "searchSpaceFile": "space.json"},
        r"searchSpaceFile: .*space\.json: no such file$",
    ),
    "two spaces": ({"searchSpaceFile": "space.json"}, "searchSpaceFile is there, too"),
    "a slip of a sampler": (space("seed", "randnit", 1, 3), r"did you mean 'randint'\?$"),
    "a slip of a key": (
        {"searchSpace": {"seed": {"_type": "choice", "_values": [1]}}},
        "_values: unknown key; expected _type and _value$",
    ),
    "a range upside down": (
        space("budget.fraction", "uniform", 0.5, 0.2),
        "the lower end before the upper one for uniform, found",
    ),
    "an empty range": (space("seed", "randint", 5, 5), "the lower end before the upper one"),
    "no logarithm": (space("finetune.lr", "loguniform", 0, 0.1), "a lower end above 0 for logunif"),
    "no step": (space("search.lr", "quniform", 0.1, 0.2, 0), "a step above 0 in the third place"),
    "no spread": (space("search.lr", "normal", 0.1, 0), "a standard deviation above 0"),
    "no number": (space("search.lr", "uniform", 0.1, float("nan")), "finite numbers for uniform"),
    "a date": (space("seed", "choice", datetime.date(2026, 1, 2)), r"found datetime.*\(date\)$"),
    "words for Gauss": (
        {**tuner("GP"), **space("rule", "choice", "uniform", "energy")},
        "searchSpace: GP does not take it: .*only numerical values$",
    ),
    "logarithms for Metis": (
        {**tuner("Metis"), **space("finetune.lr", "loguniform", 0.1, 0.2)},
        "searchSpace: Metis does not take it: .*loguniform",
    ),
    "two choices for Batch": (
        {**tuner("Batch"), **space("a", "uniform", 0, 1)},
        "searchSpace: Batch does not take it",
    ),
    "a value for Batch": (tuner("Batch"), "expected settings and their values .*Batch gives 0.5$"),
    "a slip inside of Batch": (
        {**tuner("Batch"), **space("all", "choice", {"budget.fractoin": 0.5})},
        r"haloc\.yml: searchSpace\.budget\.fractoin: unknown key; did you mean 'fraction'",
    ),
    "no network within a budget": (
        space("budget.fraction", "choice", 0.5, 0.001),
        r"haloc\.yml: searchSpace\.budget\.fraction: 0\.001: 1\.49 k MACs is below .*84\.9 k",
    ),
    "no network at the end of a range": (
        {**tuner("Random"), **space("budget.fraction", "uniform", 0.01, 0.5)},
        "is below the cheapest network",
    ),
    # keys of NNI's
    "a word for a number": ({"maxTrialNumber": "six"}, "expected a whole number, found 'six'$"),
    "no trial at a time": ({"trialConcurrency": 0}, "expected a number above 0, found 0$"),
    "true for one": ({"trialConcurrency": True}, "expected a whole number, found True$"),
    "a slip in a key": (
        {"trialConcurency": 2},
        r"trialConcurency: unknown key; did you mean 'trialConcurrency'\?$",
    ),
    "a key twice": ({"max_trial_number": 3}, "max_trial_number: maxTrialNumber is there twice$"),
    "a number as key": ({3: 4}, "3: expected text as a key, found a number; put the key in quotes"),
    "weeks": ({"maxExperimentDuration": "2 weeks"}, "expected a duration above 0, such as 90s"),
    "hours and minutes": ({"maxTrialDuration": "1h30m"}, "maxTrialDuration: expected a duration"),
    "no time": ({"maxTrialDuration": "0s"}, "expected a duration above 0"),
    "a level": ({"logLevel": "warn"}, r"logLevel: .*did you mean 'warning'\?$"),
    "annotation": ({"useAnnotation": True}, "useAnnotation: expected false"),
    "the form of NNI 1": ({"trainingServicePlatform": "local"}, "the form of NNI 1"),
    "a slip in the platform": (
        {"trainingService": {"platform": "lokal"}},
        r"trainingService\.platform: .*did you mean 'local'\?$",
    ),
    "a slip in the service": (
        {"trainingService": {"platform": "local", "useActiveGpus": True}},
        r"trainingService\.useActiveGpus: unknown key; did you mean 'useActiveGpu'\?$",
    ),
    "a GPU without a word on the display": ({"trialGpuNumber": 1}, "use_active_gpu"),
    "a GPU that is not here": (
        {
            "trialGpuNumber": 1,
            "trainingService": {"platform": "local", "useActiveGpu": True, "gpuIndices": [0]},
        },
        r"trialGpuNumber: expected no GPU on a machine without .*, found 1; leave the key out$",
    ),
    "several services without an address": (
        {"trainingService": [{"platform": "local"}, {"platform": "local"}]},
        "nniManagerIp: missing; NNI needs it where trainingService is a list$",
    ),
    "several services without storage": (
        {
            "nniManagerIp": "127.0.0.1",
            "trainingService": [{"platform": "local"}, {"platform": "local"}],
        },
        "sharedStorage: missing; NNI needs it where trainingService is a list with a local",
    ),
    "a service that NNI has lost": (
        {"trainingService": {"platform": "openpai"}},
        "NNI 3 takes 'openpai', but its manager has no such service$",
    ),
    # the trials' program
    "no such program": (
        {"trialCommand": "python9 -m nni_haloc.trial run.yml"},
        "trialCommand: python9: no such program on the PATH",
    ),
    "no such program in a folder": (
        {"trialCommand": "X=1 ./venv/bin/python -m nni_haloc.trial run.yml"},
        r"trialCommand: \./venv/bin/python: no such program in ",
    ),
    "a program that is no Python": (
        {"trialCommand": "/bin/ls -m nni_haloc.trial run.yml"},
        "/bin/ls can't be started as Python",
    ),
    "a slip of the trial": (
        {"trialCommand": "python3 -m nni_haloc.trail run.yml"},
        r"nni_haloc\.trail: no such module; did you mean 'nni_haloc\.trial'\?$",
    ),
    "haloc run": ({"trialCommand": "haloc run run.yml"}, "haloc asks NNI for no parameters"),
    "torchrun": (
        {"trialCommand": "torchrun -m nni_haloc.trial run.yml"},
        "each process would ask for parameters",
    ),
    "no settings": ({"trialCommand": "python3 -m nni_haloc.trial"}, "trialCommand: expected 'pyt"),
    "no such script": ({"trialCommand": "python3 mine.py"}, r"mine\.py: no such file in "),
    "no such code": (
        {"trialCodeDirectory": "there"},
        "trialCodeDirectory: no such folder: .*there$",
    ),
    "nothing to measure": (
        {
            "trialCommand": "python3 -m nni_haloc.trial measure --spec spec.json",
            **space("part", "choice", "0/2", "1/2"),
        },
        r"--spec: no such file: .*spec\.json; haloc spec makes one$",
    ),
    "an option of measuring": (
        {
            "trialCommand": "python3 -m nni_haloc.trial measure --model digits_cnn",
            **space("parts", "choice", "0/2", "1/2"),
        },
        "haloc measure: unrecognized arguments: --parts 0/2$",
    ),
    # other machines
    "no machines": ({"trainingService": {"platform": "remote"}}, "machineList: missing$"),
    "a slip in a machine": (
        {"trainingService": {"platform": "remote", "machineList": [{"host": "a", "usr": "b"}]}},
        r"machineList\.0\.usr: unknown key; did you mean 'user'\?$",
    ),
    "a port": (
        {
            "trainingService": {
                "platform": "remote",
                "machineList": [{"host": "a", "user": "b", "password": "c", "port": 99999}],
            }
        },
        "NNI refuses it: expected 0 < self.port < 65536",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_an_experiments_file_is_one_line(experiment, name, monkeypatch):
    changes, message = WRONG[name]
    if "ends the process" not in name and name != "a network":  # a process each takes its time
        monkeypatch.setattr(algorithms, "_try_apart", algorithms._try)
    refused(experiment(changes), message)


WRONG_RUN = {
    "a factory that is not there": (
        {"model": {"name": "own_things:smal"}},
        r"model 'own_things:smal': own_things, which is .*, has no 'smal'; did you mean 'small'\?$",
    ),
    "a module that is not there": ({"model": {"name": "own_thing:small"}}, "no module 'own_thing'"),
    "a factory of something else": (
        {"model": {"name": "own_things:three"}},
        "expected an nn.Module from the factory, found int$",
    ),
    "a network that is not there": ({"model": {"name": "torchvision:resnet19"}}, "resnet19"),
    "weights of another class count": (
        {
            "model": {"name": "own_things:small", "arguments": {"classes": 5}},
            "weights": "small.safetensors",
        },
        r"run\.yml: .*small\.safetensors",
    ),
    "weights of another network": ({"weights": "small.safetensors"}, r"small\.safetensors"),
    "weights that are not there": ({"weights": "there.pt"}, r"weights: no such file .*there\.pt$"),
    "an empty file of weights": (
        {"weights": "empty.safetensors"},
        r"empty\.safetensors: the file is empty",
    ),
    "data that are not there": (
        {"data": {"name": "folder", "root": "images", "size": 8}},
        r"data\.root: no such file or folder: .*images$",
    ),
    "a folder without images": (
        {"data": {"name": "folder", "root": "empty", "size": 8}},
        r"run\.yml: .*empty",
    ),
    "a table that is none": ({"cost": {"table": "table.json"}}, r"table\.json"),
    "a table that is not there": ({"cost": {"table": "costs.json"}}, r"cost\.table: no such file"),
    "an accelerator": ({"trainer": {"accelerator": "gpu"}}, "trainer.accelerator: "),
    "a device": ({"cost": {"metric": "latency_ms", "device": "cuda:7"}}, "cuda:7"),
    "nothing to search": ({"rank_space": {"kinds": []}}, "nothing to search in DigitsCNN"),
    "a layer that is not there": (
        {"rank_space": {"kinds": ["conv"], "pin": {"conv9": 4}}},
        r"rank_space\.pin: no layer of DigitsCNN matches 'conv9'; expected",
    ),
    "two budgets that exclude each other": (
        {"budget": {"fraction": 0.5, "also": [{"metric": "params", "fraction": 0.01}]}},
        r"run\.yml: budget: .* parameters is below the cheapest network",
    ),
    "a predictor of something else": (
        {"cost": {"metric": "macs", "predictor": "params"}},
        "expected a predictor of macs, found 'params'",
    ),
}


@pytest.mark.parametrize("name", WRONG_RUN)
def test_what_the_trials_lack_is_one_line(experiment, name):
    settings, message = WRONG_RUN[name]
    refused(experiment({}, settings), message)


STORAGE = {
    "storageType": "NFS",
    "localMountPoint": "/mnt/shared",
    "remoteMountPoint": "/mnt/shared",
    "nfsServer": "127.0.0.1",
    "exportedDirectory": "/shared",
    "localMounted": "usermount",
}

RIGHT = {
    "as it is": ({}, {}),
    "a tuner in small letters": (tuner("tpe", **MAXIMIZE), {}),
    "an argument without effect": (tuner("Random", **MAXIMIZE, seed=3), {}),
    "Evolution": (tuner("Evolution"), {}),
    "Hyperband": (advisor("Hyperband", **MAXIMIZE, R=4, eta=2), {}),
    "Hyperband, as NNI 2 has it": (
        {"tuner": None, "advisor": advisor("Hyperband", R=4, eta=2)["tuner"]},
        {"trial_budget": "search.epochs"},
    ),
    "PBT": (tuner("PBT", **MAXIMIZE, population_size=2, factor=0.3), {}),
    "an assessor": ({"assessor": {"name": "Medianstop", "classArgs": {"start_step": 2}}}, {}),
    "a tuner of one's own": (own("Fixed", budget=0.4), {}),
    "keys in other spellings": ({"maxTrialNumber": None, "max_trial_number": 3}, {}),
    "durations": ({"maxExperimentDuration": "2h", "maxTrialDuration": 300}, {}),
    "no GPU": ({"trialGpuNumber": 0}, {}),
    "several services": (
        {
            "nniManagerIp": "127.0.0.1",
            "sharedStorage": STORAGE,
            "trainingService": [{"platform": "local"}, {"platform": "local"}],
        },
        {},
    ),
    "a variable before the program": (
        {"trialCommand": "OMP_NUM_THREADS=1 python3 -m nni_haloc.trial run.yml"},
        {},
    ),
    "a shell command": ({"trialCommand": "cd . && python3 -m nni_haloc.trial run.yml"}, {}),
    "a factory of one's own": (
        space("budget.fraction", "choice", 0.5, 0.4),
        {"model": {"name": "own_things:small"}, "weights": "small.safetensors"},
    ),
    "a rule": ({}, {"rule": "sensitivity-knapsack"}),
    "a latency that has yet to be measured": ({}, {"cost": {"metric": "latency_ms"}}),
    "a model that has yet to be asked": ({}, {"cost": {"metric": "cycles"}}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_runs_is_ready(experiment, name):
    changes, settings = RIGHT[name]
    assert check_experiment(experiment(changes, settings)).startswith(READY)


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("SMAC", "smac4nni ConfigSpaceNNI"),
        ("BOHB", "ConfigSpace statsmodels"),
        ("advisors.BOHB", "ConfigSpace statsmodels"),
        ("Anneal", "hyperopt==0.1.2"),
        ("TPE_legacy", "hyperopt==0.1.2"),
        ("DNGO", "pybnn"),
        ("PPOTuner", "gym"),
    ],
)
def test_a_tuner_that_needs_a_package_names_it(experiment, name, packages, monkeypatch):
    """The packages are those of NNI's own extras."""
    for module in ("smac", "ConfigSpaceNNI", "ConfigSpace", "hyperopt", "pybnn", "gym"):
        monkeypatch.setitem(sys.modules, module, None)
    extras = [each for each in importlib.metadata.requires("nni") if "extra" in each]
    wanted = {re.split("[ ;=<>]", each)[0] for each in extras}
    assert {each.split("=")[0] for each in packages.split()} <= wanted
    message = f"{name} needs the package .*, which is not installed .pip install {packages}.$"
    monkeypatch.setattr(algorithms, "_try_apart", algorithms._try)
    own = name.removeprefix("advisors.")
    refused(experiment(tuner(name) if own == name else advisor(own)), message)


@pytest.mark.parametrize(
    ("arguments", "budgets"),
    [({"R": 4, "eta": 2}, [1, 4]), ({"R": 10, "eta": 3}, [1, 10]), ({"R": 1}, [1]), ({}, [2, 60])],
)
def test_an_advisors_budgets_are_those_of_nnis_brackets(arguments, budgets):
    from nni.algorithms.hpo.hyperband_advisor import Bracket

    algorithm = algorithms.Algorithm("tuner", {"name": "Hyperband", "classArgs": arguments})
    algorithm.defaults = {"R": 60, "eta": 3}
    assert algorithm.budgets == budgets
    most, eta = (arguments.get(key, algorithm.defaults[key]) for key in ("R", "eta"))
    halvings = math.floor(math.log(most, eta) + 1e-6)
    brackets = [Bracket("0", s, halvings, eta, most, "maximize") for s in range(halvings + 1)]
    drawn = {bracket.get_n_r()[1] for bracket in brackets}
    assert [min(drawn), max(drawn)] == [budgets[0], budgets[-1]]


def test_the_values_of_batch_are_the_settings(experiment):
    each = {"budget.fraction": 0.5, "seed": 1}, {"budget.fraction": 0.4}
    values = space("combine_params", "choice", *each)
    found = check_experiment(experiment({**tuner("Batch"), **values}))
    assert found == "trials run run.yml, searching budget.fraction, seed"


def test_trials_that_are_not_ours_may_have_any_tuner_and_any_space(experiment, folder):
    (folder / "mine.py").touch()
    command = {"trialCommand": "python3 mine.py --lr 1", **space("lr", "loguniform", 0.01, 1)}
    for section in (advisor("Hyperband", optimize_mode="minimize", R=4, eta=2), tuner("TPE")):
        found = check_experiment(experiment({**command, **section}))
        assert found == "trials run 'python3 mine.py --lr 1'"
    refused(experiment({**command, **advisor("Hyperband", r=4)}), r"classArgs: r: unknown key")
    refused(experiment({**command, **tuner("TPEE")}), "did you mean 'TPE'")


REMOTE = {
    "nniManagerIp": "192.0.2.1",
    "trainingService": {
        "platform": "remote",
        "machineList": [{"host": "192.0.2.2", "user": "alice", "password": "secret"}],
    },
}


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "/there/w.safetensors", "trainer": {"accelerator": "gpu", "devices": 8}},
        {
            "model": {"name": "resnet20"},
            "weights": "/there/w.pt",
            "data": {"name": "folder", "root": "/there", "size": 32},
            "cost": {"metric": "latency_ms", "device": "cuda", "table": "/there/costs.json"},
        },
        {"model": {"name": "a_package_that_is_there:net"}},
    ],
)
def test_of_another_machines_trials_what_is_here_is_checked(experiment, settings):
    python = {"trialCommand": "python3.99 -m nni_haloc.trial run.yml"}
    assert check_experiment(experiment({**REMOTE, **python}, settings)) == READY


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"name": "torchvision:resnet19"}, "weights": "/there/w.pt"}, "resnet19"),
        ({"weights": "small.safetensors"}, r"small\.safetensors"),
        ({"weights": "/there/w.pt", "rank_space": {"kinds": []}}, "nothing to search"),
        ({"model": {"name": "own_things:three"}, "weights": "/there/w.pt"}, "found int$"),
    ],
)
def test_of_another_machines_trials_what_is_here_may_be_wrong(experiment, settings, message):
    refused(experiment(REMOTE, settings), message)


def test_more_than_nni_sends_to_another_machine_is_named(experiment, folder, tmp_path):
    (tmp_path / "code").mkdir()
    for number in range(2001):
        (tmp_path / "code" / str(number)).touch()
    changes = {**REMOTE, "trialCodeDirectory": str(tmp_path / "code")}
    refused(experiment(changes), "has more than 2000 files and 300 MiB, which NNI sends at most")
    (tmp_path / "code" / ".nniignore").write_text("1*\n")
    with pytest.raises(HalocError, match=r"run\.yml: no such file"):
        check_experiment(experiment(changes))


ODD = (None, True, 0, -1, 2.5, "", "six", [], ["x"], {}, {"name": "x"}, 10**400, "..", "\0")


@pytest.mark.parametrize("key", [field.name for field in utils.fields(ExperimentConfig())])
def test_no_value_that_nni_refuses_is_ready(experiment, key):
    for value in ODD:
        file = experiment({utils.camel_case(key): value})
        content = yaml.safe_load(file.read_text()) | {utils.camel_case(key): value}
        file.write_text(yaml.safe_dump(content))
        try:
            ExperimentConfig.load(file).json()
        except Exception:
            utils.unset_base_path()
            with pytest.raises(HalocError) as error:
                check_experiment(file)
            assert "\n" not in str(error.value)
            assert re.search(re.escape(utils.camel_case(key)) + "|NNI refuses", str(error.value))


def test_a_network_is_built_once_for_all_values(experiment, monkeypatch):
    built = []

    def build(*arguments, **options):
        built.append(arguments)
        return build_model(*arguments, **options)

    monkeypatch.setattr(job, "build_model", build)
    values = {**space("budget.fraction", "choice", 0.5, 0.4, 0.3), "maxTrialNumber": 3}
    values["searchSpace"]["finetune.lr"] = {"_type": "choice", "_value": [0.1, 0.2, 0.3]}
    check_experiment(experiment(values))
    assert len(built) == 1
    values["searchSpace"]["seed"] = {"_type": "choice", "_value": [1, 2]}
    check_experiment(experiment(values))
    assert len(built) == 1 + 2


def test_checking_leaves_no_trace(experiment, folder):
    file = experiment()
    before = {path for path in folder.rglob("*") if path.suffix != ".pyc"}
    state, path = torch.get_rng_state(), list(sys.path)
    check_experiment(file)
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.path == path
    assert {path for path in folder.rglob("*") if path.suffix != ".pyc"} == before


def test_a_tuner_that_writes_files_leaves_none_where_the_check_is_run(
    experiment, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(HalocError):
        check_experiment(experiment(tuner("NetworkMorphism")))
    assert not list((tmp_path / "here").iterdir())


def test_the_command_ends_with_status_two_and_one_line(experiment):
    done = haloc("check", experiment(tuner("TPEE")))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("haloc: ")
    assert done.stderr.count("\n") == 1
    done = haloc("check", experiment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"haloc.yml: ready ({READY})\n")


def test_create_refuses_what_check_refuses(experiment):
    done = CliRunner().invoke(app, ["create", str(experiment({"maxTrialNumber": "six"}))])
    assert done.exit_code == 1
    assert isinstance(done.exception, HalocError)
    assert "maxTrialNumber: expected a whole number" in str(done.exception)
