from unittest.mock import MagicMock

import pytest
import torch

from gn_detect.benchmark.report import compare, quartiles, ratio
from gn_detect.benchmark.timing import as_cuda_graph, failing, interleave, kernel_clock


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


def test_variants_run_in_turn_and_warmup_is_dropped():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = iter(range(100))

    def clock(run):
        run()
        return next(times)

    samples = interleave(runs, 2, 1, {}, clock)
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
    samples = interleave(runs, 3, 0, failures, lambda run: (run(), 1.0)[1])
    assert samples == {"b": [1.0] * 3}
    assert failures == {"a": "an overflow", "c": "out of memory", "d": "had failed"}
    with pytest.raises(RuntimeError, match="anything else"), failing("b", failures):
        raise RuntimeError("anything else")


def test_cells():
    # A machine that is ten times as slow in one round changes no ratio.
    assert ratio([1.0, 20.0, 3.0, 40.0, 5.0], [1.0, 10.0, 2.0, 20.0, 5.0]) == "1.500 (1.000-2.000)"
    with pytest.raises(ValueError):  # samples of other rounds
        ratio([1.0, 2.0], [1.0])
    assert quartiles([1151.4, 0.0123456, 120.44]) == "120 (60.2-636)"
    assert quartiles([1151.4]) == "1150"


def test_rows_are_compared_with_those_that_did_not_fail():
    measured = {"images": 2, "variant": "a", "measures": {"s": [1.0, 3.0], "MiB": [4.0]}}
    other = {"images": 2, "variant": "b", "measures": {"s": [2.0, 3.0], "MiB": [8.0]}}
    failed = {"images": 2, "variant": "c", "failure": "out of memory"}
    rows = compare([measured, other, failed], ["b", "c"])
    assert rows[0] == {
        **{"images": 2, "variant": "a", "s": "2 (1.5-2.5)", "s / b": "0.750 (0.625-0.875)"},
        **{"MiB": "4", "MiB / b": "0.500"},
    }
    assert rows[2] == failed
