"""Two runs on one machine at the same time."""

from cluster.processes import WITHOUT_CUDA
from helpers import assert_equal

pytestmark = WITHOUT_CUDA


def test_do_not_meet(runs):
    a = runs.train("a", "--num-gpus", 2)
    b = runs.train("b", "--num-gpus", 2, "SEED", 4)
    a.wait_for("iteration 0 of rank 1")
    b.wait_for("iteration 0 of rank 1")
    outputs = a.succeeds(), b.succeeds()
    assert all("World size: 2" in output for output in outputs)
    alone = runs.train("alone", "--num-gpus", 2)
    alone.succeeds()
    assert_equal(runs.weights("a"), runs.weights("alone"))


def test_do_not_write_into_one_directory(runs):
    first = runs.train("run", "SOLVER.CHECKPOINT_PERIOD", 2, iterations=10_000)
    first.wait_for("iteration 4 of rank 0")
    message = runs.train("run", "--resume", iterations=4).fails()
    assert f"process {first.pid}" in message and str(runs.directory / "run") in message
    first.kill(first.pid)
    first.end()
    second = runs.train("run", "--resume", iterations=10_000)
    (start,) = second.wait_for(r"Starting training from iteration (\d+)").groups()
    saved = first.output.count("Saving checkpoint")  # one may have been cut off
    assert int(start) in (2 * saved, 2 * saved - 2)
