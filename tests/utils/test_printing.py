"""Tables on terminals of any width, and in pipes."""

import re

import pytest
from rich.console import Console

from nni_haloc.utils.printing import print_table, shown, text_table

COLUMNS = ("stage", "runtime", "latency, ms", "parameters", "file")
ROWS = [
    ("original", "torch", 1.23456, 65_834, "/tmp/a/rather/long/folder/model.onnx"),
    ("compressed", "onnxruntime", 0.5, 11_642, None),
]


@pytest.fixture
def printed(capsys, monkeypatch):
    """Call with the width of a terminal, or None for a pipe; the lines that are printed."""

    def run(width, rows=ROWS):
        monkeypatch.setenv("COLUMNS", str(width or 80))
        monkeypatch.setattr(Console, "is_terminal", width is not None)
        print_table("a run", COLUMNS, rows, text={"stage", "runtime", "file"})
        plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        return plain.splitlines()

    return run


def test_in_a_pipe_each_row_is_one_line(printed):
    lines = printed(None)
    assert lines[0] == "a run"
    assert len(lines) == 7
    (first,) = (line for line in lines if "original" in line)
    assert [cell.strip() for cell in first.strip("│").split("│")] == [
        "original",
        "torch",
        "1.235",
        "65834",
        "/tmp/a/rather/long/folder/model.onnx",
    ]


@pytest.mark.parametrize("width", [100, 80])
def test_text_is_folded_and_numbers_are_whole(printed, width):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in ("original", "1.235", "65834", "onnxruntime"):
        assert word in text
    cells = [line.split("│")[5].strip() for line in lines if line.startswith("│")]
    assert "".join(cells) == ROWS[0][-1]


@pytest.mark.parametrize("width", [64, 50, 40])
def test_on_a_narrow_terminal_rows_are_columns_and_nothing_is_lost(printed, width):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in (*COLUMNS, "original", "compressed", "onnxruntime", "1.235", "11642"):
        assert word in text
    assert "…" not in text


def test_all_rows_are_printed_in_blocks(printed):
    rows = [(f"stage{i}", "torch", 0.1, i, None) for i in range(9)]
    text = "\n".join(printed(50, rows))
    assert all(f"stage{i} " in text for i in range(9))
    assert text.count("latency, ms") > 1
    assert text.count("a run") == 1


def test_a_table_without_rows_has_its_headings(printed):
    assert "latency" in "\n".join(printed(80, []))
    assert "latency" in "\n".join(printed(None, []))


def test_a_text_table_is_text_in_a_notebook_too(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert text_table(("a", "b"), [("x", 1)]).splitlines() == ["a  b", "x  1"]


def test_a_text_table_is_not_cut():
    lines = text_table(("a", "b"), [("x" * 100, None), ("y", 0.123456)]).splitlines()
    assert lines == [f"a{' ' * 101}b", "x" * 100, f"y{' ' * 101}0.1235"]


def test_cells_are_short():
    assert [shown(v) for v in (None, 1.23456, 12, "text")] == ["", "1.235", "12", "text"]
