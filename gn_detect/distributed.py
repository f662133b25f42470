"""What the processes of a run decide together."""

from __future__ import annotations

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
