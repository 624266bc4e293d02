"""Test and measure everything that runs on a CUDA device, in a given number of minutes.

    python tests/benchmarks/cuda.py --data FOLDER --out FOLDER --minutes 8

FOLDER has CIFAR-10 as ``cifar10-jpeg.tar.gz``, or unpacked as ``train/CLASS/*`` and
``test/CLASS/*``, and for the study ``resnet20-cifar10-jpeg-45k.pt``. Rows are appended to
``cuda.jsonl`` as they come, the most valuable parts first: the tests, speed of training and search,
cost tables, latency budgets, short and long trainings. The command ends by itself; called again, it
makes the rows that are missing. ``--device cpu --scale 0.01`` is a dry run of everything.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In this folder, torch would take this file for the package ``cuda`` that it imports.
others = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path[:] = [str(HERE.parent), *others, str(HERE.parents[1])]

if __name__ == "__main__":
    import typer
    from benchmarks.on_cuda.command import main

    typer.run(main)
