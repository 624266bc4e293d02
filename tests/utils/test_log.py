"""The log of a job is its own."""

import logging

from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.job import logged
from nni_haloc.utils.log import logger


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
