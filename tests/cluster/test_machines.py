"""Two machines without a shared folder, which are two directories here."""

import socket

import pytest
from cluster.processes import WITHOUT_CUDA, free_address
from helpers import assert_equal

pytestmark = WITHOUT_CUDA


def start(runs, *options, second=None, **more):
    """The same on each of them, or ``second`` on the second."""
    ranks = ("--num-machines", 2, "--dist-url", free_address(), "--machine-rank")
    return [
        runs.train(f"machine{rank}", *ranks, rank, *theirs, **more)
        for rank, theirs in enumerate([options, options if second is None else second])
    ]


@pytest.mark.parametrize(
    "second, key",
    [
        (("SOLVER.BASE_LR", 0.003), "SOLVER.BASE_LR"),
        (("MODEL.ROI_BOX_HEAD.CONV_DIM", 16), "MODEL.ROI_BOX_HEAD.CONV_DIM"),
        (("SOLVER.MAX_ITER", 7), "SOLVER.MAX_ITER"),
        (("SOLVER.IMS_PER_BATCH", 4), "SOLVER.IMS_PER_BATCH"),
        (("--resume",), "--resume"),
    ],
)
def test_that_were_told_different_things(runs, second, key):
    machines = start(runs, second=second)
    messages = [machine.fails() for machine in machines]
    for message, machine in zip(messages, machines, strict=True):
        assert key in message
        assert "iteration 0 of" not in machine.output


def test_only_the_first_has_the_checkpoint(runs):
    for machine in start(runs, iterations=4):
        machine.succeeds()
    assert not (runs.directory / "machine1/last_checkpoint").exists()
    outputs = [machine.succeeds() for machine in start(runs, "--resume", iterations=8)]
    assert "Starting training from iteration 4" in outputs[0]
    runs.train("whole", "--num-gpus", 2, iterations=8).succeeds()
    assert_equal(runs.weights("machine0"), runs.weights("whole"))


@pytest.mark.parametrize("rank", [0, 1])
def test_learn_of_a_killed_process(runs, rank):
    machines = start(runs, iterations=10_000)
    for machine in machines:
        machine.wait_for("iteration 3 of rank")
    machines[rank].kill(pid := machines[rank].children()[0])
    assert f"process {pid}" in machines[rank].fails()
    other = machines[1 - rank]
    assert other.end() == 1
    assert f"rank {rank} ({socket.gethostname()}, process {pid}) was killed" in other.output
    assert "Traceback" not in other.output
