"""The command line in a process of its own."""

import subprocess
import sys

from helpers.paths import ROOT


def haloc(*arguments, cwd=ROOT, module="-c"):
    program = (
        ["-c", "from nni_haloc.cli.main import main; main()"] if module == "-c" else ["-m", module]
    )
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )
