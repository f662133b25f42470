"""Processes that torchrun has started again, beside the store of its agent, which stays."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from gn_detect.engine.meeting import Place, meet


@pytest.mark.parametrize("attempts", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_machines_meet_again(attempts, monkeypatch):
    """torchrun counts a restart where a process has failed, but not on the other machines if they
    hear of it from torchrun before their own processes have failed, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    url = f"tcp://127.0.0.1:{port}"
    for now in ((0, 0), attempts):
        places = [Place(rank, 2, 0, rank, url, "torchrun", a) for rank, a in enumerate(now)]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda place: meet(place, 30), places))
        assert [machines for _, machines, _ in found] == [[0, 1]] * 2
        assert {store.add("calls", 1) for store, *_ in found} == {1, 2}  # of one, new store
        found.clear()  # the processes are gone, and the first one's store with them
    assert agent.num_keys()
