"""The command ``haloc report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nni_haloc.costs.measure import Parser
from nni_haloc.results.html_report import REPORT_FILE, html_report
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.files import whole


def report_main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = Parser(
        "haloc report",
        "Write a finished run's report: one HTML page with its metrics, ranks, curves and settings.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a run, a search or a trial")
    parser.add_argument("--out", type=Path, help=f"the page (default: FOLDER/{REPORT_FILE})")
    options = parser.parse_args(arguments)
    page = html_report(options.folder)
    out = options.out or options.folder / REPORT_FILE
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{out}: expected a file that can be written, found: {error.strerror}"
        ) from None
    print(out)
