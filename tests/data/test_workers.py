"""Loading workers, where processes are signalled and killed around them."""

import os
import select
import signal
import subprocess
import sys

import pytest
from detectron2.data.common import AspectRatioGroupedDataset
from torch.utils.data import DataLoader, IterableDataset

from gn_detect.data.workers import keep_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")


class Endless(IterableDataset):
    """Items that fill the pipe to the parent process, after the number of what has set it up."""

    def __iter__(self):
        return iter(lambda: [*initialized, b"x" * 100_000], None)


initialized = []


def start(wrap=lambda loader: loader):
    """(workers, iterator) of a loader."""
    options = {"batch_size": None, "num_workers": 2, "worker_init_fn": initialized.append}
    loader = wrap(DataLoader(Endless(), **options))
    keep_workers(loader)
    inner = loader if isinstance(loader, DataLoader) else loader.dataset
    iterator = iter(inner)
    return iterator._workers, iterator


def kill(name: str, workers) -> None:
    subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)


@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda x: AspectRatioGroupedDataset(x, 2)])
def test_signals_to_all_processes_are_those_of_the_parent(wrap):
    workers, iterator = start(wrap)
    found = [next(iterator)[0] for _ in range(4)]
    assert found == [0, 1, 0, 1]  # the loader's own function runs, too
    for name in ("TERM", "USR1", "INT"):
        kill(name, workers)
    found = [next(iterator)[0] for _ in range(20)]
    assert found == 10 * [0, 1]
    for worker in workers:
        worker.terminate()  # which is what the exit of the parent does
        worker.join(timeout=60)
        assert worker.exitcode == 0


def test_a_loader_without_workers_and_no_loader():
    loader = DataLoader([1, 2])
    keep_workers(loader)
    assert [int(x) for x in loader] == [1, 2]
    keep_workers([1, 2])


def test_workers_end_with_a_parent_that_was_killed():
    read, write = os.pipe()  # of which they hold an end
    if not (parent := os.fork()):
        os.close(read)
        workers, iterator = start()
        next(iterator)
        os.write(write, " ".join(str(worker.pid) for worker in workers).encode())
        signal.pause()
    os.close(write)
    pids = os.read(read, 100).decode().split()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    ended = select.select([read], [], [], 30)[0]
    if not ended:
        subprocess.run(["kill", "-KILL", *pids])
    assert ended and os.read(read, 1) == b""
    os.close(read)
