"""Peers are checked before they are timed. Modules that stand for theirs have their signatures, and
what of their behaviour matters here."""

import sys
import types

import pytest
import torch
from torch import nn

from gn_detect.benchmark import kernels, peers, questions, timing
from gn_detect.benchmark.detectors import Settings
from gn_detect.benchmark.kernels import Layer

pytestmark = pytest.mark.slow

LAYER = Layer((2, 128, 2, 3), 32, relu=True, residual=True)
FIRST = Layer((2, 64, 2, 3), 32, relu=True, residual=False)  # of less channels than apex takes


def nothing(tensor):
    return tensor


class Harm:
    """What a peer does to gamma, to y and to the gradient of gamma."""

    weight = output = gamma = staticmethod(nothing)


class LigerGroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_channels, num_groups, eps):
        assert x.is_contiguous() and x.shape[1] == num_channels
        n, c, hw = x.shape
        ctx.sizes = n, c, hw, num_groups
        arguments = x, Harm.weight(weight), bias, *ctx.sizes, eps
        y, mean, rstd = torch.ops.aten.native_group_norm(*arguments)
        ctx.save_for_backward(x, mean, rstd, weight)
        return Harm.output(y.view(n, num_groups, -1)).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        mask = [True] * 3
        arguments = dy.contiguous(), *ctx.saved_tensors, *ctx.sizes, mask
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(*arguments)
        return dx, Harm.gamma(dweight), dbias, None, None, None


class ApexGroupNorm(nn.GroupNorm):
    def _check_legality(self, x):
        layout = torch.channels_last
        return x.is_contiguous(memory_format=layout) and self.num_channels in (128, 256)


@pytest.fixture
def installed(monkeypatch):
    """Both libraries, or neither."""
    peers.installed.cache_clear()
    for what in ("weight", "output", "gamma"):
        monkeypatch.setattr(Harm, what, nothing)

    def install(there):
        liger = types.SimpleNamespace(LigerGroupNormFunction=LigerGroupNormFunction)
        apex = types.SimpleNamespace(GroupNorm=ApexGroupNorm)
        for name, module in (("liger", liger), ("apex", apex)):
            monkeypatch.setitem(sys.modules, peers.LIBRARIES[name], module if there else None)

    yield install
    peers.installed.cache_clear()


@pytest.fixture
def measure(monkeypatch):
    """``measure(*variants)``: of the forward pass and of both, of FIRST, LAYER and of all, for each
    variant the times, or what it is marked with."""
    monkeypatch.setattr(timing, "WARMUP", 0)
    monkeypatch.setattr(questions, "gn_layers", lambda _: {FIRST: 1, LAYER: 2})

    def run(*variants, layout="nchw"):
        groups = questions.kernels(Settings(layout=layout), variants, 1)
        results = [[measured[name] for name in variants] for _, measured in groups]
        return results[:3], results[3:]

    return run


def test_right_ones_are_timed(installed, measure):
    installed(True)
    for results in measure("eager", "liger"):
        assert all(isinstance(found, dict) for row in results for found in row)


def test_layers_that_they_do_not_take_are_marked(installed, measure):
    installed(True)
    for first, layer, total in measure("liger", "apex", layout="channels_last"):
        assert first == ["Liger's kernels take NCHW alone", "apex leaves this layer to PyTorch"]
        assert layer[0] == first[0] and len(layer[1]["ms"]) == 1
        assert total == first  # as any sum with a part that failed
    for *_, total in measure("apex"):
        assert total == ["apex leaves this layer to PyTorch"]


@pytest.mark.parametrize(
    "what, harm, message",
    [
        ("output", lambda t: t * 1.001, "wrong: the output is off by 0.00"),
        ("output", lambda t: t.masked_fill(t == t.max(), torch.nan), "the output is off by nan"),
        ("weight", torch.ones_like, "wrong: the output is off by "),
        ("gamma", lambda t: 0 * t, "wrong: the gradient of gamma is off by "),
    ],
)
def test_wrong_ones_are_marked(installed, measure, monkeypatch, what, harm, message):
    installed(True)
    monkeypatch.setattr(Harm, what, harm)
    forward, both = measure("eager", "liger")
    for results, wrong in ((forward, what != "gamma"), (both, True)):
        for eager, liger in results:
            assert "ms" in eager
            assert message in liger if wrong else "ms" in liger


def failing(error):
    def fail(_):
        raise error

    return fail


def test_ones_that_raise_are_marked(installed, measure, monkeypatch):
    installed(True)
    monkeypatch.setattr(Harm, "output", failing(RuntimeError("no kernel image\n is available")))
    for results in measure("liger", "eager"):
        for liger, eager in results:
            assert liger == "RuntimeError: no kernel image is available" and "ms" in eager
    monkeypatch.setattr(Harm, "output", failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert measure("liger")[0] == [["out of memory"]] * 3


def test_what_is_no_peer_is_not_marked():
    with pytest.raises(RuntimeError, match="of ours"), peers.marked("ours"):
        raise RuntimeError("of ours")


@pytest.mark.parametrize("there, found", [(True, ("liger", "apex")), (False, ())])
def test_absent_ones_are_left_out(installed, measure, there, found):
    installed(there)
    assert peers.installed() == found
    if not there:  # but not where they are asked for
        assert "ModuleNotFoundError" in measure("liger")[0][0][0]


@pytest.mark.parametrize("name, options", peers.COMPILED.items())
def test_compiled(monkeypatch, name, options):
    """Of each layer anew, with its option."""
    compiled, compile = [], torch.compile

    def eagerly(function, options, **kwargs):
        compiled.append(options)
        return compile(function, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", eagerly)
    with torch._dynamo.config.patch(recompile_limit=2):
        for i in range(1, 4):  # more than that
            layer = Layer((1, 4, i, 2), 2, relu=True, residual=True)
            assert kernels.layer_run(name, "forward", layer, Settings())().shape == layer.shape
    assert compiled == [options] * 3


def test_compiled_on_a_cpu():
    """By Inductor, which is checked."""
    layer = Layer((1, 4, 2, 2), 2, relu=True, residual=True)
    kernels.layer_run("compiled", "forward+backward", layer, Settings())
