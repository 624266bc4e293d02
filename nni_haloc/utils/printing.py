"""Print tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from nni_haloc.utils.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


Cells = list[list[str]]

_LINES = 3
"""Width of the line and the blanks between two columns."""
_FOLDED = 24
"""Columns of text may be as narrow as this before a table counts as too wide."""


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], text: Collection[str] = ()
) -> None:
    """Print a table with lines to standard output.

    On a terminal that is too narrow for it, rows and columns change places, and as many of the
    rows as fit stand side by side; what is left follows below.

    Args:
        title: stands above the table, on the left; may be empty.
        columns: the headings.
        rows: cells, written by `shown`.
        text: the headings of columns that are aligned to the left and may be folded; others are
            aligned to the right.
    """
    from rich.console import Console  # here, because it takes time and few commands print tables

    console = Console(markup=False)
    cells = [[shown(value) for value in row] for row in rows]
    cells = [row + [""] * (len(columns) - len(row)) for row in cells]
    least, most = _widths(columns, cells, text)
    if not console.is_terminal:  # a pipe or a file has no width to fit
        console.width = sum(most) + _LINES * len(columns) + 1
    spare = console.width - sum(least) - _LINES * len(columns) - 1
    if spare >= 0:
        for number, width in enumerate(most):
            more = min(spare, width - least[number])
            least[number], spare = least[number] + more, spare - more
        _print_upright(console, title, columns, cells, least, text)
    else:
        _print_lying(console, title, columns, cells)


def _print_upright(
    console: Console,
    title: str,
    columns: Sequence[str],
    cells: Cells,
    widths: Sequence[int],
    text: Collection[str],
) -> None:
    """Print a row of the table as a row."""
    from rich.table import Table

    if title:  # not the table's own, which would stand in the middle of a wide table
        console.print(title, style="table.title", highlight=False)
    table = Table()
    for name, width in zip(columns, widths, strict=True):
        table.add_column(
            name, justify="left" if name in text else "right", width=width, overflow="fold"
        )
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _print_lying(console: Console, title: str, columns: Sequence[str], cells: Cells) -> None:
    """Print a row of the table as a column, in as many blocks as the width demands."""
    from rich.table import Table

    names = max(map(len, columns))
    while cells:
        count, room = 0, console.width - names - _LINES - 1
        while count < len(cells) and (count == 0 or room >= 0):
            room -= max(map(len, cells[count])) + _LINES
            count += 1
        count -= room < 0 and count > 1
        if title:
            console.print(title, style="table.title", highlight=False)
        table = Table(show_header=False)
        table.add_column(min_width=names)
        for _ in range(count):
            table.add_column(overflow="fold")
        for name, *values in zip(columns, *cells[:count], strict=True):
            table.add_row(name, *values)
        console.print(table)
        title, cells = "", cells[count:]


def _widths(
    columns: Sequence[str], cells: Cells, text: Collection[str]
) -> tuple[list[int], list[int]]:
    """Return the least and the full width of each column.

    Headings may be broken at spaces, and text anywhere.
    """
    least, most = [], []
    for number, name in enumerate(columns):
        longest = max((len(row[number]) for row in cells), default=0)
        word = max(map(len, name.split()), default=0)
        least.append(max(word, min(longest, _FOLDED) if name in text else longest))
        most.append(max(len(name), longest))
    return least, most


def text_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table without lines and styles as text; all columns are aligned to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(shown, row))
    with StringIO() as file:
        # In a notebook rich would show the table in the page, and the text would be empty.
        console = Console(
            file=file, markup=False, force_terminal=False, force_jupyter=False, width=400
        )
        console.print(table)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def shown(value: Any) -> str:
    """Return a cell on one line: a float with four digits, nothing for None, else ``str``."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return printable(text)


def short(count: float, unit: str = "", digits: int = 4) -> str:
    """Write a count with a few digits and its thousands: ``1.494 M``, ``85.2 kB``."""
    count = float(f"{count:.{digits}g}")
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{max(digits, 15)}g} {prefix}{unit}"
    return f"{count:.{digits}g} {unit}".rstrip()


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"
