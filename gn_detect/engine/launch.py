"""The processes of a run: those that torchrun or Slurm has started, or those of --num-gpus. They
form one group before anything else is done."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT, default_argument_parser
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, start_processes

from gn_detect.checkpoint import unlock_output
from gn_detect.config import ConfigError

from .errors import errors_as_sentences, run_directory
from .meeting import Place, meet
from .prepare import check_num_gpus
from .stopping import handle_signals, handled_by
from .watch import Watch

# Seconds that the others have to end by themselves once one has ended.
_GRACE = 20


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's, with ``--resume auto`` and ``--dist-timeout``; for :func:`parse_args`."""
    parser = argparse.ArgumentParser(
        parents=[theirs := default_argument_parser()],
        conflict_handler="resolve",
        epilog=theirs.epilog,
        formatter_class=theirs.formatter_class,
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="auto",
        help="continue from the last checkpoint in the output directory. 'auto': if there is one",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        help="GPUs, or processes where there is no CUDA, of this machine (1). Leave it out where "
        "torchrun or srun starts the processes",
    )
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other processes and machines (300)",
    )
    parser.set_defaults(dist_url=None)
    return parser


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.resume not in (True, False, "auto"):  # the first of KEY VALUE ...
        args.opts.insert(0, args.resume)
        args.resume = True
    return args


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in each process of a run, and end this one with a sentence where that
    fails, with 143 after SIGTERM and SIGUSR1, and with 130 after Ctrl-C. One of several processes
    also ends when it is done.

    The processes are those that torchrun or srun have started, this one among them. Otherwise
    ``--num-gpus`` are started here, as Detectron2's ``launch`` does, on each of ``--num-machines``.

    Args:
        main: of the tool, importable from it.
        args: of :func:`parse_args`; ``main`` finds ``resume`` True or False in it.
    """
    # A second signal, such as the parent's beside the terminal's, finds the handlers to the end.
    with handle_signals(), errors_as_sentences():
        place = Place.of_torchrun()
        # A batch script without srun has the variables of its first task, but of no step.
        if place is None and not (args.num_gpus and "SLURM_STEP_ID" not in os.environ):
            place = Place.of_slurm()
        if place:
            _in_group(main, args, place)
        elif max(args.num_gpus or 1, 1) * args.num_machines > 1:
            _start(main, args)
        else:
            args.resume, args.num_gpus = bool(args.resume), 1
            _run(main, args)


def _run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    try:
        main(args)
    finally:
        unlock_output(run_directory())


@contextlib.contextmanager
def _end_at_once() -> Iterator[None]:
    """End this process when it is done or exits, as multiprocessing ends its own: without the end
    of Python's interpreter, in which a thread of gloo that frees a tensor would abort the process
    (https://github.com/pytorch/pytorch/pull/179291)."""
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code or 0
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@_end_at_once()
@errors_as_sentences()
def _in_group(main: Callable, args: argparse.Namespace, place: Place) -> None:
    store, machines, names = meet(place, args.dist_timeout)
    local_size = machines.count(place.machine)
    watch = Watch(store, place.rank, names, machines, place.host)
    with watch.over():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(_gpu(place, torch.cuda.device_count()))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=DEFAULT_TIMEOUT,
        )
        comm.create_local_process_group(local_size)
        _check_arguments(args, place, local_size)
        args.num_gpus, args.num_machines = local_size, place.world_size // local_size
        # Of machines that were there before another one failed, torchrun does not count it.
        args.resume = any(comm.all_gather(place.attempt)) or bool(args.resume)
        _run(main, args)
        comm.synchronize()
    dist.destroy_process_group()


def _gpu(place: Place, count: int) -> int:
    """The index of the GPU, of ``count`` that it sees, of the process.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    if place.local_rank < count:
        return place.local_rank
    if count == 1 and place.started_by == "srun":  # which lets each task see its own GPU alone
        return 0
    raise ConfigError(
        f"{place.started_by} has started a process of local rank {place.local_rank} on a machine "
        f"where it sees {count} GPU(s): start one process for each"
    )


def _check_arguments(args: argparse.Namespace, place: Place, local_size: int) -> None:
    """
    Raises:
        ConfigError: ``args`` contradict who started the processes.
    """
    if place.started_by == "--num-gpus":
        return
    if args.num_gpus not in (None, local_size):
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but {place.started_by} has started {local_size} "
            "process(es) on this machine, one for each GPU; leave --num-gpus out"
        )
    for name, default in (("num_machines", 1), ("machine_rank", 0), ("dist_url", None)):
        if (value := getattr(args, name)) != default:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}, but {place.started_by} has started the "
                "processes, and says where they meet; leave it out"
            )


def _start(main: Callable, args: argparse.Namespace) -> None:
    """Start the processes of this machine, pass signals on to them, and end as they do."""
    check_num_gpus(args.num_gpus or 1)
    with tempfile.TemporaryDirectory() as directory:
        url = args.dist_url or "auto"
        if url == "auto" and args.num_machines == 1:
            url = f"file://{directory}/store"  # no port, so that no other run has the same
        elif not url.startswith("tcp://") and args.num_machines > 1:
            raise ConfigError(
                f"--num-machines is {args.num_machines} and --dist-url {url}: it must be "
                "tcp://HOST:PORT, with the machine of --machine-rank 0 and a free port of it, the "
                "same on all machines"
            )
        arguments = (main, args, url)
        received: list[int] = []
        _start_tracker()
        with _passed_on(received):
            processes = start_processes(_child, arguments, args.num_gpus or 1, join=False)
            try:
                while not processes.join(grace_period=_GRACE):
                    pass
            except ProcessExitedException as error:
                if received:
                    sys.exit(130 if signal.SIGINT in received else 143)
                codes = [process.exitcode for process in processes.processes]
                if 1 not in codes and error.signal_name:
                    raise
                sys.exit(1 if 1 in codes else error.exit_code)  # they have said why


def _start_tracker() -> None:
    """Start the resource tracker of multiprocessing, which ignores SIGINT and SIGTERM, with SIGUSR1
    blocked: Slurm signals all processes of a step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(local_rank: int, main: Callable, args: argparse.Namespace, url: str) -> None:
    processes = args.num_gpus or 1
    place = Place(
        rank=args.machine_rank * processes + local_rank,
        world_size=processes * args.num_machines,
        local_rank=local_rank,
        machine=args.machine_rank,
        url=url,
        started_by="--num-gpus",
    )
    # Loading workers start as they do elsewhere (on Linux fast, by fork), not as this process has.
    multiprocessing.set_start_method(None, force=True)
    with handle_signals():
        _in_group(main, args, place)


@contextlib.contextmanager
def _passed_on(received: list[int]) -> Iterator[None]:
    """Within it, the signals that stop a run go to the child processes, and into ``received``; a
    second Ctrl-C ends them at once."""
    first = 0.0

    def pass_on(signum: int, frame: object) -> None:
        nonlocal first
        again = signum == signal.SIGINT in received and time.monotonic() - first > 1
        first = first or time.monotonic()
        received.append(signum)
        for process in multiprocessing.active_children():
            process.kill() if again else os.kill(process.pid, signum)

    with handled_by(pass_on):
        yield
