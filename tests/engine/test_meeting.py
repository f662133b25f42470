"""Who a process is in a run, and what happens where the processes do not find each other."""

import logging
import multiprocessing
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gn_detect.config import ConfigError
from gn_detect.engine import meeting
from gn_detect.engine.errors import ProcessesError
from gn_detect.engine.meeting import Place, first_host, meet

# Of two machines with two processes each, the first process of the second machine; as torchrun and
# srun state it.
TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[1-2]",
    "SLURM_JOB_ID": "100",
    "SLURM_STEP_ID": "0",
}
SECOND_MACHINE = {"rank": 2, "world_size": 4, "local_rank": 0, "machine": 1}


def without(env: dict, *names: str) -> dict:
    return {name: value for name, value in env.items() if name not in names}


def test_place_of_torchrun():
    place = Place.of_torchrun(TORCHRUN)
    assert place == Place(**SECOND_MACHINE, url="tcp://gpu1:1234", started_by="torchrun")
    assert Place.of_torchrun(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2
    # What sets no more than PyTorch's env:// needs.
    place = Place.of_torchrun(without(TORCHRUN, "GROUP_RANK", "MASTER_PORT"))
    assert (place.machine, place.url) == (0, "tcp://gpu1:29500")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"])
def test_no_place_of_torchrun(name):
    assert Place.of_torchrun(without(TORCHRUN, name)) is None


def test_place_of_slurm():
    place = Place.of_slurm(SRUN)
    assert place == Place(**SECOND_MACHINE, url=place.url, started_by="srun")
    assert place.host == "gpu1"
    # All tasks of a step find the same port, those of other steps and jobs another one.
    ports = {Place.of_slurm(SRUN | {"SLURM_PROCID": str(rank)}).url for rank in range(4)}
    for other in ({"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "101"}):
        ports.add(Place.of_slurm(SRUN | other).url)
    assert len(ports) == 3
    named = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert Place.of_slurm(SRUN | named).url == "tcp://10.0.0.1:1234"
    # A step on some of the machines of its job.
    assert Place.of_slurm(SRUN | {"SLURM_STEP_NODELIST": "gpu2"}).host == "gpu2"


@pytest.mark.parametrize(
    "env",
    [
        {},
        without(SRUN, "SLURM_PROCID"),
        without(SRUN, "SLURM_LOCALID"),
        without(SRUN, "SLURM_NODELIST"),
        without(SRUN, "SLURM_NTASKS"),
        SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_no_place_of_slurm(env):
    assert Place.of_slurm(env) is None


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[7-9]", "gpu7"),
        ("gpu[007-012,20]", "gpu007"),
        ("gpu[3,7]", "gpu3"),
        ("gpu[12]", "gpu12"),
        ("rack[0-1]node[3-4]", "rack0node3"),
        ("gpu[03-05,9]-ib,login", "gpu03-ib"),
        ("login,gpu[1-2]", "login"),
        ("a-1.example.org,a-2.example.org", "a-1.example.org"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@pytest.fixture
def url():
    """Of a port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"tcp://127.0.0.1:{port}"


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def place(rank: int, world_size: int, url: str, started_by: str = "torchrun", **kwargs) -> Place:
    """On the one machine of a run."""
    return Place(rank, world_size, rank, 0, url, started_by, **kwargs)


def meet_all(places: list[Place], timeout: float = 20) -> list:
    """What ``meet`` returns or raises in each of ``places``, each in a thread of its own."""

    def outcome(place: Place):
        try:
            return meet(place, timeout)
        except ProcessesError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(outcome, places))


def of_machines(machines: list[int], url: str) -> list[Place]:
    """The processes of a run, by the machine of each."""
    local_ranks = [machines[:rank].count(machine) for rank, machine in enumerate(machines)]
    return [
        Place(rank, len(machines), local_rank, machine, url, "srun")
        for rank, (machine, local_rank) in enumerate(zip(machines, local_ranks, strict=True))
    ]


def test_all_meet(url):
    outcomes = meet_all(of_machines([0, 0, 1, 1], url))
    host = socket.gethostname()
    for store, machines, names in outcomes:
        assert machines == [0, 0, 1, 1]
        assert names == [f"rank {rank} ({host}, process {os.getpid()})" for rank in range(4)]
        assert store.add("calls", 1)
    assert outcomes[0][0].add("calls", 0) == 4  # it is one store


def test_processes_of_one_machine_meet_without_a_port(tmp_path):
    url = f"file://{tmp_path}/store"
    outcomes = meet_all([place(rank, 2, url, "--num-gpus") for rank in range(2)])
    assert [machines for _, machines, _ in outcomes] == [[0, 0]] * 2


@pytest.mark.parametrize(
    "machines, counts",
    [([0, 0, 1], "machine 0 has 2, machine 1 has 1"), ([0, 1, 0, 1], "machine 0 has 2")],
)
def test_machines_that_are_not_alike(machines, counts, url):
    messages = meet_all(of_machines(machines, url))
    assert counts in messages[0]
    # Others may find that the first process, which has said it, is gone.
    either = r"the same number of processes, in the order of the ranks|rank 0 at .* has ended"
    assert all(re.search(either, message) for message in messages)


def test_machine_without_cuda(url, monkeypatch):
    """Such as one whose driver is broken: it would train on its CPU, or not be reached."""
    found = iter([True, False])
    monkeypatch.setattr("torch.cuda.is_available", lambda: next(found))
    messages = meet_all([place(rank, 2, url) for rank in range(2)])
    said = f"there is no CUDA device on {socket.gethostname()}, but on other machines there is"
    assert said in messages


def test_two_of_one_rank(url):
    """The first comes to nothing either: it says who is missing."""
    first, *outcomes = meet_all([place(rank, 3, url) for rank in (0, 1, 1)], timeout=2)
    assert f"rank 2 of 3 did not come to {url}" in first
    (second,) = (message for message in outcomes if "second of this rank" in message)
    host = socket.gethostname()
    assert f"rank 1 of 3 on {host} (process {os.getpid()}) comes to {url}" in second


def test_another_number_of_processes_on_each_machine(url):
    """--num-gpus 1 on the first, 2 on the second."""
    first, *others = meet_all([place(0, 2, url), *(place(rank, 4, url) for rank in (2, 3))])
    refused = rf"rank [23] of 4 on \S+ \(process \d+\) meets rank 0 of 2 processes at {url}: start"
    assert re.match(refused, first)
    # One that is late may find that the first process, which has said it, is gone.
    assert any(re.match(refused, message) for message in others)


@pytest.mark.parametrize(
    "env, message",
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', no number"),
        ({"RANK": "4"}, "torchrun has started rank 4 of 4 process"),
    ],
)
def test_variables_that_are_wrong(env, message):
    with pytest.raises(ConfigError, match=message):
        Place.of_torchrun(TORCHRUN | env)


def test_a_machine_that_is_not_counted_from_0(url):
    with pytest.raises(ConfigError, match="--machine-rank gives rank 2 of 2 process"):
        place(2, 2, url, "--num-gpus")


def test_port_in_use(url):
    with socket.create_server(("127.0.0.1", port_of(url))):
        start = time.monotonic()
        with pytest.raises(ProcessesError, match="Address already in use.*another run"):
            meet(place(0, 2, url), 20)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "host, started_by, key",
    [
        ("192.0.2.1", "--num-gpus", "--dist-url"),  # for documentation, RFC 5737
        ("no-such-host.invalid", "srun", "MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_address_of_another_machine(host, started_by, key):
    url = f"tcp://{host}:29500"
    with pytest.raises(ProcessesError) as error:
        meet(place(0, 2, url, started_by), 20)
    message = f"rank 0 on {socket.gethostname()} cannot listen at {url}"
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(f"name an address of the machine of rank 0 ({key})")


@pytest.mark.parametrize(
    "started_by, remedy",
    [
        ("--num-gpus", "start the same command on each machine, with its --machine-rank"),
        ("torchrun", "start the same command with torchrun on each machine"),
        ("srun", "start all tasks with srun"),
    ],
)
def test_nobody_comes(started_by, remedy, url):
    start = time.monotonic()
    with pytest.raises(ProcessesError) as error:
        meet(place(0, 3, url, started_by), 1)
    assert str(error.value) == (
        f"rank 1, 2 of 3 did not come to {url} within 1 s: {remedy}; --dist-timeout waits longer"
    )
    assert 1 <= time.monotonic() - start < 5


def test_no_first_process(url):
    start = time.monotonic()
    with pytest.raises(ProcessesError) as error:
        meet(place(1, 2, url), 1)
    assert f"did not find rank 0 at {url} within 1 s (Connection refused)" in str(error.value)
    assert "(MASTER_ADDR, MASTER_PORT)" in str(error.value)
    assert 1 <= time.monotonic() - start < 5


def test_it_says_for_whom_it_waits(url, monkeypatch, caplog):
    monkeypatch.setattr(meeting, "_REMIND", 0.1)
    caplog.set_level(logging.WARNING, logger=meeting.__name__)

    def logged(text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    places = [place(rank, 3, url) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        second = pool.submit(meet, places[1], 20)
        logged(f"rank 1 on {socket.gethostname()} waits for rank 0 at {url} (Connection refused)")
        first = pool.submit(meet, places[0], 20)
        logged(f"waiting for rank 2 of 3 at {url}, 0 s by now")
        third = pool.submit(meet, places[2], 20)
        assert len({tuple(names) for _, _, names in (x.result() for x in (first, second, third))})


def test_first_process_gives_up(url):
    """Others that wait longer learn it at once."""

    def give_up() -> None:
        try:
            meet(place(0, 3, url), 1)
        except ProcessesError:
            os._exit(7)

    first = multiprocessing.get_context("fork").Process(target=give_up)
    first.start()
    start = time.monotonic()
    with pytest.raises(ProcessesError, match=f"rank 0 at {url} has ended while others were coming"):
        meet(place(1, 3, url), 60)
    assert time.monotonic() - start < 20
    first.join()
    assert first.exitcode == 7
