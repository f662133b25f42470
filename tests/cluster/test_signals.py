"""Runs that are asked to stop, wherever they are, lose no step, and go on as if they had not."""

import os
import random
import re
import signal
import time

import pytest
import torch
from cluster.processes import ROUNDS, TORCHRUN, WITHOUT_CUDA, images_seen
from helpers import assert_equal

pytestmark = WITHOUT_CUDA
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
MOMENTS = {
    "step": None,
    "evaluation": "Start inference on",
    "save": "Saving checkpoint to",
    "loading workers": None,
}
ITERATIONS = 8
STOPPED = r"(?m)^.*\b(SIG\w+): stopped (.*)after iteration (\d+); (\S+) has it: go on with --resume"


def options(runs, workers: int):
    return (
        *(*runs.files.arguments("val"), "TEST.EVAL_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 3),
        *("DATALOADER.NUM_WORKERS", workers),
    )


def stop(run, signum, whom) -> None:
    """To the process that was started, one of those that it started, or, as a terminal, all."""
    if whom == "all":
        os.killpg(run.pid, signum)
    else:
        run.kill(run.pid if whom == "parent" else run.children()[whom], signum)


@pytest.mark.parametrize("number", range(max(ROUNDS, len(MOMENTS))))
def test_goes_on_as_if_it_had_not_stopped(runs, number):
    seed = random.randrange(2**32)
    choose = random.Random(seed)
    moment = list(MOMENTS)[number % len(MOMENTS)]
    processes = number // 2 % 2 + 1 if number < len(MOMENTS) else choose.choice([1, 2])
    signum = choose.choice(list(CODES))
    whom = choose.choice(["parent", "all", *range(processes)] if processes > 1 else ["parent"])
    print(f"random seed {seed}: {processes} processes, {signum!r} to {whom}")
    start = ("--num-gpus", processes, *options(runs, int(moment == "loading workers")))
    run = runs.train("run", *start, iterations=ITERATIONS)
    pattern = MOMENTS[moment] or f"(?m)^iteration {choose.randrange(ITERATIONS - 1)} of rank 0"
    run.wait_for(pattern)
    time.sleep(choose.random() * 0.05)  # anywhere in it
    stop(run, signum, whom)
    began = time.monotonic()
    assert run.end() == CODES[signum], run.end_of_output
    print(f"{moment}: {pattern}: {time.monotonic() - began:.1f} s")
    assert "Traceback" not in run.output and "error: " not in run.output, run.end_of_output
    ((name, _, iteration, path),) = re.findall(STOPPED, run.output)
    assert name == signum.name
    assert max(images_seen(run.output)) == int(iteration) - 1
    assert torch.load(path, weights_only=True)["iteration"] == int(iteration) - 1
    output = runs.train("run", "--resume", *start, iterations=ITERATIONS).succeeds()
    assert f"Starting training from iteration {iteration}" in output
    whole = runs.train("whole", *start, iterations=ITERATIONS).succeeds()
    assert images_seen(run.output, output) == images_seen(whole)
    assert_equal(runs.weights("run"), runs.weights("whole"))


def test_torchrun_passes_it_on(runs):
    start = {"before": (*TORCHRUN, 2, "--standalone"), "iterations": 10_000}
    run = runs.train("run", **start)
    run.wait_for("iteration 2 of rank 1")
    run.kill(run.pid, signal.SIGTERM)
    run.end()
    ((name, _, iteration, path),) = re.findall(STOPPED, run.output)
    assert name == "SIGTERM"
    assert max(images_seen(run.output)) == int(iteration) - 1
    assert torch.load(path, weights_only=True)["iteration"] == int(iteration) - 1
