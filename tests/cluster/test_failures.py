"""Runs one of whose processes fails, dies or does not come: all end, with a sentence."""

import re

import pytest
from cluster.processes import ROUNDS, TORCHRUN, WITHOUT_CUDA, Run, free_address

pytestmark = WITHOUT_CUDA
STARTS = ["--num-gpus", "torchrun"] if ROUNDS > 2 else ["--num-gpus"]


def start(runs, by, *options, **more) -> Run:
    """One that would go on for minutes."""
    if by == "torchrun":
        more["before"] = (*TORCHRUN, 2, "--standalone")
    else:
        options = (by, 2, *options)
    return runs.train("run", *options, iterations=10_000, **more)


def fails(run: Run) -> str:
    message = run.fails()
    print(f"{run.seconds:.1f} s: {message}")  # shown by pytest -rP
    assert run.seconds < 15
    return message


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(runs, rank):
    run = start(runs, "--num-gpus", "SOLVER.CHECKPOINT_PERIOD", 2)
    run.wait_for("iteration 3 of rank 1")
    run.kill(pid := run.children()[rank])
    message = fails(run)
    assert f"process {pid}" in message and f"rank {rank}" in message
    assert re.search(r"last checkpoint \S+/model_\d+\.pth \(iteration \d+\) is intact", run.output)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_of_torchrun(runs, rank):
    run = start(runs, "torchrun")
    run.wait_for("iteration 3 of rank 1")
    run.kill(pid := run.children()[rank])
    assert run.end() == 1
    assert run.seconds < 15
    assert run.output.count("Traceback") == 1  # of torchrun
    assert f"Signal 9 (SIGKILL) received by PID {pid}" in run.output


def test_killed_parent(runs):
    """Its processes stop as after Ctrl-C, and leave a checkpoint."""
    run = start(runs, "--num-gpus")
    run.wait_for("iteration 3 of rank 1")
    run.kill(run.pid)
    assert run.end() == -9
    assert (runs.directory / "run/model_latest.pth").exists()
    assert "Traceback" not in run.output


@pytest.mark.parametrize("by", STARTS)
def test_killed_loading_worker(runs, by):
    run = start(runs, by, "DATALOADER.NUM_WORKERS", 1)
    run.wait_for("iteration 3 of rank 1")
    (worker,) = run.children(run.children()[1])
    run.kill(worker)
    message = fails(run)
    assert f"worker {worker}" in message and "DATALOADER.NUM_WORKERS" in message


@pytest.mark.parametrize("by", STARTS)
def test_nan_on_one_rank(runs, by):
    message = fails(start(runs, by, NAN_AT="iteration 2 of rank 1"))
    assert "diverged at iteration 2" in message and "1.png" in message


@pytest.mark.parametrize("by", STARTS)
def test_corrupt_image_on_one_rank(runs, by):
    runs.files.damage("1.png")  # the first of rank 1, the third of rank 0
    assert "1.png" in fails(start(runs, by))


@pytest.mark.parametrize(
    "rank, address, message",
    [
        (0, None, r"rank 1 of 2 did not come to tcp://127.0.0.1:\d+ within 1 s"),
        (1, None, r"did not find rank 0 at tcp://127.0.0.1:\d+ within 1 s"),
        (0, "tcp://192.0.2.1:29500", "cannot listen at tcp://192.0.2.1:29500"),
    ],
)
def test_machine_that_does_not_come(runs, rank, address, message):
    options = ("--num-machines", 2, "--machine-rank", rank, "--dist-timeout", 1)
    run = runs.train("run", *options, "--dist-url", address or free_address())
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fails(run))
