"""Print tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], text: Collection[str] = ()
) -> None:
    """Print a table with lines to standard output.

    Args:
        title: stands above the table; may be empty.
        columns: the headings.
        rows: cells, written by `shown`.
        text: the headings of columns that are aligned to the left; others are to the right.
    """
    from rich.console import Console  # here, because it takes time and few commands print tables
    from rich.table import Table

    _print(Console(markup=False), Table(title=title or None), columns, rows, text)


def text_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table without lines and styles as text; all columns are aligned to the left."""
    from rich.console import Console
    from rich.table import Table

    with StringIO() as file:
        console = Console(file=file, markup=False, force_terminal=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        _print(console, table, columns, rows, columns)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _print(
    console: Console,
    table: Table,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    text: Collection[str],
) -> None:
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right")
    for row in rows:
        table.add_row(*map(shown, row))
    if not console.is_terminal:  # a pipe or a file has no width to fit
        console.width = 400
    console.print(table)


def shown(value: Any) -> str:
    """Return a cell's text: a float with four digits, nothing for None, else ``str``."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"
