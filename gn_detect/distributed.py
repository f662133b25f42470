"""What the processes of a run decide together."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from detectron2.utils import comm

T = TypeVar("T")


def from_first_process(function: Callable[[], T]) -> T:
    """Run ``function`` in the first process alone; return its result, or raise its exception, in
    all of them. What it returns is pickled, tensors on the CPU."""
    if comm.get_world_size() == 1:
        return function()
    outcome: list = [None, None]
    if comm.is_main_process():
        try:
            outcome = [function(), None]
        except Exception as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0, group=comm._get_global_gloo_group())
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_each_machine(function: Callable[[], T]) -> dict[str, T]:
    """Run ``function`` once on each machine, in the first process there; return to all processes
    what it returned, by the name of that process, the first machine's first.

    Raises:
        Exception: that of the first machine where there was one, in all processes; it names the
            process where others had none.
    """
    outcome = None
    if comm.get_local_rank() == 0:
        name = process_name(comm.get_rank(), socket.gethostname())
        try:
            outcome = name, function(), None
        except Exception as error:
            outcome = name, None, error
    outcomes = [outcome for outcome in comm.all_gather(outcome) if outcome]
    errors = [(name, error) for name, _, error in outcomes if error]
    if not errors:
        return {name: result for name, result, _ in outcomes}
    name, error = errors[0]
    if len(errors) < len(outcomes) and [type(arg) for arg in error.args] == [str]:
        error.args = (f"on {name}: {error.args[0]}",)
    raise error


def process_name(rank: int, host: str) -> str:
    """What a process is called in messages."""
    return f"rank {rank} (host {host})"
