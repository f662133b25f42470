"""Which process of a run this one is, and how they find each other."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from gn_detect.config import ConfigError

from .errors import ProcessesError

logger = logging.getLogger(__name__)

_REMIND = 10.0  # seconds between messages of who is waited for
_PORT = "gn_detect/port"  # of rank 0, in the store of torchrun's agent


@dataclass(frozen=True)
class Place:
    """Of a process in a run.

    Attributes:
        rank, local_rank: among all processes, and among those of its machine.
        world_size: all processes.
        machine: index of the machine.
        url: where the processes meet: ``tcp://HOST:PORT``, with the machine of rank 0, or, on one
            machine, ``file://PATH``.
        started_by: torchrun, srun or --num-gpus, for messages.
        attempt: how often the processes were started again.
    """

    rank: int
    world_size: int
    local_rank: int
    machine: int
    url: str
    started_by: str
    attempt: int = 0

    def __post_init__(self):
        if not 0 <= self.rank < self.world_size:
            by_hand = self.started_by == "--num-gpus"
            raise ConfigError(
                f"{'--machine-rank gives' if by_hand else f'{self.started_by} has started'} rank "
                f"{self.rank} of {self.world_size} process(es): they are counted from 0"
            )

    @property
    def host(self) -> str:
        """Of rank 0, as the other processes reach it."""
        return urlsplit(self.url).hostname or "localhost"

    @property
    def where(self) -> str:
        """What states the address."""
        return {"--num-gpus": "--dist-url"}.get(self.started_by, "MASTER_ADDR, MASTER_PORT")

    @property
    def how(self) -> str:
        """How the missing processes come about."""
        if self.started_by == "srun":
            return "start all tasks with srun"
        machines = "on each machine, with its --machine-rank" * (self.started_by == "--num-gpus")
        return f"start the same command {machines or 'with torchrun on each machine'}"

    @classmethod
    def of_torchrun(cls, env: Mapping[str, str] = os.environ) -> Place | None:
        """None where this process was not started by torchrun, or by what states the same
        (https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables")."""
        if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= env.keys():
            return None
        return cls(
            rank=_number(env, "RANK"),
            world_size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK"),
            machine=_number(env, "GROUP_RANK"),
            url=f"tcp://{env['MASTER_ADDR']}:{_number(env, 'MASTER_PORT', 29500)}",
            started_by="torchrun",
            attempt=_number(env, "TORCHELASTIC_RESTART_COUNT"),
        )

    @classmethod
    def of_slurm(cls, env: Mapping[str, str] = os.environ) -> Place | None:
        """None where this process is not one of several tasks of ``srun``
        (https://slurm.schedmd.com/srun.html, "Output Environment Variables")."""
        if not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODELIST"} <= env.keys():
            return None
        world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
        if world_size == 1:
            return None
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
        # The same for all tasks of a step, and another one for other steps on the machine.
        step = _number(env, "SLURM_JOB_ID") * 7 + _number(env, "SLURM_STEP_ID")
        port = _number(env, "MASTER_PORT", 20000 + step % 12000)
        return cls(
            rank=_number(env, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(env, "SLURM_LOCALID"),
            machine=_number(env, "SLURM_NODEID"),
            url=f"tcp://{env.get('MASTER_ADDR') or first_host(nodes)}:{port}",
            started_by="srun",
        )


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return int(env.get(name, default))
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {env[name]!r}, no number") from None


def first_host(nodelist: str) -> str:
    """Of a list of Slurm: ``gpu[03-05,9]-ib,login`` begins with ``gpu03-ib``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).partition(",")[0]


def meet(place: Place, timeout: float) -> tuple[dist.Store, list[int], list[str]]:
    """Wait for the other processes, and say every few seconds for whom.

    Args:
        place: of this process.
        timeout: seconds to wait.

    Returns:
        what the processes share; and of each of them the machine, and what to call it in messages.

    Raises:
        ProcessesError: some did not come, or cannot be reached, or are of another run.
    """
    deadline = time.monotonic() + timeout
    store = _store(place, deadline, timeout)
    host = socket.gethostname()
    me = f"rank {place.rank} of {place.world_size} on {host} (process {os.getpid()})"
    keys = [f"here/{rank}" for rank in range(place.world_size)]
    try:
        if store.add(f"taken/{place.rank}", 1) > 1:
            raise ProcessesError(
                f"{me} comes to {place.url} as the second of this rank: either another run meets "
                "there, which wants a port of its own, or two machines have the same --machine-rank"
            )
        if place.rank == 0:
            store.set("world_size", str(place.world_size))
        if (count := int(store.get("world_size"))) != place.world_size:
            refusal = f"{me} meets rank 0 of {count} processes at {place.url}: start the same "
            refusal += "command, with as many processes, on each machine"
            store.set("refusal", refusal)
            raise ProcessesError(refusal)
        cuda = torch.cuda.is_available()
        store.set(f"here/{place.rank}", json.dumps([host, place.machine, os.getpid(), cuda]))
        _wait(store, keys, place, deadline, timeout)
        found = [json.loads(store.get(key)) for key in keys]
        store.set(f"read/{place.rank}", "")
        if place.rank == 0:  # it holds the store
            read = [f"read/{rank}" for rank in range(place.world_size)]
            _wait(store, read, place, deadline, timeout)
    except dist.DistError as error:
        raise ProcessesError(
            f"rank 0 at {place.url} has ended while others were coming ({error})"
        ) from None
    if len({cuda for *_, cuda in found}) > 1:
        hosts = ", ".join(dict.fromkeys(host for host, *_, cuda in found if not cuda))
        raise ProcessesError(f"there is no CUDA device on {hosts}, but on other machines there is")
    machines = [machine for _, machine, *_ in found]
    if machines != sorted(machines) or len({machines.count(m) for m in machines}) > 1:
        counts = ", ".join(f"machine {m} has {machines.count(m)}" for m in sorted(set(machines)))
        raise ProcessesError(
            f"each machine must have the same number of processes, in the order of the ranks: "
            f"{counts}"
        )
    return (
        store,
        machines,
        [f"rank {rank} ({host}, process {pid})" for rank, (host, _, pid, _) in enumerate(found)],
    )


def _store(place: Place, deadline: float, timeout: float) -> dist.Store:
    """To exchange a few words, held by rank 0."""
    patience = timedelta(seconds=timeout)
    if place.url.startswith("file://"):
        return dist.FileStore(urlsplit(place.url).path, place.world_size)
    port = urlsplit(place.url).port
    agent = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        # It is the same before and after a restart, which not all agents need count, so that its
        # keys may be of processes that are gone. It has the port of what rank 0 opens each time.
        agent = dist.TCPStore(place.host, port, is_master=False, timeout=patience)
        port = 0
    elif place.rank == 0:
        _check_address(place)
    if place.rank:
        port = _wait_for_port(place, deadline, timeout, agent)
    store = dist.TCPStore(
        place.host, port, is_master=place.rank == 0, timeout=patience, wait_for_workers=False
    )
    if agent and place.rank == 0:
        agent.set(_PORT, str(store.port))
    return store


def _check_address(place: Place) -> None:
    """Raises ProcessesError where rank 0 cannot listen at its address."""
    url, whom = place.url, f"rank 0 on {socket.gethostname()}"
    try:
        family, _, _, _, address = socket.getaddrinfo(place.host, urlsplit(url).port)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        advice = f"name an address of the machine of rank 0 ({place.where})"
        if error.errno == errno.EADDRINUSE:
            advice = f"another run may use the port: name another one ({place.where})"
        raise ProcessesError(
            f"{whom} cannot listen at {url} ({error.strerror}); {advice}"
        ) from None


def _wait_for_port(place: Place, deadline: float, timeout: float, agent: dist.Store | None) -> int:
    """Where rank 0 listens. Raises ProcessesError where it does not in time."""
    reminder, port = time.monotonic() + _REMIND, urlsplit(place.url).port
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            if agent:
                port = int(agent.get(_PORT)) if agent.check([_PORT]) else 0
            socket.create_connection((place.host, port), timeout=min(left, _REMIND)).close()
            return port
        except OSError as error:
            reason = error.strerror or str(error)
        whom = f"rank {place.rank} on {socket.gethostname()}"
        if time.monotonic() >= deadline:
            raise ProcessesError(
                f"{whom} did not find rank 0 at {place.url} within {timeout:g} s ({reason}): see "
                f"that it runs there, that the address is the same on all machines "
                f"({place.where}), and that its port is open; --dist-timeout waits longer"
            )
        if time.monotonic() >= reminder:
            reminder += _REMIND
            logger.warning(f"{whom} waits for rank 0 at {place.url} ({reason})")
        time.sleep(0.2)


def _wait(store: dist.Store, keys: list[str], place: Place, deadline: float, timeout: float):
    start = time.monotonic()
    reminder = start + _REMIND
    while not store.check(keys):
        if store.check(["refusal"]):
            time.sleep(1)  # others that are refused hear it from the store, not from its end
            raise ProcessesError(store.get("refusal").decode())
        now = time.monotonic()
        if now >= min(reminder, deadline):
            missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            whom = f"rank {', '.join(missing)} of {place.world_size}"
            if now >= deadline:
                raise ProcessesError(
                    f"{whom} did not come to {place.url} within {timeout:g} s: {place.how}; "
                    "--dist-timeout waits longer"
                )
            reminder += _REMIND
            if place.local_rank == 0:
                logger.warning(f"waiting for {whom} at {place.url}, {now - start:.0f} s by now")
        time.sleep(0.05)
