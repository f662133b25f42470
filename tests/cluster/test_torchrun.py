"""Runs that torchrun starts: one job, which goes on by itself when a process dies."""

import random
import re

from cluster.processes import QUICK, ROUNDS, TORCHRUN, WITHOUT_CUDA, free_address, images_seen
from helpers import assert_equal

pytestmark = WITHOUT_CUDA
ONE_MACHINE = (*TORCHRUN, 2, "--standalone")


def test_is_the_run_of_num_gpus(runs):
    options = (*runs.files.arguments("val"), "TEST.EVAL_PERIOD", 3)
    options += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    expected = runs.train("a", "--num-gpus", 2, *options).succeeds()
    first = runs.train("b", *options, before=ONE_MACHINE, iterations=3).succeeds()
    output = runs.train("b", "--resume", *options, before=ONE_MACHINE).succeeds()
    assert output.count("Starting training from iteration 3") == 1
    assert images_seen(first, output) == images_seen(expected)
    assert {len(images) for images in images_seen(output).values()} == {2}
    assert_equal(runs.weights("b"), runs.weights("a"))
    found = [runs.directory / name / "inference/coco_instances_results.json" for name in "ab"]
    assert found[0].read_bytes() == found[1].read_bytes() != b"[]"


# Runs the tool that is its first argument. An operation that nobody waits for is under way when the
# program ends: a thread of gloo frees its tensor.
TOOL = """
import atexit, runpy, sys, torch, torch.distributed as dist
from gn_detect.engine import launch

def main(args):
    tool["main"](args)
    dist.kept = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1 << 20), group=dist.kept, async_op=True)

sys.argv.pop(0)
tool = runpy.run_path(sys.argv[0])
atexit.register(print, "at exit")
launch.launch(main, tool["parse_arguments"]())
"""


def test_program_trains(runs):
    (tool := runs.directory / "tool.py").write_text(TOOL)
    run = runs.train("a", before=(*ONE_MACHINE, tool), iterations=2, fork=False)
    output = run.succeeds()
    assert output.count("at exit") == 2 and "terminate" not in output
    runs.train("b", "--num-gpus", 2, iterations=2).succeeds()
    assert_equal(runs.weights("a"), runs.weights("b"))


def test_killed_processes_are_replaced(runs):
    """As often as ROUNDS, at random iterations; the run is told nothing of how to go on."""
    seed, iterations = random.randrange(2**32), 3 * ROUNDS + 6
    print("random seed", seed)
    choose = random.Random(seed)
    targets = sorted(choose.sample(range(1, iterations - 2), ROUNDS))
    options = {"iterations": iterations}
    before = (*ONE_MACHINE, "--max-restarts", ROUNDS)
    run = runs.train("killed", "SOLVER.CHECKPOINT_PERIOD", 2, before=before, **options)
    shown = 0
    for target in targets:
        rank = choose.randrange(2)
        run.wait_for(f"(?m)^iteration {target} of rank {rank}", after=shown)
        shown = len(run.output)
        run.kill(run.children()[rank])
    assert run.end() == 0, run.end_of_output
    output = run.output
    starts = [int(start) for start in re.findall(r"Starting training from iteration (\d+)", output)]
    assert len(starts) == ROUNDS + 1
    for target, start in zip(targets, starts[1:], strict=True):
        assert target - 2 < start <= target + 2  # the step may have been done all the same
    whole = runs.train("whole", "--num-gpus", 2, **options).succeeds()
    assert images_seen(output) == images_seen(whole)
    assert_equal(runs.weights("killed"), runs.weights("whole"))


def test_machines_come_and_go(runs):
    """Two agents of torchrun, of which the second comes later, and is killed."""
    address = free_address().removeprefix("tcp://")
    before = (*TORCHRUN, 1, "--nnodes", "1:2", "--rdzv-backend", "c10d", "--max-restarts", 3)
    settings = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"  # seconds
    before += ("--rdzv-endpoint", address, "--rdzv-conf", settings)
    options = ("SOLVER.IMS_PER_GPU", 1)
    recipe = runs.directory / "recipe.yaml"  # of 2 images an iteration
    recipe.write_text(f"_BASE_: {QUICK}\nSOLVER: {{MAX_ITER: 16, CHECKPOINT_PERIOD: 2}}\n")
    elastic = ("--resume", "auto", *options)
    start = {"before": before, "recipe": recipe, "SECONDS_PER_STEP": "0.1"}
    start["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # with it, torch 2.14 loses who comes later
    first = runs.train("run", *elastic, **start)
    first.wait_for("iteration 3 of rank 0")
    second = runs.train("run", *elastic, **start)
    second.wait_for("iteration .* of rank 1")
    first.wait_for(r"iteration [\s\S]*Saving checkpoint", after=first.output.index("World size: 2"))
    for pid in reversed(second.running()):
        second.kill(pid)
    output = first.succeeds()

    whole = images_seen(runs.train("whole", *options, recipe=recipe).succeeds())
    stream = [image for images in whole.values() for image in images]
    assert len(stream) == 32
    alone, both, rest = re.split("World size: [12]", output)[1:]
    seen = images_seen(alone)
    assert seen == {i: stream[i : i + 1] for i in range(len(seen))}
    seen, before = images_seen(both, second.output), len(seen)
    assert seen == {i: stream[2 * i : 2 * i + 2] for i in seen}
    assert before - 2 < 2 * min(seen) <= before  # none is left out
    seen, before = images_seen(rest), 2 * (max(seen) + 1)
    assert seen == {i: stream[i : i + 1] for i in seen}
    assert before - 2 * 2 <= min(seen) <= before and max(seen) == 31
