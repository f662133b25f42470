import gc
import weakref
from unittest.mock import MagicMock

import pytest
import torch

from gn_detect.benchmark.questions import compare, quartiles, ratio
from gn_detect.benchmark.timing import as_cuda_graph, interleave, kernel_clock


@pytest.fixture
def cuda(monkeypatch):
    """Takes all calls of ``torch.cuda``; no GPU is needed. ``names()`` has them in order."""
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: f"{size} on {device}")
    monkeypatch.setattr(torch, "sum", cuda.sum)
    cuda.names = lambda: [name for name, *_ in cuda.mock_calls]
    return cuda


def test_clock_of_the_device(cuda):
    start, end = cuda.Event.side_effect = [cuda.start, cuda.end]
    start.elapsed_time.return_value = 250.0  # ms
    assert kernel_clock()(cuda.run) == 0.25
    assert cuda.sum.call_args.args == ("(67108864,) on cuda",)
    order = ["sum", "start.record", "run", "end.record", "end.synchronize", "start.elapsed_time"]
    assert cuda.names() == ["Event", "Event", *order]
    start.elapsed_time.assert_called_with(end)


def test_a_graph_is_recorded_warm_and_replayed(cuda):
    replay = as_cuda_graph(cuda.run)
    warm = ["Stream().wait_stream", "stream", "stream().__enter__", "run", "run", "run"]
    warm += ["stream().__exit__", "current_stream", "current_stream().wait_stream", "CUDAGraph"]
    recorded = ["graph", "graph().__enter__", "run", "graph().__exit__"]
    assert cuda.names() == ["Stream", "current_stream", *warm, *recorded]
    replay()
    assert cuda.names()[-1] == "CUDAGraph().replay"


def test_a_graph_keeps_what_it_reads(cuda):
    cuda.CUDAGraph = type("CUDAGraph", (), {"replay": lambda self: None})

    def make():
        x = torch.ones(1)
        return as_cuda_graph(lambda: x + 1), weakref.ref(x)

    replay, x = make()
    gc.collect()
    assert x() is not None
    replay()


def test_variants_run_in_turn_and_warmup_is_dropped():
    calls, times = [], iter(range(100))
    makers = {name: lambda name=name: lambda: calls.append(name) for name in "abc"}

    def clock(run):
        run()
        return next(times)

    samples = interleave(makers, 2, clock)
    assert calls == list("abc" * 5)
    assert samples == {"a": [9, 12], "b": [10, 13], "c": [11, 14]}


def test_a_variant_that_fails_leaves_the_others():
    def overflow():
        raise FloatingPointError("an overflow")

    def exhaust():
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB ...")

    def anything_else():
        raise RuntimeError("anything else")

    calls = []
    makers = {"a": overflow, "b": lambda: lambda: calls.append("b"), "c": lambda: exhaust}
    samples = interleave(makers, 3, lambda run: (run(), 1.0)[1])
    assert samples == {"a": "an overflow", "b": [1.0] * 3, "c": "out of memory"}
    with pytest.raises(RuntimeError, match="anything else"):
        interleave({"a": anything_else}, 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, FloatingPointError])
def test_a_variant_that_fails_leaves_its_memory(error):
    class Fails:
        def __call__(self):
            if len(alive) == 4:
                raise error

    def make():
        fails = Fails()
        refs.append(weakref.ref(fails))
        return fails

    refs, alive = [], []
    makers = {"a": make, "b": lambda: lambda: alive.append(refs[0]() is not None)}
    interleave(makers, 3, lambda run: (run(), 1.0)[1])
    assert alive == [True] * 4 + [False] * 2


def test_cells():
    # A machine that is ten times as slow in one round changes no ratio.
    assert ratio([1.0, 20.0, 3.0, 40.0, 5.0], [1.0, 10.0, 2.0, 20.0, 5.0]) == "1.500 (1.000-2.000)"
    with pytest.raises(ValueError):  # samples of other rounds
        ratio([1.0, 2.0], [1.0])
    assert quartiles([1151.4, 0.0123456, 120.44]) == "120 (60.2-636)"
    assert quartiles([1151.4]) == "1150"


def test_rows_are_compared_with_those_that_did_not_fail():
    measured = {
        "a": {"s": [1.0, 3.0], "MiB": [4.0]},
        "b": {"s": [2.0, 3.0], "MiB": [8.0]},
        "c": "out of memory",
    }
    rows = compare({"images": 2}, measured, ["b", "c"])
    assert rows[0] == {
        **{"images": 2, "variant": "a", "s": "2 (1.5-2.5)", "s / b": "0.750 (0.625-0.875)"},
        **{"MiB": "4", "MiB / b": "0.500"},
    }
    assert rows[2] == {"images": 2, "variant": "c", "failure": "out of memory"}
