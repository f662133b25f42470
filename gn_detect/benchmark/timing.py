"""Timing of variants side by side: A B C A B C, so that a machine that slows down hits all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.benchmark import timer  # which waits for the work on a GPU

WARMUP = 3  # rounds that are not kept


class Unfit(Exception):
    """A variant cannot run what is timed, or is wrong; says why."""


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds from the call to the end of all its work on the device."""
    start = timer()
    run()
    return timer() - start


def interleave(
    makers: Mapping[str, Callable[[], Callable[[], object]]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, list[float] | str]:
    """Time variants once per round, in turn.

    Args:
        makers: name -> a function that makes what is timed, in the first round.
        rounds: that are kept, after ``WARMUP``.
        clock: runs a function and gives its seconds.

    Returns:
        name -> seconds of each round, or why it failed, by memory, by an overflow or as
        :class:`Unfit`, which leaves the others. Samples of one index belong to one round.
    """
    runs, results = {}, {name: [] for name in makers}
    for number in range(-WARMUP, rounds):
        for name in [name for name, found in results.items() if isinstance(found, list)]:
            try:
                if name not in runs:
                    runs[name] = makers[name]()
                seconds = clock(runs[name])
                if number >= 0:
                    results[name].append(seconds)
            except (torch.OutOfMemoryError, FloatingPointError, Unfit) as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError)
                results[name] = "out of memory" if out_of_memory else str(error)
                runs.pop(name, None)  # the others need its memory
    return results


def kernel_clock() -> Callable[[Callable[[], object]], float]:
    """A clock of the GPU (events) that first fills the L2 cache with something else: in a network,
    a layer does not find there what it read an iteration ago. It is filled by reading what then
    need not be written back."""
    other, total = torch.zeros(64 * 2**20, device="cuda"), torch.zeros((), device="cuda")  # 256 MiB

    def clock(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(other, dim=0, out=total)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def as_cuda_graph(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` recorded as a CUDA graph, whose replay is kernels alone, without Python."""
    stream = torch.cuda.Stream()  # what is recorded has to be warm, on another stream than usual
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # A graph keeps the memory of what it makes, not the tensors that it reads: `run` has them.
    graph.run = run
    return graph.replay
