"""Processes that learn of each other's end, also while they wait for each other for ever."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch.distributed as dist

from gn_detect.checkpoint.saving import write_atomically
from gn_detect.config import ConfigError
from gn_detect.engine import errors_as_sentences, stopping, watch
from gn_detect.engine.errors import set_run_directory
from gn_detect.engine.stopping import handle_signals

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")
NAMES = ["rank 0 (a)", "rank 1 (a)", "rank 2 (b)"]
MACHINES = [0, 0, 1]


def fine():
    pass


def hang():
    """As in a collective operation: no signal handler of Python runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    threading.Event().wait()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def refused():
    raise ConfigError("A.KEY is wrong")


def broken():
    raise ZeroDivisionError("a fault of the code")


def disconnected():
    """What gloo raises in the others."""
    time.sleep(0.2)
    raise RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:29591")


def saving(path):
    """Longer than others are waited for."""
    write_atomically(path, lambda file: (time.sleep(1.5), file.write(b"whole")))
    hang()


def stopped():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def run(rank, work, directory):
    sys.stderr = open(directory / f"{rank}.err", "w")
    set_run_directory(str(directory))
    store = dist.FileStore(str(directory / "store"), len(NAMES))
    logging.getLogger("gn_detect").addHandler(logging.StreamHandler(sys.stderr))
    watch.GRACE = stopping.GRACE = 0.5
    with errors_as_sentences(), handle_signals():
        with watch.Watch(store, rank, NAMES, MACHINES, "127.0.0.1").over():
            work()


@pytest.fixture
def end(tmp_path):
    """Run three processes to their end; their exit codes and what they said."""
    children = []

    def end(*works):
        for rank, work in enumerate(works):
            children.append(FORK.Process(target=run, args=(rank, work, tmp_path)))
            children[-1].start()
        for child in children:
            child.join(20)
        said = [(tmp_path / f"{rank}.err").read_text() for rank in range(len(works))]
        return [child.exitcode for child in children], said

    yield end
    for child in children:
        child.kill()


def test_what_a_process_says_before_it_is_accepted_is_heard(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    found = []
    accepting = threading.Thread(target=lambda: found.append(watch._accept(store, 2)))
    accepting.start()
    port, token = json.loads(store.get("watch"))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f'{token} 1\n["stopped", 1, "15"]\n'.encode())
        accepting.join(10)
        with found[0][1] as accepted:
            assert accepted.recv(4096) == b'["stopped", 1, "15"]\n'


def test_processes_that_end_well(end):
    assert end(fine, fine, fine) == ([0, 0, 0], ["", "", ""])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_that_is_killed(end, rank):
    works = [hang, disconnected, hang]
    works[rank] = killed
    codes, said = end(*works)
    assert codes == [-signal.SIGKILL if r == rank else 1 for r in range(3)]
    whose = f"{NAMES[rank]} was killed, or its machine is gone; there is no checkpoint yet"
    assert whose in said[0 if rank else 1] and "Traceback" not in "".join(said)
    assert whose in said[0 if rank == 2 else 2]  # on the other machine


def test_a_file_that_is_being_saved_is_finished(end, tmp_path):
    path = str(tmp_path / "model_final.pth")
    codes, _ = end(lambda: saving(path), killed, hang)
    assert codes == [1, -signal.SIGKILL, 1]
    assert (tmp_path / "model_final.pth").read_bytes() == b"whole"


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("fault, text", [(refused, "A.KEY is wrong"), (broken, "a fault of the")])
def test_one_that_fails(end, rank, fault, text):
    works = [hang] * 3
    works[rank] = fault
    codes, said = end(*works)
    assert codes == [1, 1, 1]
    assert text in said[rank] and ("Traceback" in said[rank]) == (fault is broken)
    assert said[rank].count("Error: " * (fault is broken) + text) == 1


def test_what_all_have_found_is_said_once(end):
    codes, said = end(refused, refused, refused)
    assert codes == [1, 1, 1]
    said_once = "error: A.KEY is wrong\n"
    assert said == [said_once, "", said_once]  # on each machine


def test_a_lost_connection_that_nobody_explains(end):
    codes, said = end(hang, disconnected, hang)
    assert codes == [1, 1, 1]
    assert said[1].startswith("error: the connection to another process was lost ([pair.cc:561]")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_stops_stops_all(end, rank):
    """Those that can stop at once, and those that wait for others."""
    works = [lambda: time.sleep(60), hang, hang]
    works[rank], works[1 - rank] = stopped, works[0]
    codes, said = end(*works)
    assert codes == [143, 143, 143]
    assert "SIGTERM: stopped before the first step" in said[0]
