"""Processes that torchrun has started again, beside the store of its agent, which stays."""

import multiprocessing
import socket

import pytest
from torch.distributed import TCPStore

from gn_detect.engine.meeting import Place, meet


def come(pipe, rank: int, attempt: int, url: str) -> None:
    store, machines, _ = meet(Place(rank, 2, 0, rank, url, "torchrun", attempt), 30)
    pipe.send((machines.count(rank), store.add("calls", 1)))
    pipe.recv()  # until all have met


@pytest.fixture
def start(monkeypatch):
    """Let two machines meet, whose agents count so many restarts; what they found."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    context = multiprocessing.get_context("fork")
    processes = []

    def start(*attempts: int) -> list:
        pipes = []
        for rank, attempt in enumerate(attempts):
            here, there = context.Pipe()
            arguments = (there, rank, attempt, f"tcp://127.0.0.1:{port}")
            processes.append(context.Process(target=come, args=arguments))
            processes[-1].start()
            there.close()
            pipes.append(here)
        assert all(pipe.poll(60) for pipe in pipes)
        found = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send("all have met")
        for process in processes:
            process.join()
        return found

    yield start
    for process in processes:
        process.kill()
    assert agent.num_keys()


@pytest.mark.parametrize("attempts", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_machines_meet_again(start, attempts):
    """torchrun counts a restart where a process has failed, but not on the other machines if they
    hear of it from torchrun before their own processes have failed, too."""
    for now in ((0, 0), attempts):
        found = start(*now)
        assert {size for size, _ in found} == {1}
        assert {calls for _, calls in found} == {1, 2}  # of one store, and a new one
