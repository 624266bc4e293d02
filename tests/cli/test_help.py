"""The help of every command: complete, of one style, and quick."""

import itertools
import re
import subprocess
import sys

import pytest
from helpers.commands import haloc

from nni_haloc.costs.measure import measure_parser

GROUPS = {
    "Compress": ["run", "search", "train", "front", "throughput", "table", "settings"],
    "Costs": ["measure", "predict", "spec", "steps", "heatmap"],
    "After a run": ["plan", "prune", "quantize", "export", "bench", "report", "plot"],
    "NNI experiments": ["check", "create", "resume", "results"],
}
COMMANDS = [name for names in GROUPS.values() for name in names]
HEAVY = {"torch", "nni", "pydantic", "numpy", "yaml", "pytorch_lightning", "matplotlib"}


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Call with words of a command line; what it prints, 80 columns wide."""
    from nni_haloc.cli.main import main

    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["haloc", *words])
        main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_commands_are_in_groups_in_the_order_of_the_work(help_of):
    groups, name = {}, None
    for line in help_of("--help").splitlines():
        if title := re.match(r"╭─ ([\w ]+) ─", line):
            groups[title[1]] = name = []
        elif command := re.match(r"│ (\w+)  ", line):
            name.append(command[1])
    groups.pop("Options")
    assert groups == GROUPS
    assert list(groups) == list(GROUPS)


def test_each_command_has_one_line_in_the_list(help_of):
    lines = help_of("--help").splitlines()
    start = lines.index(next(line for line in lines if "Compress" in line))
    rows = [line for line in lines[start:] if line.startswith("│")]
    assert len(rows) == len(COMMANDS)
    assert all(row.rstrip(" │").endswith(".") for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(help_of, command):
    text = help_of(command, "--help")
    assert f"Usage: haloc {command} [OPTIONS]" in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    options = [line for line in lines if re.match(r"│ [ *]*--\w", line)]
    assert "--help" in options[-1]
    for line in options:
        words = line.strip("│ *").split()
        rest = [word for word in words if not word.startswith("--")][1:]
        assert rest, line
    assert "TEXT" not in text


def test_measure_has_the_options_of_its_parser_in_the_style_of_the_others(help_of):
    text = help_of("measure", "--help")
    for action in measure_parser()._actions:
        assert action.option_strings[-1] in text
    assert "╭─ Options ─" in text
    assert "[default: costs.json]" in text
    assert help_of("measure", "-h") == text


def test_the_version_is_that_of_the_package(help_of):
    from importlib.metadata import version

    assert help_of("--version") == f"nni-haloc {version('nni-haloc')}\n"


@pytest.mark.parametrize(
    ("words", "typers"),
    # typer itself reads values with pydantic
    [(["--help"], set()), (["--version"], {"pydantic"}), (["run", "--help"], {"pydantic"})],
)
def test_help_imports_nothing_heavy(words, typers):
    program = (
        f"import sys; sys.argv = {['haloc', *words]}; from nni_haloc.cli.main import main; main(); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (HEAVY - typers) & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("haloc r", ["run", "report", "resume", "results"]),
        ("haloc run --rule e", ["energy", "error-knapsack"]),
        ("haloc predict --predictor e", ["eyeriss", "energy_pj", "energy_mj"]),
        ("haloc ba", []),
    ],
)
def test_the_shell_completes_commands_and_names(line, names, monkeypatch):
    monkeypatch.setenv("_HALOC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    done = haloc()
    assert done.stdout.split() == names, done.stderr


def test_without_a_command_the_help_is_printed_and_the_status_is_2():
    done = haloc()
    assert done.returncode == 2
    assert "Usage: haloc" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_of_an_explanation_is_filled(name, help_of):
    """A line ends where the next word does not fit, not where the source's line does."""
    explained = help_of(name, "--help").partition("Usage: ")[2].partition("╭")[0]
    for paragraph in re.split(r"\n\s*\n", explained)[1:]:
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        for line, following in itertools.pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 78, paragraph
