"""Processes that only Slurm's variables make one job: forks, which gather what each is told.

test_batch_scripts.py trains in such a job, with the weights of --num-gpus.
"""

import json
import multiprocessing
import os
import re
import socket
import sys
from pathlib import Path

import pytest
from detectron2.utils import comm

from gn_detect.engine.launch import argument_parser, launch, parse_args

JOB = os.getpid()  # its port is another one for each process of pytest


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """``tasks(ranks, *arguments, **env)``: run those tasks of a job of two machines with two tasks
    each. Returns for each its exit code, what it has written to stderr, and what it was told."""
    monkeypatch.setattr("sys.argv", ["train_net.py"])
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(rank: int, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        os.environ.update(env)
        sys.argv += arguments
        sys.stderr = (tmp_path / f"{rank}.err").open("w", buffering=1)
        launch(lambda args: tell(tmp_path / f"{rank}.json", args), parse_args(argument_parser()))

    def tasks(ranks, *arguments: str, **env: str) -> list[tuple[int, str, dict]]:
        started = []
        for rank in ranks:
            slurm = {"PROCID": rank, "LOCALID": rank % 2, "NODEID": rank // 2, "JOB_ID": JOB}
            slurm |= {"NTASKS": 4, "NODELIST": "localhost,gpu2", "STEP_ID": 0}
            slurm = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
            options = {"target": run, "args": (rank, arguments, slurm | env)}
            started.append(multiprocessing.get_context("fork").Process(**options))
            started[-1].start()
        outcomes = []
        for rank, process in zip(ranks, started, strict=True):
            process.join(60)
            assert process.exitcode is not None
            told = tmp_path / f"{rank}.json"
            told = json.loads(told.read_text()) if told.exists() else {}
            outcomes.append((process.exitcode, (tmp_path / f"{rank}.err").read_text(), told))
        return outcomes

    return tasks


def tell(path: Path, args) -> None:
    content = {name: getattr(args, name) for name in ("num_gpus", "num_machines", "resume")}
    place = comm.get_rank(), comm.get_local_rank(), comm.get_local_size()
    path.write_text(json.dumps(content | {"places": comm.all_gather(place)}))


@pytest.mark.parametrize("resume", ["", "--resume auto"])
def test_one_job(resume, tasks):
    outcomes = tasks(range(4), *resume.split())
    assert [code for code, _, _ in outcomes] == [0] * 4, outcomes
    expected = {"num_gpus": 2, "num_machines": 2, "resume": bool(resume)}
    expected["places"] = [[0, 0, 2], [1, 1, 2], [2, 0, 2], [3, 1, 2]]
    assert [told for _, _, told in outcomes] == [expected] * 4


def test_torchrun_within_slurm(tasks):
    """What it has started has the variables of its task, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    ((code, error, told),) = tasks([1], MASTER_ADDR="localhost", **env)
    assert (code, told["places"]) == (0, [[0, 0, 1]]), error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--num-gpus 4", "--num-gpus is 4, but srun has started 2 process(es) on this machine"),
        ("--num-machines 2", "--num-machines is 2, but srun has started the processes"),
        ("--dist-url tcp://gpu1:1", "--dist-url is tcp://gpu1:1, but srun has started"),
    ],
)
def test_arguments_that_contradict_srun(arguments, message, tasks):
    outcomes = tasks(range(4), *arguments.split())
    assert [code for code, _, _ in outcomes] == [1] * 4
    assert message in outcomes[0][1]
    assert "".join(error for _, error, _ in outcomes).count("error: ") == 2  # on each machine
    assert not any(told for _, _, told in outcomes)


def test_a_task_that_does_not_come(tasks):
    outcomes = tasks([0, 1, 3], "--dist-timeout", "2")
    assert [code for code, _, _ in outcomes] == [1] * 3
    message = r"rank 2 of 4 did not come to tcp://localhost:\d+ within 2 s: start all tasks with"
    assert re.search(message, outcomes[0][1]), outcomes


def test_a_script_without_srun_is_no_task_alone(tasks):
    """sbatch gives it the place of the first task, and the number of all."""
    ((code, error, _),) = tasks([0], "--dist-timeout", "1")
    assert code == 1 and "rank 1, 2, 3 of 4" in error and "start all tasks with srun" in error
