"""Which tests share a worker of pytest-xdist, and which begin first."""

from pathlib import Path

EXPERIMENTS = "tests/trial/"
"""Experiments of NNI's: one after the other, and two files share one."""
LONG = (
    EXPERIMENTS,
    "tests/runs/test_distributed.py",
    "tests/runs/test_stages.py",
    "tests/space/test_torchvision.py",
    "tests/test_notebooks.py",
    "tests/costs/test_regression.py",
)
"""What takes long begins first, so that all workers end at nearly the same time."""


def group_of(nodeid: str) -> str:
    """Name what a test must not be parted from: its file's fixtures, and other experiments."""
    return EXPERIMENTS if nodeid.startswith(EXPERIMENTS) else nodeid.partition("::")[0]


def place_of(nodeid: str) -> int:
    """Rank a test among those that begin first."""
    return next((i for i, start in enumerate(LONG) if nodeid.startswith(start)), len(LONG))


def number_of_workers(arguments: list[str]) -> int:
    """Return two workers for folders, and none for single files, which start sooner without."""
    paths = [Path(argument.partition("::")[0]) for argument in arguments]
    return 0 if all(path.is_file() for path in paths) else 2
