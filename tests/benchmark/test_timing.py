import pytest
import torch

from gn_detect.benchmark.timing import Spread, failing, interleave, ratio


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
