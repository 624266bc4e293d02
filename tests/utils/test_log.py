"""The log of a job is its own, and each record is one line of it."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.job import logged
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.log import OneLine, logger


def test_jobs_in_one_process_have_a_log_each_and_leave_logging_as_it_was(tmp_path, capsys):
    before = logger.level, logger.propagate, logger.disabled, list(logger.handlers)
    for name in ("one", "two"):
        with logged(RunFolder(tmp_path / name)):
            logger.info("in %s", name)
    assert (logger.level, logger.propagate, logger.disabled, logger.handlers) == before
    assert not logger.isEnabledFor(logging.INFO)
    for name in ("one", "two"):
        assert [
            line.split(" ", 1)[1] for line in (tmp_path / name / "log.txt").read_text().splitlines()
        ] == [f"INFO in {name}"]
    assert len(capsys.readouterr().err.splitlines()) == 2


EVIL = [
    "a\n00:00:00 INFO all is well",
    "\x1b[2J\x1b[31mred",
    "a\r\nb",
    "a\u2028b\u2029c\x85d",
    "\u202eslipped",
    "half \ud800",
    "\0",
    "a\tb",
]


@given(st.one_of(st.sampled_from(EVIL), st.text(max_size=50)))
def test_whatever_is_logged_is_one_line_that_can_be_shown(message):
    """Such as a class's name, a layer's, or what another library says."""
    record = logging.makeLogRecord({"msg": "class %s", "args": (message,), "levelname": "INFO"})
    line = OneLine().format(record)
    assert line.isprintable()
    assert line.splitlines() == [line]
    assert " INFO class " in line
    if message.isprintable():
        assert line.endswith(f"class {message}")


def test_a_line_of_the_log_file_can_not_be_forged(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    with logged(folder):
        for text in EVIL:
            logger.warning("no image of class %s", text)
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logger.exception("it failed")
    lines = folder.log.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(EVIL) + 1
    assert all(line.isprintable() and line[8:].startswith((" WARNING", " ERROR")) for line in lines)
    assert capsys.readouterr().err.splitlines() == lines


def test_a_line_has_an_end():
    record = logging.makeLogRecord({"msg": "x" * 10**6})
    assert len(OneLine().format(record)) <= 10_000


@pytest.mark.parametrize("kind", ["link", "folder", "file above"])
def test_a_log_that_can_not_be_written_is_one_line(tmp_path, kind):
    folder = RunFolder(tmp_path / "run")
    if kind == "file above":
        folder.path.touch()
    else:
        folder.path.mkdir()
        folder.log.mkdir() if kind == "folder" else folder.log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match=f"{folder.path}") as caught, logged(folder):
        pass
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "elsewhere").exists()
