"""Run the tests of what runs on the device."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from benchmarks.on_cuda.bench import ROOT, Bench

TESTS_S = 240
"""Seconds that the tests may take."""


def tests(bench: Bench) -> None:
    bench.add({"part": "tests"}, lambda: run_tests(bench))


def run_tests(bench: Bench) -> dict[str, Any]:
    """Run the tests that are marked ``cuda``; on a processor those of the same code paths."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.cuda|\bdevice\b", path.read_text(encoding="utf-8"))
    ]
    chosen = ["-m", "cuda"] if bench.device == "cuda" else ["-k", "[cpu"]
    limit = min(TESTS_S, bench.left)
    command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--continue-on-collection-errors", "-v", "-rfE", "--tb=short", *files]
    log = bench.out.with_name("cuda-tests.txt")
    with log.open("w", encoding="utf-8") as file:
        try:
            subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=limit, check=False)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
    text = log.read_text(encoding="utf-8")
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
    return {"ended": ended, **counts, "not_passed": failed[:50]}
