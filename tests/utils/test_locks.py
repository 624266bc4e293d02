"""One process works in a folder; another is told which one, or waits for it."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from nni_haloc.utils import locks
from nni_haloc.utils.errors import HalocError, SettingsError
from nni_haloc.utils.locks import LOCK_FILE, hold_file, hold_folder

HOLD = (
    "import sys; from nni_haloc.utils.locks import hold_file, hold_folder\n"
    "with {what}(sys.argv[1]):\n"
    "    print('in', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder():
    """Start processes that hold a folder or a file until their standard input ends."""
    started = []

    def start(path, what="hold_folder", **environment):
        words = [sys.executable, "-c", HOLD.format(what=what), str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, env=os.environ | environment, **pipes))
        assert started[-1].stdout.readline() == b"in\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_which_one_works_there(tmp_path, holder):
    first = holder(tmp_path)
    with pytest.raises(HalocError) as caught, hold_folder(tmp_path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: another process works here (pid {first.pid} on ")
    assert socket.gethostname() in message
    assert ", since 20" in message
    assert "\n" not in message
    first.communicate()
    with hold_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_goes_with_the_process_however_it_ends(tmp_path, holder):
    holder(tmp_path).kill()
    first = holder(tmp_path)  # the file is still there, and says who was killed
    with pytest.raises(HalocError, match=f"pid {first.pid}"), hold_folder(tmp_path):
        pass


def test_a_file_may_be_held_as_well(tmp_path, holder):
    file = tmp_path / "costs.json"
    holder(file, "hold_file")
    with pytest.raises(HalocError, match="costs.json: another process works here"), hold_file(file):
        pass
    with hold_file(tmp_path / "other.json"), hold_folder(tmp_path):
        pass


def test_one_process_may_hold_a_folder_again_under_any_of_its_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with hold_folder(tmp_path / "run"):
        with hold_folder(tmp_path / "link"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).is_file()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_the_first_of_several_processes_of_one_run_holds_it_for_all(tmp_path, holder):
    holder(tmp_path, LOCAL_RANK="0")
    holder(tmp_path, LOCAL_RANK="1")


def test_tasks_of_one_step_of_slurm_work_together(tmp_path, holder):
    """srun starts all processes of a run at once, and each takes itself for the first."""
    step = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    holder(tmp_path, **step, SLURM_PROCID="0")
    holder(tmp_path, **step, SLURM_PROCID="1")
    with pytest.raises(HalocError), hold_folder(tmp_path):
        pass


def test_a_process_that_is_forked_neither_keeps_the_lock_nor_gives_it_up(tmp_path, holder):
    with hold_folder(tmp_path):
        child = os.fork()
        if not child:
            os._exit(1 if locks._held else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / LOCK_FILE).is_file()
        said = subprocess.run(
            [sys.executable, "-c", HOLD.format(what="hold_folder"), str(tmp_path)],
            capture_output=True,
            input=b"",
        )
        assert f"pid {os.getpid()} on" in said.stderr.decode()
    holder(tmp_path)


def test_a_child_that_leaves_the_block_does_not_remove_its_parents_lock(tmp_path):
    with hold_folder(tmp_path):
        if not os.fork():
            try:
                with hold_folder(tmp_path / "other"):
                    raise SystemExit
            finally:
                os._exit(0)
        os.wait()
        assert (tmp_path / LOCK_FILE).is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with hold_folder(tmp_path):
        assert locks.own_folders[tmp_path] is False  # others may be writing, too
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "can't be locked" in caplog.text


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "file")
    with pytest.raises(SettingsError, match="run.lock: .*found a link"):
        hold_folder(tmp_path / "run").__enter__()
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff", b"[" * 2000])
def test_whatever_a_lock_file_says_the_message_is_one_line(tmp_path, holder, content):
    holder(tmp_path)
    (tmp_path / LOCK_FILE).write_bytes(content)
    with pytest.raises(HalocError, match="another process works here; wait"), hold_folder(tmp_path):
        pass


def test_what_a_lock_file_says_forges_no_line(tmp_path, holder):
    holder(tmp_path)
    facts = '{"pid": "1\\n00:00:00 INFO \\u001b[31m", "host": "h", "since": "s"}'
    (tmp_path / LOCK_FILE).write_text(facts)
    with pytest.raises(HalocError) as caught, hold_folder(tmp_path):
        pass
    assert str(caught.value).isprintable()
