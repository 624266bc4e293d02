"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], text: Collection[str] = ()
) -> None:
    """Rows of strings and numbers, a float with four digits and nothing for None; the columns of ``text`` begin at the left."""
    console = Console(markup=False)
    _print(console, Table(title=title), columns, rows, text)


def text_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same without lines or styles, as text; all columns begin at the left."""
    with StringIO() as file:
        console = Console(file=file, markup=False, force_terminal=False)
        _print(
            console, Table(box=None, pad_edge=False, padding=(0, 2, 0, 0)), columns, rows, columns
        )
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
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"
