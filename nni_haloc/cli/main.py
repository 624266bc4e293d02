"""The command line, ``haloc``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from nni_haloc import __version__
from nni_haloc.cli.after_a_run import after
from nni_haloc.cli.compress import compress
from nni_haloc.cli.costs import costs
from nni_haloc.cli.experiment import experiments
from nni_haloc.cli.heatmap import heatmap
from nni_haloc.cli.plan import plan
from nni_haloc.cli.plot import plot
from nni_haloc.cli.settings import settings
from nni_haloc.cli.table import table
from nni_haloc.utils.errors import HalocError, out_of_memory, printable, reason_of
from nni_haloc.utils.interruption import stoppable


def _in_paragraphs(function: Callable[..., Any] | None) -> str:
    """Return a function's docstring with one line for each paragraph."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
for commands in (compress, table, settings, costs, heatmap, plan, after, plot, experiments):
    app.add_typer(commands)  # in the order of the work
    for command in commands.registered_commands:
        # The lines of a docstring are no lines of the help: those depend on the terminal.
        command.help = command.help or _in_paragraphs(command.callback)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nni-haloc {__version__}")
        raise typer.Exit


@app.callback()
def haloc(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Hardware-aware low-rank compression of convolutional networks."""


def main() -> None:
    """Run a command; end with status 2 and one line if it fails for a reason the user can mend.

    After a signal the status is the shell's for it: 130 or 143.
    """
    try:
        with stoppable("haloc"):
            # standalone, typer would print a usage error in several lines
            if app(prog_name="haloc", standalone_mode=False) == 130:
                raise KeyboardInterrupt  # of which typer has made a status that it returns
    except HalocError as error:
        _leave(str(error))
    except OSError as error:  # a full disk, a read-only folder: the files there are unharmed
        _leave(printable(reason_of(error)))
    except Exception as error:
        if line := out_of_memory(error):
            _leave(line)
        # click's errors; which module they are in depends on typer's version
        if not hasattr(error, "format_message"):
            raise
        _leave(error.format_message().replace(": Value error, ", ": "))


def _leave(message: str) -> NoReturn:
    """End with status 2 and a message.

    Without arguments it is the help, of several lines; or nothing, if typer has printed the help.
    """
    if message:
        print(message if "\n" in message else f"haloc: {message}", file=sys.stderr)
    sys.exit(2)
