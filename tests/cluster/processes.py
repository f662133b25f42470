"""Real processes that train, on this machine: how a test starts them, follows, kills and ends them.

A process that has imported everything forks each of them, since the imports take seconds. What a
fork runs is otherwise what ``python`` would: a script, or torchrun, whose workers are forks, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ROOT, TINY, CocoFiles

import gn_detect

ROUNDS = int(os.environ.get("CLUSTER_ROUNDS", 2))
PATIENCE = 120  # seconds that a test waits for what must come: the cores may be busy
QUICK = gn_detect.get_config_file("quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
WITHOUT_CUDA = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes without CUDA"),
]

_STEP = r"^iteration (\d+) of rank (\d+): (.*)"  # of _steps_shown

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["gn_detect.engine.launch", "torch.distributed.launcher.api", "torch.utils.tensorboard"]
)


class Run:
    """``python *arguments``, in the directory ``cwd``, by which its processes are known.

    Attributes:
        pid: of the process that was started, which may have started others.
        sentinel: of a fork, for multiprocessing.connection.wait.
        seconds: that it took to end, since the last kill, or since the start.
    """

    def __init__(self, cwd: Path, *arguments: object, fork: bool = True, **env: str):
        cwd.mkdir(parents=True, exist_ok=True)
        self._cwd, self._log = cwd.resolve(), cwd / "output.txt"
        self._log.touch()
        self._killed = time.monotonic()
        arguments = tuple(map(str, arguments))
        if fork:
            options = {"target": _main, "args": (str(cwd), arguments, env)}
            self._process = SERVER.Process(**options)
            self._process.start()
            self.wait = lambda timeout=None: self._process.join(timeout) or self._ended()
            self._ended = lambda: self._process.exitcode
            self.sentinel = self._process.sentinel
        else:
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=cwd,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.wait, self._ended = self._process.wait, self._process.poll
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """Of all processes, so far."""
        return self._log.read_text(errors="replace")

    @property
    def end_of_output(self) -> str:
        """For the message of a failed test."""
        return "\n".join(line[:300] for line in self.output.splitlines()[-50:])

    def wait_for(self, pattern: str, after: int = 0) -> re.Match:
        """Wait for the first place in the output, from ``after`` on, that matches."""
        return until(
            lambda: re.compile(pattern).search(self.output, after),
            lambda: f"no {pattern!r}; running: {self.running()}; the output:\n{self.end_of_output}",
            lambda: self._ended() is not None,
        )

    def running(self) -> list[int]:
        return running_in(self._cwd)

    def children(self, pid: int | None = None) -> list[int]:
        """Running ones of ``pid``. Those of the process that was started are, in their order, the
        local ranks."""
        parent = pid or self.pid
        found = []
        for child in self.running():
            with contextlib.suppress(OSError):
                if int(_stat(Path(f"/proc/{child}"))[1]) == parent:
                    found.append(child)
        return found

    def kill(self, pid: int, signum: int = signal.SIGKILL) -> None:
        assert pid in self.running()
        os.kill(pid, signum)
        self._killed = time.monotonic()

    def end(self) -> int:
        """Wait for the end. Returns the exit code; nothing may be left running."""
        try:
            code = self.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        self.seconds = time.monotonic() - self._killed
        if code is None:
            for pid in self.running():
                os.kill(pid, signal.SIGUSR2)  # shows the stacks of forks
            time.sleep(1)
            raise AssertionError(f"it does not end: {self.running()}\n{self.end_of_output}")
        until(
            lambda: not self.running(),
            lambda: f"left: {self.running()}\n{self.end_of_output}",
            limit=9,
        )
        return code

    def succeeds(self) -> str:
        """Returns the output."""
        assert self.end() == 0, self.end_of_output
        assert "error: " not in self.output
        return self.output

    def fails(self) -> str:
        """Wait for the end with exit code 1. Returns the one sentence that says why."""
        assert self.end() == 1, self.end_of_output
        return self.sentence()

    def sentence(self) -> str:
        # torchrun shows a traceback of its own, after what its workers have shown.
        shown = re.split(r"^Traceback[^$]*?torch/distributed/run\.py", self.output, flags=re.M)[0]
        assert "Traceback" not in shown, self.end_of_output
        found = re.findall(r"^error: (.*)", shown, re.M)
        if not found:  # the first process has said it of another one
            found = re.findall(r"^ERROR \[[^]]* gn_detect.engine.watch\]: (.*)", shown, re.M)
        assert len(found) == 1, self.end_of_output
        return found[0]

    def kill_all(self) -> None:
        self._process.kill()
        self.wait(9)
        kill_in(self._cwd)


class Runs:
    """Of a test, which end with it.

    Args:
        directory: for all that they write.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = CocoFiles(directory / "data")
        self._started: list[Run] = []

    def start(self, *arguments: object, **options) -> Run:
        """``python *arguments``; for the options see ``Run``."""
        cwd = self.directory / f"run{len(self._started)}"
        self._started.append(run := Run(cwd, *arguments, **options))
        return run

    def train(
        self, output: str, *options: object, before=(), iterations=6, recipe=None, **kwargs
    ) -> Run:
        """``tools/train_net.py`` on a small model.

        Args:
            output: directory of the run, below that of all.
            options: arguments, then ``KEY VALUE ...``.
            before: arguments of python before the tool, such as torchrun.
            recipe: a file that states batch and length in place of what is typed here.
        """
        split = next((i for i, x in enumerate(options) if str(x)[:1].isupper()), len(options))
        return self.start(
            *(*before, ROOT / "tools/train_net.py", "--config-file", recipe or QUICK),
            *(*self.files.arguments(), *options[:split], *TINY),
            *(() if recipe else ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", iterations)),
            *("TEST.EVAL_PERIOD", 0, "INPUT.RANDOM_FLIP", "none"),
            # So that an iteration does not depend on how many will follow.
            *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "()"),
            *("OUTPUT_DIR", self.directory / output, *options[split:]),
            **kwargs,
        )

    def weights(self, output: str, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
        return torch.load(self.directory / output / name, weights_only=True)["model"]

    def copy(self, source: str, target: str) -> None:
        shutil.copytree(self.directory / source, self.directory / target)

    def close(self) -> None:
        for run in self._started:
            run.kill_all()


def images_seen(*outputs: str) -> dict[int, list[str]]:
    """The images of each iteration, in the order of the ranks, from the outputs of the processes.
    Where an iteration was done several times, the last time counts."""
    seen: dict[int, dict[int, list[str]]] = {}
    for output in outputs:
        for iteration, rank, images in re.findall(_STEP, output, re.M):
            seen.setdefault(int(iteration), {})[int(rank)] = images.split()
    return {i: sum((ranks[r] for r in sorted(ranks)), []) for i, ranks in sorted(seen.items())}


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def running_in(directory: Path) -> list[int]:
    """Ids of the processes there, in the order of their start."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if (path / "cwd").readlink() == directory:
                found.append((int(_stat(path)[19]), int(path.name)))
    return [pid for _, pid in sorted(found)]


def kill_in(directory: Path) -> None:
    while running := running_in(directory):
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def until(
    condition: Callable,
    problem: Callable[[], str],
    hopeless: Callable = bool,
    limit: float = PATIENCE,
):
    """Wait for ``condition`` to hold, and return what it gives."""
    deadline = time.monotonic() + limit
    while not (found := condition()):
        if hopeless() and not condition() or time.monotonic() > deadline:
            raise AssertionError(problem())
        time.sleep(0.01)
    return found


def _stat(path: Path) -> list[str]:
    """State, parent, ... of a process."""
    return (path / "stat").read_text().rpartition(") ")[2].split()


def _main(cwd: str, arguments: tuple[str, ...], env: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # the default, for loading workers
    faulthandler.register(signal.SIGUSR2)
    log = os.open("output.txt", os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    with _forks(), _steps_shown():
        _python(arguments, env)


def _python(arguments: tuple[str, ...], env: dict[str, str]) -> None:
    """Be ``python *arguments``."""
    os.environ.update(env)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, os.fdopen(os.dup(descriptor), "w", buffering=1))
    # In each fork, before two threads do it at a time: PyTorch makes its pool of threads anew then,
    # and one that meets no pool aborts.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
    torch.set_num_threads(1)
    arguments = arguments[arguments[0] == "-u" :]
    if arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*arguments]
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


@contextlib.contextmanager
def _forks() -> Iterator[None]:
    """The processes that --num-gpus and torchrun start are forks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.multiprocessing import start_processes

    fork = functools.partial(start_processes, start_method="fork")
    with mock.patch("gn_detect.engine.launch.start_processes", fork):
        with mock.patch.object(SubprocessHandler, "_popen", lambda _, args, env: _Fork(args, env)):
            yield


class _Fork:
    """In the place of a ``subprocess.Popen``, for torchrun."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]):
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_leader, args=(args[1:], env))
        self._process.start()
        self.args, self.pid = args, self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()


def _leader(arguments: tuple[str, ...], env: dict[str, str]) -> None:
    os.setsid()
    _python(arguments, env)


@contextlib.contextmanager
def _steps_shown() -> Iterator[None]:
    """A line of output for each step of each process, when it begins; in the one that NAN_AT names
    the losses are NaN."""
    from detectron2.utils import comm
    from detectron2.utils.events import get_event_storage

    from gn_detect.modeling import GNGeneralizedRCNN

    forward = GNGeneralizedRCNN.forward

    def shown(self, inputs):
        if not self.training:
            return forward(self, inputs)
        step = f"iteration {get_event_storage().iter} of rank {comm.get_rank()}"
        images = " ".join(os.path.basename(x["file_name"]) for x in inputs)
        os.write(1, f"{step}: {images}\n".encode())
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", 0)))
        factor = float("nan") if step == os.environ.get("NAN_AT") else 1.0
        return {name: factor * loss for name, loss in forward(self, inputs).items()}

    with mock.patch.object(GNGeneralizedRCNN, "forward", shown):
        yield
