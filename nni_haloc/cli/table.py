"""The command table: count a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nni_haloc.cli.options import COMPRESS, Batch, Json, Model, RankSpace, Shape, print_json
from nni_haloc.utils.errors import as_one_line

table = typer.Typer()


@table.command("table", rich_help_panel=COMPRESS)
def table_command(
    model: Model = None,
    input_: Shape = None,
    batch: Batch = 1,
    rank_space: RankSpace = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="RANKS.json", help="Count the network of this plan, too."),
    ] = None,
    json_: Json = False,
) -> None:
    """Count a network's layers, ranks, MACs and parameters."""
    with as_one_line():
        from nni_haloc.costs.measure import model_of
        from nni_haloc.results.network_table import as_json, counted, print_counted

        content = counted(*model_of(model, input_, batch, rank_space), plan)
        print_json(as_json(content)) if json_ else print_counted(content)
