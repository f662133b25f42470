"""Two processes, each on a machine of its own, as far as they know."""

import contextlib
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist
from detectron2.utils import comm

SECONDS = 60


@contextlib.contextmanager
def two_machines(directory: Path) -> Iterator[Callable]:
    """``run(function, *arguments)`` calls ``function(rank, *arguments)`` in both of two processes,
    and returns what it returned, or raised, in each."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, there, directory / "meeting"))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)

    def run(function: Callable, *arguments) -> list:
        for pipe in pipes:
            pipe.send((function, arguments))
        assert all(pipe.poll(SECONDS) for pipe in pipes), "a process waits for the other one"
        return [pipe.recv() for pipe in pipes]

    try:
        yield run
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(rank: int, pipe: Connection, meeting: Path) -> None:
    options = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=SECONDS)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **options)
    comm.create_local_process_group(1)
    socket.gethostname = lambda: "ab"[rank]
    while True:
        function, arguments = pipe.recv()
        try:
            outcome = function(rank, *arguments)
        except Exception as error:
            outcome = error
        pipe.send(outcome)
