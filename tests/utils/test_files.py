"""Files are written whole, synced, under names of their own, and never through a link."""

import errno
import json
import math
import os
import resource
import stat
import sys
import threading

import pytest
from safetensors.torch import save_file
from torch import zeros

from nni_haloc.utils import files
from nni_haloc.utils.errors import HalocError, SettingsError
from nni_haloc.utils.files import (
    check_no_link,
    is_number,
    make_folder,
    open_to_append,
    read_json,
    read_text,
    scratch,
    whole,
    write_json,
)
from nni_haloc.utils.locks import hold_folder


@pytest.fixture
def outside(tmp_path):
    """A folder elsewhere with one file, which must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("precious")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "precious"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_link_in_the_place_of_a_file_is_replaced(run, outside):
    (run / "report.html").symlink_to(outside / "file")
    (run / "hard.json").hardlink_to(outside / "file")
    for name in ("report.html", "hard.json"):
        with whole(run / name) as part:
            part.write_text("page")
        assert not (run / name).is_symlink()
        assert (run / name).read_text() == "page"


@pytest.fixture
def umask():
    """Set the process's mask of permissions for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


MODES = [0o600, 0o640, 0o644, 0o664, 0o666, 0o755, 0o777, 0o444, 0o400]


@pytest.mark.skipif(os.name == "nt", reason="has no such permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0])
@pytest.mark.parametrize("mode", [*MODES, 0o4755, 0o2775, 0o1666])
def test_a_file_that_is_replaced_keeps_who_may_do_what(run, umask, mode, mask):
    (run / "a.json").write_text("old")
    (run / "a.json").chmod(mode)
    umask(mask)
    with whole(run / "a.json") as part:
        # Nobody can read what is being written who could not read the file.
        assert stat.S_IMODE(part.stat().st_mode) & ~(mode | 0o600) == 0
        part.write_text("new")
    assert stat.S_IMODE((run / "a.json").stat().st_mode) == mode & 0o777
    assert (run / "a.json").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="has no such permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0])
@pytest.mark.parametrize("there", ["nothing", "a link", "a dangling link"])
def test_a_new_file_has_the_permissions_that_the_process_gives(run, outside, umask, mask, there):
    (outside / "file").chmod(0o640)
    if there != "nothing":
        (run / "a.json").symlink_to(outside / ("file" if there == "a link" else "none"))
    umask(mask)
    write_json(run / "a.json", {})
    assert stat.S_IMODE((run / "a.json").lstat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((outside / "file").stat().st_mode) == 0o640


def test_permissions_of_a_library_that_writes_are_kept_too(run):
    (run / "w.safetensors").write_text("old")
    (run / "w.safetensors").chmod(0o640)
    with whole(run / "w.safetensors") as part:
        save_file({"a": zeros(1)}, part)
    assert stat.S_IMODE((run / "w.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["file.part", "file.123.part", "file.123-00c0ffee.part"])
def test_a_link_under_the_name_of_a_partly_written_file_is_not_followed(run, outside, name):
    (run / name).symlink_to(outside / "file")
    write_json(run / "file", {})
    assert json.loads((run / "file").read_text()) == {}


def test_a_name_that_is_taken_is_refused_and_not_opened(run, outside, monkeypatch):
    """Also where somebody could foresee the name."""
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    (run / f"file.{os.getpid()}-00000000.part").symlink_to(outside / "file")
    with pytest.raises(FileExistsError) as caught:
        write_json(run / "file", {})
    assert caught.value.filename == str(run / "file")


@pytest.mark.parametrize("place", ["export", "front/0.5", "a/b/c"])
def test_a_link_in_the_place_of_a_runs_folder_is_refused(run, outside, place):
    link = run / place.split("/")[0]
    link.symlink_to(outside)
    with hold_folder(run):
        for write in (
            lambda: write_json(run / place / "file", {}),
            lambda: make_folder(run / place / "new"),
            lambda: open_to_append(run / place / "log.txt"),
        ):
            with pytest.raises(SettingsError, match="found a link to .*outside; delete it") as said:
                write()
            assert str(said.value).startswith(f"{link}: ")


def test_the_folder_that_the_user_names_may_be_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    with hold_folder(tmp_path / "link"):
        write_json(tmp_path / "link" / "file", {})
    assert (run / "file").is_file()
    check_no_link(tmp_path / "link")


def test_a_link_with_two_dots_does_not_lead_out(run, outside):
    (run / "up").symlink_to("..")
    with hold_folder(run), pytest.raises(SettingsError, match="found a link"):
        write_json(run / "up" / "outside" / "file", {})


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling", "folder", "fifo"])
def test_nothing_is_appended_to_what_is_no_file_of_its_own(run, outside, kind):
    log = run / "log.txt"
    if kind == "symbolic":
        log.symlink_to(outside / "file")
    elif kind == "hard":
        log.hardlink_to(outside / "file")
    elif kind == "dangling":
        log.symlink_to(outside / "new")
    elif kind == "folder":
        log.mkdir()
    else:
        os.mkfifo(log)
    with pytest.raises((SettingsError, IsADirectoryError)) as caught:
        open_to_append(log)
    assert str(log) in str(caught.value)


def test_each_file_and_its_folder_are_synced_before_anything_counts_on_them(run, monkeypatch):
    """The order is what matters after a power cut: the content, then the name."""
    events = []

    def kind(number):
        return "folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"

    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(kind(number)), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("name"), replace(*names)))
    write_json(run / "file", {})
    assert events == ["file", "name", "folder"]


@pytest.mark.parametrize("content", [{"a": math.nan}, {"a": {1, 2}}, {"a": b"x"}])
def test_what_json_can_not_hold_is_one_line_and_the_old_file_stays(run, content):
    write_json(run / "file", {"old": 1})
    with pytest.raises(HalocError, match="file: can't be written"):
        write_json(run / "file", content)
    assert read_json(run / "file") == {"old": 1}


def test_a_library_that_writes_gets_a_file_and_leaves_nothing_else(run):
    with whole(run / "weights.safetensors") as part:
        assert part.stat().st_size == 0
        save_file({"a": zeros(3)}, part)
    assert [path.name for path in run.iterdir()] == ["weights.safetensors"]


def test_threads_that_write_one_file_do_not_disturb_each_other(run):
    """Each has a file of its own, and a reader sees none of them half written."""
    errors = []

    def write(number):
        try:
            for _ in range(20):
                write_json(run / "file", {"number": number, "text": "x" * 10_000})
                assert len(read_json(run / "file")["text"]) == 10_000
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in run.iterdir()] == ["file"]


def test_a_scratch_folder_is_private_and_goes(run):
    with scratch(run / "int8.onnx") as folder:
        assert folder.parent == run
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "prepared").write_text("x")
    assert list(run.iterdir()) == []


def test_what_a_killed_process_left_is_removed_at_once_where_nobody_else_works(run, outside):
    left = [run / name for name in ("a.9-0a.part", "a.9.part", "a.part", "a.7-1b.part")]
    for path in left[:2]:
        path.write_text("{")
    left[2].symlink_to(outside / "file")
    left[3].mkdir()
    (left[3] / "prepared").write_text("x")
    (run / "b.9-0a.part").write_text("of another file")
    write_json(run / "a", {})
    assert all(path.is_symlink() or path.exists() for path in left)
    with hold_folder(run):
        write_json(run / "a", {})
    assert {path.name for path in run.iterdir()} == {"a", "b.9-0a.part"}


def test_what_somebody_else_has_put_beside_a_file_stays(run, tmp_path):
    """However old it is, and in a folder where nobody else works, too."""
    for folder in (run, tmp_path):
        mine = folder / "report.html.part"
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
        os.utime(mine, (1, 1))
        write_json(folder / "report.html", {})
        assert (mine / "notes.txt").read_text() == "mine"
    (tmp_path / "a.json.part").write_text("a download")
    os.utime(tmp_path / "a.json.part", (1, 1))
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json.part").exists()


def test_a_file_larger_than_allowed_is_refused_and_the_old_one_stays(run):
    """What a quota does, too."""
    write_json(run / "file", {"old": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_json(run / "file", {"text": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(run / "file"))
    assert read_json(run / "file") == {"old": 1}
    assert [path.name for path in run.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["file/below", "folder"])
def test_a_file_for_a_folder_and_a_folder_for_a_file_are_named(run, place):
    (run / "file").touch()
    (run / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_json(run / place, {})
    assert caught.value.filename == str(run / place.partition("/")[0])
    with pytest.raises(FileExistsError):
        make_folder(run / "file")


def test_text_is_utf8_of_a_bounded_size(tmp_path):
    file = tmp_path / "text"
    for data, text in ((b"\xef\xbb\xbfa: 1", "a: 1"), ("é".encode(), "é"), (b"", "")):
        file.write_bytes(data)
        assert read_text(file) == text
    for data, message in (
        ("a: é".encode("latin-1"), "line 1: expected text in UTF-8, found byte 0xe9"),
        (b"a\nb\n\xff", "line 3: expected text in UTF-8, found byte 0xff"),
        ("a: 1".encode("utf-16"), "found UTF-16; save it as UTF-8"),
        (b"x" * 101, "expected at most 100 bytes, found more"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_text(file, 100)


def test_no_more_of_a_file_is_read_than_its_bound():
    with pytest.raises(ValueError, match="expected at most 1,000 bytes"):
        read_text("/dev/zero", 1000)


def test_a_number_is_one_that_a_float_can_hold():
    for value in (1, -0.5, 0, 10**308, 5e-324, -sys.float_info.max):
        assert is_number(value)
        assert math.isfinite(float(value))
    for value in (10**400, -(10**400), math.nan, math.inf, -math.inf, True, "1", None, 1j, [1]):
        assert not is_number(value)


def test_folders_are_noted_for_a_blocks_time_alone(run):
    with hold_folder(run), hold_folder(run):
        assert run in files.own_folders
    assert run not in files.own_folders


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_of_weights_has_the_permissions_that_the_process_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        with whole(tmp_path / "new.safetensors") as part:
            save_file({"a": zeros(2)}, part)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == 0o666 & ~mask
