"""The scripts of docs/clusters.md, run by bash, with Slurm's commands played by small scripts,
and ``python`` and ``torchrun`` by forks, as in processes.py."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from cluster.processes import PATIENCE, Run, free_address, kill_in, running_in, until
from helpers import ROOT, TINY, CocoFiles, assert_equal
from test_docs import blocks
from torch.distributed.run import get_args_parser

from gn_detect.engine.launch import argument_parser

pytestmark = pytest.mark.slow

SRUN, TORCHRUN, BY_HAND = (
    block for block in blocks("docs/clusters.md", "bash") if block.startswith("#!/bin/bash\n")
)
ITERATIONS = 15
STOPPED = r"(SIGUSR1|SIGTERM): stopped after iteration (\d+)"
# As srun does: each task has its place in the environment; the exit code is the highest, or 128 and
# the signal. The process ids of the tasks are for scancel.
FAKES = {
    "srun": """
import os, subprocess, sys
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(rank), "SLURM_STEP_ID": "0"}
    node, local_rank = divmod(rank, int(os.environ["SLURM_NTASKS_PER_NODE"]))
    place |= {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)}
    tasks.append(subprocess.Popen(sys.argv[1:], env={**os.environ, **place}))
with open("tasks.part", "w") as f:
    print(*(task.pid for task in tasks), file=f)
os.rename("tasks.part", "tasks")
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
""",
    # Without --batch and --full it signals the tasks, not the script.
    "scancel": """
import os, pathlib, signal, sys
name, job = sys.argv[1:]
assert job == os.environ["SLURM_JOB_ID"]
for pid in pathlib.Path("tasks").read_text().split():
    os.kill(int(pid), signal.Signals["SIG" + name.removeprefix("--signal=")])
""",
    "scontrol": """
import sys
with open("scontrol.log", "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    sys.stdout.write("localhost\\ngpu2\\n")
""",
}
# Has ``Job`` run what it was told, passes signals on, and ends as that does.
PYTHON = """
import json, os, signal, socket, sys
with socket.create_connection(("127.0.0.1", PORT)) as job:
    stream = job.makefile("rw")
    print(json.dumps([ARGUMENTS + sys.argv[1:], dict(os.environ)]), file=stream, flush=True)
    pid = int(stream.readline())
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: os.kill(pid, signum))
    code = int(stream.readline())
sys.exit(code if code >= 0 else 128 - code)
"""
FORKS = {
    "python": PYTHON.replace("ARGUMENTS", "[]"),
    "torchrun": PYTHON.replace("ARGUMENTS", '["-m", "torch.distributed.run"]'),
}


class Job:
    """A directory in which scripts run, as Slurm runs them, on this machine."""

    def __init__(self, directory: Path, tasks_per_node: int, nodes: int = 1, fork: bool = True):
        self.directory = directory.resolve()
        self.log = directory / "output.txt"  # to which a fork writes, too
        self.log.touch()
        for name in ("configs", "tools"):
            (directory / name).symlink_to(ROOT / name)
        (directory / "bin").mkdir()
        self._server = socket.create_server(("127.0.0.1", 0))
        port = str(self._server.getsockname()[1])
        for name, source in {**FAKES, **(FORKS if fork else {})}.items():
            path = directory / "bin" / name
            path.write_text(f"#!{sys.executable} -S\n{source.replace('PORT', port)}")
            path.chmod(0o755)
        files = CocoFiles(directory / "data")
        data = ["--train-json", files.json_file, "--train-images", files.image_root]
        self.data = shlex.join(map(str, data))
        path = [directory / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        self._env = {
            **os.environ,
            "PATH": os.pathsep.join(map(str, path)),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NODELIST": "localhost",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(tasks_per_node * nodes),
            "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        }
        self._started: list[subprocess.Popen] = []
        threading.Thread(target=self._fork, daemon=True).start()

    def _fork(self) -> None:
        """Be what the scripts call python, until ``close``."""
        running = {}
        with contextlib.suppress(OSError), self._server:
            while True:
                for ready in wait([self._server, *running]):
                    if ready is self._server:
                        stream = self._server.accept()[0].makefile("rw")
                        arguments, env = json.loads(stream.readline())
                        run = Run(self.directory, *arguments, **env)
                        running[run.sentinel] = run, stream
                        answer = run.pid
                    else:
                        run, stream = running.pop(ready)
                        answer = run.wait()
                    print(answer, file=stream, flush=True)

    def small(self, script: str) -> str:
        """The script with another config and data, for CPUs; its own keys stay."""
        script, count = re.subn(
            r"--config-file \S+ \\\n +(.*?OUTPUT_DIR \S+)",
            lambda match: f"{self.arguments} {match[1]} {shlex.join(TINY)} {KEYS}",
            script,
        )
        assert count == 1
        return script.replace("--nproc-per-node gpu", "--nproc-per-node 1")

    @property
    def arguments(self) -> str:
        config = "configs/quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
        return f"--config-file {config} {self.data}"

    def start(self, script: str, *args: str) -> subprocess.Popen:
        path = self.directory / f"script{len(self._started)}.sh"  # bash reads on while it runs
        path.write_text(script)
        with self.log.open("a") as log:  # --open-mode=append
            process = subprocess.Popen(
                ["bash", path.name, *args],
                cwd=self.directory,
                env=self._env,
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        return process

    @property
    def scontrol(self) -> list[str]:
        """What scontrol was asked for, so far."""
        path = self.directory / "scontrol.log"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeue(self) -> str:
        return f"requeue {self._env['SLURM_JOB_ID']}"

    def wait_for(self, pattern: str, process: subprocess.Popen) -> re.Match:
        return until(
            lambda: re.search(pattern, self.output),
            lambda: self.end_of_output,
            lambda: process.poll() is not None,
        )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def end_of_output(self) -> str:
        return "\n".join(line[:300] for line in self.output.splitlines()[-60:])

    def end(self, process: subprocess.Popen) -> int:
        """The exit code; nothing is left running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        if process.returncode is None:
            for pid in running_in(self.directory):
                os.kill(pid, signal.SIGUSR2)  # shows where a fork stands
            time.sleep(2)
        assert process.returncode is not None, self.end_of_output
        if process is self._started[-1]:
            until(
                lambda: not running_in(self.directory),
                lambda: f"left: {running_in(self.directory)}",
                limit=9,
            )
        return process.returncode

    def weights(self, output: str, name: str = "model_final") -> dict[str, torch.Tensor]:
        path = self.directory / output / f"{name}.pth"
        return torch.load(path, weights_only=True)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        kill_in(self.directory)
        for process in self._started:
            process.wait()


KEYS = f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.STEPS '()' SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR"
KEYS += " DATASETS.TEST '()' TEST.EVAL_PERIOD 0 SOLVER.CHECKPOINT_PERIOD 0"


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(**options) -> Job:
        jobs.append(Job(tmp_path, **options))
        return jobs[0]

    yield start
    for started in jobs:
        started.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of one run of two processes, by --num-gpus, which nothing here forks."""
    job = Job(tmp_path_factory.mktemp("uninterrupted"), tasks_per_node=1, fork=False)
    script = BY_HAND.replace("--num-gpus 8 --num-machines 2", "--num-gpus 2")
    script = re.sub(r'--machine-rank "\$1" --dist-url \S+', "", script)
    try:
        assert job.end(job.start(job.small(script))) == 0, job.end_of_output
    finally:
        job.close()
    return job.weights("output/coco")["model"]


def stopped_at(job: Job, signum: str) -> int:
    """The iteration of which the log says that the run was stopped, and the checkpoint."""
    ((name, iteration),) = re.findall(STOPPED, job.output)
    assert name == signum
    assert job.weights("output/coco", "model_latest")["iteration"] == int(iteration) - 1
    assert 0 < int(iteration) < ITERATIONS
    return int(iteration)


def test_slurm_stops_and_requeues_one_task_per_gpu(job, uninterrupted):
    job = job(tasks_per_node=2)
    script = job.small(SRUN)
    first = job.start(script)
    job.wait_for(r"iter: \d", first)
    (pids,) = (job.directory / "tasks").read_text().splitlines()
    for pid in pids.split():  # as --signal=USR1@120 does
        os.kill(int(pid), signal.SIGUSR1)
    assert job.end(first) == 143, job.end_of_output
    assert job.scontrol == [job.requeue]
    iteration = stopped_at(job, "SIGUSR1")
    assert job.output.count("Starting training from iteration 0") == 1  # one run, not two

    again = job.start(script)
    assert job.end(again) == 0, job.end_of_output
    assert job.scontrol == [job.requeue]
    assert f"Starting training from iteration {iteration}\n" in job.output
    assert_equal(job.weights("output/coco")["model"], uninterrupted)


def test_slurm_stops_and_requeues_torchrun_and_two_machines_go_on(job, uninterrupted):
    job = job(tasks_per_node=1, nodes=2)
    first = job.start(job.small(TORCHRUN))
    job.wait_for(r"iter: \d", first)
    os.kill(first.pid, signal.SIGUSR1)  # as --signal=B:USR1@120 does
    assert job.end(first) != 0
    assert job.scontrol == ["show hostnames localhost", job.requeue], job.end_of_output
    iteration = stopped_at(job, "SIGTERM")

    script = job.small(BY_HAND).replace("--num-gpus 8", "--num-gpus 1")
    script = script.replace("tcp://gpu1:29500", free_address())
    for process in [job.start(script, rank) for rank in "01"]:
        assert job.end(process) == 0, job.end_of_output
    assert f"Starting training from iteration {iteration}\n" in job.output
    assert_equal(job.weights("output/coco")["model"], uninterrupted)


@pytest.mark.parametrize("script", [SRUN, TORCHRUN], ids=["srun", "torchrun"])
@pytest.mark.parametrize("code, requeues", [(0, False), (1, False), (137, False), (143, True)])
def test_what_is_requeued(script, code, requeues, job):
    """Of torchrun only what was stopped, whatever its exit code is."""
    job = job(tasks_per_node=1)
    (job.directory / "bin/srun").write_text(f"#!/bin/bash\nexit {code}\n")
    assert job.end(job.start(script)) == code
    assert (job.requeue in job.scontrol) == (requeues and script is SRUN)


def test_arguments():
    """Also of the commands in tables."""
    text = (ROOT / "docs/clusters.md").read_text().replace("\\\n", " ")
    for command in re.findall(r"torchrun (--n.+?) (?:tools/\S+ )?\.\.\.", text):
        get_args_parser().parse_args([*shlex.split(command), "train_net.py"])
    for command in re.findall(r"tools/train_net.py (--.+? OUTPUT_DIR \S+)", text):
        args = argument_parser().parse_args(shlex.split(command.replace("$1", "1")))
        assert args.resume == "auto" and (ROOT / args.config_file).is_file()
    options = re.findall(r"`(--[a-z-]+)", text) + re.findall(r"`--\S+ \S+ (--[a-z-]+)", text)
    known = {
        o
        for p in (argument_parser(), get_args_parser())
        for a in p._actions
        for o in a.option_strings
    }
    assert set(options) - known == {"--distribution", "--signal"}  # Slurm's
