"""One run at a time writes into a directory. The other runs are real processes."""

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import socket

import pytest

from gn_detect.checkpoint.lock import _held, lock_output, unlock_output
from gn_detect.config import ConfigError

FORK = multiprocessing.get_context("fork")


class Other:
    """Another process, which does what it is told."""

    def __init__(self):
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def _serve(self, pipe):
        self.pipe.close()
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                os._exit(0)
            try:
                pipe.send(function(*arguments))
            except Exception as error:
                pipe.send(error)

    def __call__(self, function, *arguments):
        self.pipe.send((function, arguments))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self, signal_number=signal.SIGTERM):
        if self.process.is_alive():
            os.kill(self.process.pid, signal_number)
        self.process.join()


@pytest.fixture
def other():
    started = []

    def start():
        started.append(Other())
        return started[-1]

    yield start
    for process in started:
        process.end(signal.SIGKILL)


@pytest.fixture(autouse=True)
def unlocked(tmp_path):
    yield
    for key in [key for key in _held if key[1].startswith(str(tmp_path))]:
        _held.pop(key).close()


def lock_as_job(directory):
    os.environ["SLURM_JOB_ID"] = "7"
    lock_output(directory)


def test_the_second_run_is_refused_by_the_name_of_the_first(tmp_path, other, monkeypatch):
    first, directory = other(), f"{tmp_path}/new/run"
    first(lock_as_job, directory)
    with pytest.raises(ConfigError) as error:
        lock_output(directory)
    who = f"host {socket.gethostname()}, process {first.process.pid}, since 20"
    assert str(error.value).startswith(f"another run is writing into {directory}: {who}")
    assert "SLURM_JOB_ID 7. Wait for it, end it, or name another" in str(error.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="another run is writing into new"):
        lock_output("new/run")  # by another path
    lock_output(f"{tmp_path}/new/other")


def test_a_run_that_ended_leaves_nothing_to_say(tmp_path, other, caplog):
    caplog.set_level("INFO")
    first = other()
    first(lock_output, str(tmp_path))
    first(unlock_output, str(tmp_path))
    second = other()
    second(lock_output, str(tmp_path))
    second(unlock_output, str(tmp_path))
    lock_output(str(tmp_path))
    assert not caplog.records


def test_a_dead_run_is_taken_over(tmp_path, other, caplog):
    caplog.set_level("INFO")
    first = other()
    first(lock_output, str(tmp_path))
    first.end(signal.SIGKILL)
    lock_output(str(tmp_path))
    (record,) = caplog.records
    assert record.levelno == logging.INFO and f"process {first.process.pid}" in record.message
    with pytest.raises(ConfigError, match=f"process {os.getpid()}, since"):
        other()(lock_output, str(tmp_path))


def test_once_more_in_the_same_process(tmp_path, other):
    lock_output(str(tmp_path))
    lock_output(str(tmp_path))
    second = other()
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        second(lock_output, str(tmp_path))
    second(unlock_output, str(tmp_path))  # which is not its own, though it has a copy
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        second(lock_output, str(tmp_path))
    unlock_output(str(tmp_path))
    unlock_output(str(tmp_path))
    second(lock_output, str(tmp_path))
    with pytest.raises(ConfigError, match=f"process {second.process.pid}"):
        lock_output(str(tmp_path))


def with_worker(directory):
    """Lock, and fork a process that outlives this one."""
    lock_output(directory)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.close(writer)
        os.read(reader, 1)  # until the test is over
        os._exit(0)
    return child


def test_what_a_run_has_forked_does_not_hold_its_lock(tmp_path, other):
    first = other()
    child = first(with_worker, str(tmp_path))
    with pytest.raises(ConfigError):
        lock_output(str(tmp_path))
    try:
        # It would end with its parent, whose pipe it reads: it is stopped.
        os.kill(child, signal.SIGSTOP)
        first.end(signal.SIGKILL)
        os.kill(child, 0)
        lock_output(str(tmp_path))
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_directory_that_was_made_anew(tmp_path, other):
    directory = tmp_path / "run"
    lock_output(str(directory))
    (directory / ".lock").unlink()
    directory.rmdir()
    lock_output(str(directory))
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        other()(lock_output, str(directory))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(code, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fail)
    lock_output(str(tmp_path))
    lock_output(str(tmp_path))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "cannot be locked: nothing keeps" in record.message


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"3", b"{", b"by hand"])
def test_what_else_the_file_may_say(content, tmp_path, caplog):
    (tmp_path / ".lock").write_bytes(content)
    with caplog.at_level("INFO"):
        lock_output(str(tmp_path))
    assert "did not come to its end: " in caplog.text


def test_where_nothing_is_locked(tmp_path):
    lock_output("s3://bucket/run")
    unlock_output("s3://bucket/run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run/\.lock, .* cannot be written \(Not a directory\)"):
        lock_output(str(tmp_path / "file" / "run"))
