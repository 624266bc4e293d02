"""Put NNI experiments and runs under load, and count what is lost, doubled or left behind.

    python tests/benchmarks/load.py trials --work FOLDER
    python tests/benchmarks/load.py stop --work FOLDER
    python tests/benchmarks/load.py manager --work FOLDER
    python tests/benchmarks/load.py memory --work FOLDER
    python tests/benchmarks/load.py kills --work FOLDER

``trials``: forty short trials of the digits example, four at a time. ``stop``: `nnictl stop` in the
middle of them. ``manager``: the manager is killed (SIGKILL) five times in the middle of them, and
`nnictl resume` goes on; what the trials leave is compared with those of ``trials``. ``memory``: a
search of 50 epochs and one of 5, resident memory and open files at their ends. ``kills``: the slow
half of `tests/runs/test_kills.py`, 20 SIGKILLs at random times in a search and in a fine-tuning.

FOLDER is a private home for NNI, apart from ``~/nni-experiments``; nothing is left running. A row
for each part is appended to ``docs/raw/load.jsonl``; ``--report`` prints all rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.nni_experiments import (  # noqa: E402
    created,
    digits_code,
    folders,
    get,
    manager_of,
    nnictl,
    reaping,
    resume,
    wait_for,
    with_budgets,
)
from helpers.short_runs import SETTINGS  # noqa: E402

from nni_haloc.inputs.config import load_config, set_dotted  # noqa: E402
from nni_haloc.runs.folder import RunFolder  # noqa: E402
from nni_haloc.runs.run import flatten  # noqa: E402

RAW = ROOT / "docs" / "raw" / "load.jsonl"
BUDGETS = [round(0.12 + 0.02 * i, 2) for i in range(40)]
EPOCHS = {"search.epochs": 2, "finetune.epochs": 2}
POINTS = 1 + 2
"""Of a trial's curve: the network before its fine-tuning, and after each epoch."""
CONCURRENCY, KILLS, REPEATS = 4, 5, 3
PARTS = ("trials", "stop", "manager", "memory", "kills")
RUNNING = ("WAITING", "RUNNING", "UNKNOWN")
TIMED = ("latency", "speedup", "images_per_s")


def short_digits(home: Path, budgets: list[float], **changes: Any) -> Path:
    """Return the experiment's file of a copy of the digits example whose trials take seconds."""
    code = digits_code(home / "digits")
    run = yaml.safe_load((code / "run.yml").read_text())
    for key, value in (SETTINGS | EPOCHS).items():
        set_dotted(run, key, value)
    (code / "run.yml").write_text(yaml.safe_dump(run))
    return with_budgets(code / "haloc.yml", budgets, trialConcurrency=CONCURRENCY, **changes)


def processes_of(number: str) -> list[psutil.Process]:
    """Return the running processes of an experiment's trials."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NNI_EXP_ID") == number:
                found.append(process)
        except psutil.Error:
            continue
    return found


def counted(folder: Path) -> dict[str, float]:
    """Return a trial's final figures, but for what was timed."""
    flat = flatten(RunFolder(folder).metrics())
    return {key: value for key, value in flat.items() if not any(word in key for word in TIMED)}


def digest(folder: Path) -> str:
    """Return a digest of what a trial leaves that is the same in every run of its settings."""
    content = (folder / "weights.safetensors").read_bytes() + (folder / "ranks.json").read_bytes()
    return hashlib.sha256(content + json.dumps(counted(folder)).encode()).hexdigest()


def faults(home: Path, number: str, port: int) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Compare what the trials of an experiment left with what its manager has of them.

    Returns:
        Counts by fault; and the digests of the results by budget.
    """
    trials, metrics = get(port, "trial-jobs"), get(port, "metric-data")
    places = folders(home, number)
    listed = {trial["trialJobId"]: json.loads(trial["hyperParameters"][0]) for trial in trials}
    made = {str(each["parameter_id"]): each["parameters"] for each in listed.values()}
    found: Counter[str] = Counter()
    digests: dict[str, list[str]] = {}
    for trial in trials:
        name = trial["trialJobId"]
        found[f"trials {trial['status']}"] += 1
        mine = [m for m in metrics if m["trialJobId"] == name]
        points = Counter(m["sequence"] for m in mine if m["type"] == "PERIODICAL")
        found["points lost"] += sum(place not in points for place in range(POINTS))
        found["points doubled"] += sum(points.values()) - len(points)
        finals = [m for m in mine if m["type"] == "FINAL"]
        found["finals lost"] += not finals
        found["finals doubled"] += max(0, len(finals) - 1)
        if trial["status"] != "SUCCEEDED":
            continue
        folder = places[name]
        own = flatten(RunFolder(folder).metrics())
        found["finals of another trial"] += sum(
            json.loads(json.loads(m["data"])) != own for m in finals
        )
        used = RunFolder(folder).read_metrics()["parameters"]
        found["parameters of another trial"] += sum(
            made.get(str(m["parameterId"])) != used for m in finals
        )
        found["listed by NNI for another trial"] += listed[name]["parameters"] != used
        digests.setdefault(str(used["budget.fraction"]), []).append(digest(folder))
    return dict(found), digests


def over(port: int) -> bool:
    """Tell whether an experiment has ended; with trials to spare its tuner has no more."""
    status = get(port, "check-status")["status"]
    running = any(trial["status"] in RUNNING for trial in get(port, "trial-jobs"))
    return status in ("DONE", "ERROR") or (status == "TUNER_NO_MORE_TRIAL" and not running)


def stop(home: Path, number: str) -> dict[str, int]:
    """Stop an experiment; count what of its trials and its manager runs on."""
    manager = manager_of(home, number)
    running = len(processes_of(number))
    nnictl(home, "stop", number)
    at_once = len(processes_of(number))
    time.sleep(10)
    left = processes_of(number)
    found = {"processes before": running, "at once": at_once, "after 10 s": len(left)}
    alive = manager.is_running() and manager.status() != psutil.STATUS_ZOMBIE
    for process in left:
        process.kill()
    return found | {"managers": int(alive)}


def run_trials(home: Path) -> dict[str, Any]:
    with created(home, short_digits(home, BUDGETS)) as (port, number):
        wait_for(lambda: over(port), 3600, 2)
        status = get(port, "check-status")
        found, digests = faults(home, number, port)
        left = stop(home, number)
    (home / "digests.json").write_text(json.dumps(digests))
    return {"status": status, "found": found, "budgets": len(digests), "left": left}


def run_stop(home: Path) -> dict[str, Any]:
    with created(home, short_digits(home, BUDGETS)) as (port, number):
        done = ("SUCCEEDED", "FAILED")
        wait_for(
            lambda: sum(trial["status"] in done for trial in get(port, "trial-jobs")) >= 6, 1800, 1
        )
        wait_for(lambda: len(processes_of(number)) >= CONCURRENCY, 60)
        return {"left": stop(home, number)}


def run_manager(home: Path, seed: int = 0) -> dict[str, Any]:
    """Kill the manager at random moments; its trials end with it, and go on with the next one."""
    draw = random.Random(seed)
    most = len(BUDGETS) + KILLS * CONCURRENCY  # GridSearch draws again what ran at a kill
    moments = []
    with reaping(), created(home, short_digits(home, BUDGETS, maxTrialNumber=most)) as found:
        port, number = found
        for _ in range(KILLS):
            begun = len(get(port, "trial-jobs"))
            wait_for(lambda begun=begun: len(get(port, "trial-jobs")) > begun + 2, 600, 0.5)
            time.sleep(draw.uniform(0, 15))
            moments.append(dict(Counter(trial["status"] for trial in get(port, "trial-jobs"))))
            manager = manager_of(home, number)
            processes = [manager, *manager.children(recursive=True)]
            manager.send_signal(signal.SIGKILL)
            for process in processes:
                wait_for(lambda process=process: not process.is_running(), 120)
            resume(home, number, port)
        wait_for(lambda: over(port), 3600, 2)
        status = get(port, "check-status")
        found, digests = faults(home, number, port)
        left = stop(home, number)
    undisturbed = json.loads((home.parent / "trials" / "digests.json").read_text())
    differ = sum(each != undisturbed[key][0] for key, own in digests.items() for each in own)
    return {
        "status": status,
        "found": found,
        "budgets": len(digests),
        "at the kills": moments,
        "unlike undisturbed": differ,
        "left": left,
    }


def search_alone(folder: Path, epochs: int) -> None:
    """Search in this process; print resident memory and open files after each epoch."""
    from nni_haloc.runs.job import Job
    from nni_haloc.runs.stages.choose_ranks import search

    rows: list[tuple[int, int]] = []

    def note(*_: Any) -> None:
        process = psutil.Process()
        rows.append((process.memory_info().rss, process.num_fds()))

    changes = {**SETTINGS, "search.epochs": epochs}
    config = load_config(ROOT / "examples" / "digits" / "run.yml", changes)
    job = Job(config, folder)
    with job.active():
        search(job, note)
    note()
    print(json.dumps(rows))


def run_memory(home: Path) -> dict[str, Any]:
    """Run both searches in turn, each in a process of its own."""
    ends: dict[int, list[tuple[int, int]]] = {5: [], 50: []}
    epochs: dict[int, list[list[int]]] = {5: [], 50: []}
    for i in range(REPEATS):
        for number, rows in ends.items():
            words = [sys.executable, __file__, "search", "--epochs", number]
            words += ["--work", home / f"{number}-{i}"]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append(tuple(found[-1]))
            epochs[number].append([round(rss / 2**20) for rss, _ in found])
    rss = {number: median(row[0] for row in rows) for number, rows in ends.items()}
    files = {number: median(row[1] for row in rows) for number, rows in ends.items()}
    return {
        "rss_mib": {number: value / 2**20 for number, value in rss.items()},
        "open_files": files,
        "rss_ratio": rss[50] / rss[5],
        "rss_mib_after_each_epoch": epochs,
    }


def run_kills(home: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "pytest", "-n", "0", "-s", "-k", "a_search or a_fine_tuning"]
    words += ["-p", "no:cacheprovider", f"--basetemp={home / 'tmp'}", "tests/runs/test_kills.py"]
    environment = os.environ | {"HALOC_SLOW": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    pattern = r"(\d+) moments, (\d+) of them while a file was written, (\d+) folders"
    keys = ("moments", "while a file was written", "folders")
    counts = [
        dict(zip(keys, map(int, found), strict=True)) for found in re.findall(pattern, done.stdout)
    ]
    passed = re.search(r"\d+ passed.*|\d+ failed.*", done.stdout)
    if done.returncode:
        print(done.stdout[-3000:])
    rows = dict(zip(("search", "fine-tuning"), counts, strict=False))
    return {**rows, "tests": passed[0] if passed else done.stdout[-300:]}


def main(
    part: Annotated[str, typer.Argument(help=", ".join(PARTS))] = "",
    work: Annotated[Path | None, typer.Option(help="folder for what the part leaves")] = None,
    out: Annotated[Path, typer.Option(help="JSON lines, appended to")] = RAW,
    epochs: Annotated[int, typer.Option(hidden=True)] = 0,
    report: Annotated[bool, typer.Option(help="print the rows, run nothing")] = False,
) -> None:
    if report or work is None:
        print(out.read_text() if out.exists() else "no rows")
        return
    work = work.absolute()
    if part == "search":
        search_alone(work, epochs)
        return
    home = work / part
    home.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    begin, load = time.monotonic(), os.getloadavg()[0]
    row = {"part": part, **globals()[f"run_{part}"](home)}
    row |= {"seconds": round(time.monotonic() - begin), "load": [load, os.getloadavg()[0]]}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
