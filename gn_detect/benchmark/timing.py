"""Timing of variants side by side: A B C A B C, so that a machine that slows down hits all."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Spread:
    """The quartiles of some samples."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __format__(self, spec: str) -> str:
        """Median and quartiles; without ``spec``, in three digits or more."""
        median, lower, upper = (
            f"{value:{spec}}" if spec else three_digits(value)
            for value in (self.median, self.lower, self.upper)
        )
        return f"{median} ({lower}-{upper})"


def three_digits(value: float) -> str:
    """Three significant digits, and all those before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured how often.

    Args:
        variants: of ``detectors.VARIANTS``, or of ``kernels.VARIANTS``.
        baselines: those among them that the others are compared with.
        rounds, warmup: of :func:`interleave`.
    """

    variants: Sequence[str]
    baselines: Sequence[str]
    rounds: int = 1
    warmup: int = 0


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    clock: Callable[[Callable[[], object]], float],
    failures: dict[str, str],
) -> dict[str, list[float]]:
    """Time each of ``runs`` once per round, in turn.

    Args:
        rounds: that are kept.
        warmup: rounds before them.
        clock: runs a function and gives its seconds.
        failures: of :func:`failing`. Those that fail, or have failed, are left out.

    Returns:
        name -> seconds of each round; samples of one index belong to one round.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name, run in runs.items():
            if name in failures:
                continue
            with failing(name, failures):
                seconds = clock(run)
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


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> Spread:
    """``samples`` over ``baseline``, round by round."""
    return Spread.of([a / b for a, b in zip(samples, baseline, strict=True)])


def wall_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A clock from the start of the call to the end of all its work on ``device``."""

    def clock(run: Callable[[], object]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    return clock


def kernel_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """On CUDA, a clock of the device (events) that first fills the L2 cache with something else:
    in a network, a layer does not find there what it read an iteration ago. It is filled by reading
    what then need not be written back. On a CPU, the wall's.
    """
    if device.type != "cuda":
        return wall_clock(device)
    other, total = torch.zeros(64 * 2**20, device=device), torch.zeros((), device=device)  # 256 MiB

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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
