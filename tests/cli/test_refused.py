"""A full disk or a read-only folder: one line that says where, status 2, and no file is lost."""

import json
import os
import shutil
import subprocess
from contextlib import suppress

import pytest
import yaml
from helpers.commands import haloc
from helpers.paths import DIGITS
from helpers.short_runs import SHORT
from safetensors.torch import load_file

from nni_haloc.utils import files
from nni_haloc.utils.files import whole, write_json

MEASURE = [
    "--model",
    "digits_cnn",
    "--input",
    "1x8x8",
    "--min-run-time",
    0,
    "--threads",
    1,
    "--out",
    "{disk}/finished/measured.json",
]
OUT, FINISHED = "{disk}/out", "{disk}/finished"
ONCE = [*SHORT, "--set", "search.epochs=1", "--set", "finetune.epochs=1"]
COMMANDS = {
    "run anew": ["run", DIGITS, "--out", FINISHED, *SHORT],
    "run to go on": [
        "run",
        DIGITS,
        "--out",
        FINISHED,
        *ONCE,
        "--set",
        "finetune.lr=0.01",
        "--resume",
    ],
    "run": ["run", DIGITS, "--out", OUT, *SHORT],
    "train": ["train", "{disk}/run.yml", "--set", "train.epochs=1"],
    "measure": ["measure", *MEASURE, "--rounds", 2],
    "plot": ["plot", FINISHED],
    "front": ["front", FINISHED, "--budgets", "0.6"],
    "prune": ["prune", FINISHED, "--epochs", 0],
    "quantize": ["quantize", FINISHED, "--set", "quantize.int8=false"],
    "export": ["export", FINISHED, "--format", "onnx,safetensors"],
    "bench": ["bench", FINISHED, "--no-data"],
    "report": ["report", FINISHED],
    "throughput": ["throughput", DIGITS, "--on", "torch", "--out", OUT, *SHORT],
}


def system(*words):
    return (
        subprocess.run([str(word) for word in words], capture_output=True, check=False).returncode
        == 0
    )


@pytest.fixture(scope="module")
def disk(commands, tmp_path_factory):
    """A small disk with a finished run, and settings of a network that is not trained yet."""
    place = tmp_path_factory.mktemp("disk")
    if not system("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place):
        pytest.skip("a small disk needs the right to mount one")
    try:
        commands.done("run", DIGITS, "--out", place / "finished", *ONCE)
        commands.done("measure", *(str(word).format(disk=place) for word in MEASURE), "--rounds", 1)
        settings = yaml.safe_load(DIGITS.read_text()) | {
            "weights": "new.safetensors",
            "rank_space": {},
        }
        (place / "run.yml").write_text(yaml.safe_dump(settings))
        yield place
    finally:
        assert system("umount", place)


@pytest.fixture(params=["No space left on device", "Read-only file system"])
def refusing(disk, request):
    """The disk, full or read-only, and what it says then."""
    filler = disk / "filler"
    if request.param.startswith("Read-only"):
        assert system("mount", "-o", "remount,ro", disk)
        yield disk, request.param
        assert system("mount", "-o", "remount,rw", disk)
    else:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield disk, request.param
        filler.unlink()
        for name in ("out", "new-training"):
            shutil.rmtree(disk / name, ignore_errors=True)


def contents(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", "filler")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_disk_refuses_is_one_line_and_loses_nothing(commands, refusing, name):
    disk, reason = refusing
    before = contents(disk / "finished")
    lines = commands.refused(*(str(word).format(disk=disk) for word in COMMANDS[name]))
    assert lines[-1].startswith("haloc: ")
    assert str(disk) in lines[-1]
    assert reason in lines[-1]
    assert not any("Traceback" in line or "Logging error" in line for line in lines)
    assert contents(disk / "finished") == before


def test_a_front_of_a_folder_that_is_read_only_is_put_elsewhere(commands, disk, tmp_path):
    assert system("mount", "-o", "remount,ro", disk)
    try:
        commands.done("front", disk / "finished", "--budgets", "0.6", "--out", tmp_path)
    finally:
        assert system("mount", "-o", "remount,rw", disk)
    assert load_file(tmp_path / "0.6" / "weights.safetensors")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("not JSON")])
def test_a_file_that_could_not_be_written_to_its_end_is_the_old_one(tmp_path, error):
    path = tmp_path / "file.json"
    write_json(path, {"version": 1})

    def cut_off():
        with whole(path) as part:
            part.write_text("half of it")
            raise error

    with pytest.raises(type(error)):
        cut_off()
    assert json.loads(path.read_text()) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        "I/O error (os error 28)",
    ],
)
def test_a_librarys_error_about_a_full_disk_names_the_file(tmp_path, text):
    """torch raises its own while it handles the system's, safetensors has only the number."""

    def write():
        with whole(tmp_path / "file") as part:
            try:
                raise (
                    OSError(28, "No space left on device") if "os error" not in text else ValueError
                )
            except (OSError, ValueError):
                part.write_text("")
                raise RuntimeError(text)  # noqa: B904

    with pytest.raises(OSError, match="No space left on device") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "file")


def test_what_a_killed_process_left_of_a_file_is_removed_later(tmp_path):
    old, new, other = (
        tmp_path / name
        for name in ("costs.json.11.part", "costs.json.12.part", "xcosts.json.11.part")
    )
    for path in (old, new, other):
        path.write_text("{")
    for path in (old, other):
        os.utime(path, (0, path.stat().st_mtime - files._ABANDONED - 1))
    write_json(tmp_path / "costs.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"costs.json", new.name, other.name}


def test_the_log_of_a_full_disk_is_told_once(tmp_path, capsys):
    from nni_haloc.utils.log import _File

    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    import logging

    handler = _File("/dev/full")
    for _ in range(3):
        handler.handle(logging.makeLogRecord({"msg": "a line"}))
    assert (
        capsys.readouterr().err
        == "/dev/full: no log from here on: [Errno 28] No space left on device\n"
    )


@pytest.mark.parametrize("command", ["export", "bench", "prune", "quantize"])
def test_a_folder_made_by_code_of_ones_own_asks_for_it(tmp_path, command):
    (tmp_path / "model.json").write_text('{"name": "shapenet:ShapeNet", "arguments": {}}')
    done = haloc(command, tmp_path)
    remedy = "add --code FOLDER-OF-THE-CODE to run it"
    message = f"{tmp_path} was made by code of your own, shapenet:ShapeNet; {remedy}"
    assert (done.returncode, done.stderr) == (2, f"haloc: {message}\n")
