"""Timing of variants side by side: A B C A B C, so that a machine that slows down hits all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.utils.benchmark import timer  # which waits for the work on a GPU


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds from the call to the end of all its work on the device."""
    start = timer()
    run()
    return timer() - start


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    failures: dict[str, str],
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, list[float]]:
    """Time each of ``runs`` once per round, in turn.

    Args:
        rounds: that are kept.
        warmup: rounds before them.
        failures: of :func:`failing`. Those that fail, or have failed, are left out.
        clock: runs a function and gives its seconds.

    Returns:
        name -> seconds of each round; samples of one index belong to one round.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name in [name for name in runs if name not in failures]:
            with failing(name, failures):
                seconds = clock(runs[name])
                if number >= 0:
                    samples[name].append(seconds)
    return {name: values for name, values in samples.items() if name not in failures}


@contextlib.contextmanager
def failing(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Note in ``failures`` that a variant is out of memory or overflows, and go on with others."""
    try:
        yield
    except torch.OutOfMemoryError:
        failures[name] = "out of memory"
    except FloatingPointError as error:
        failures[name] = str(error)


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
    return graph.replay
