import contextlib

import pytest
import torch

from gn_detect.benchmark.timing import (
    Spread,
    as_cuda_graph,
    failing,
    interleave,
    kernel_clock,
    ratio,
)


@pytest.fixture
def calls(monkeypatch):
    """What is called of ``torch.cuda``, in order; no GPU is needed."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")
            self.number = calls.count("record")

        def synchronize(self):
            calls.append(f"synchronize {self.number}")

        def elapsed_time(self, end):
            assert (self.number, end.number) == (1, 2)
            return 250.0  # ms

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def within(what):
        calls.append(f"enter {getattr(what, 'name', 'graph')}")
        yield
        calls.append(f"leave {getattr(what, 'name', 'graph')}")

    replaced = {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": within}
    replaced |= {"stream": within, "current_stream": lambda: Stream("usual")}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: "total" if size == ((),) else "other")
    monkeypatch.setattr(torch, "sum", lambda x, dim, out: calls.append(f"read {x} into {out}"))
    return calls


def test_clock_of_the_device(calls):
    clock = kernel_clock(torch.device("cuda"))
    assert clock(lambda: calls.append("run")) == 0.25
    expected = ["read other into total", "record", "run", "record", "synchronize 2"]
    assert calls == expected


def test_a_graph_is_recorded_warm_and_replayed(calls):
    replay = as_cuda_graph(lambda: calls.append("run"))
    before = ["side waits for usual", "enter side", "run", "run", "run", "leave side"]
    before += ["usual waits for side", "enter graph", "run", "leave graph"]
    assert calls == before
    replay()
    assert calls == [*before, "replay"]


def test_variants_run_in_turn_and_warmup_is_dropped():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = iter(range(100))

    def clock(run):
        run()
        return next(times)

    samples = interleave(runs, rounds=2, warmup=1, clock=clock, failures={})
    assert calls == list("abc" * 3)
    assert samples == {"a": [3, 6], "b": [4, 7], "c": [5, 8]}


def test_a_variant_that_fails_leaves_the_others():
    def overflow():
        raise FloatingPointError("an overflow")

    def exhaust():
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB ...")

    calls, failures = [], {"d": "had failed"}
    runs = {"a": overflow, "b": lambda: calls.append("b"), "c": exhaust, "d": overflow}
    samples = interleave(runs, 3, 0, lambda run: (run(), 1.0)[1], failures)
    assert samples == {"b": [1.0] * 3}
    assert failures == {"a": "an overflow", "c": "out of memory", "d": "had failed"}
    with pytest.raises(RuntimeError, match="anything else"), failing("b", failures):
        raise RuntimeError("anything else")


def test_ratios_are_of_one_round():
    # A machine that is ten times as slow in one round changes no ratio.
    spread = ratio([1.0, 20.0, 3.0, 40.0, 5.0], [1.0, 10.0, 2.0, 20.0, 5.0])
    assert spread == Spread(median=1.5, lower=1.0, upper=2.0)
    assert f"{spread:.2f}" == "1.50 (1.00-2.00)"


def test_cells_have_no_exponents():
    assert f"{Spread(1151.4, 0.0123456, 120.4)}" == "1151 (0.0123-120)"
    assert f"{Spread(2.5, 1.0, 99.96)}" == "2.50 (1.00-100)"


def test_one_sample_has_no_spread():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_samples_of_other_rounds_are_not_compared():
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])
