import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from gn_detect.solver import fuse_sgd

CHANNELS_LAST = torch.channels_last


class Plain:
    """SGD as Sutskever et al. (ICML 2013) have it in PyTorch's form, in float64."""

    def __init__(self, parameters, lr, momentum, weight_decay, nesterov=False):
        self.values = [p.detach().double().clone() for p in parameters]
        self.momenta = [None] * len(self.values)
        self.options = lr, momentum, weight_decay, nesterov

    def step(self, gradients):
        lr, momentum, weight_decay, nesterov = self.options
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            step = gradient.double() + weight_decay * self.values[i]
            if momentum:
                last = self.momenta[i]
                self.momenta[i] = step if last is None else momentum * last + step
                step = step + momentum * self.momenta[i] if nesterov else self.momenta[i]
            self.values[i] = self.values[i] - lr * step


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((4, 3, 3, 3), (8, 5), (7,), (4, 6, 1, 1))
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradients(step: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(10 + step)
    return [torch.randn_like(p) for p in parameters(dtype)]


def give(parameters, gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


def assert_same(parameters, plain, **tolerance) -> None:
    for parameter, value in zip(parameters, plain.values, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, **tolerance)


CLOSE = {"rtol": 1e-5, "atol": 1e-6}
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@pytest.fixture
def fused_calls(monkeypatch):
    """The number of tensors of each call of PyTorch's kernel."""
    calls, kernel = [], torch._fused_sgd_

    def count(parameters, *args, **kwargs):
        calls.append(len(parameters))
        return kernel(parameters, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_sgd_", count)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov, momentum", [(False, 0.9), (True, 0.9), (False, 0.0)])
def test_it_is_plain_sgd(dtype, nesterov, momentum, fused_calls):
    options = {**OPTIONS, "momentum": momentum, "nesterov": nesterov}
    trained = parameters(dtype)
    optimizer, plain = torch.optim.SGD(trained, **options), Plain(trained, **options)
    fuse_sgd(optimizer)
    for step in range(4):
        give(trained, gradients(step, dtype))
        optimizer.step()
        plain.step(gradients(step, dtype))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else CLOSE
    assert_same(trained, plain, **tolerance)
    assert fused_calls == [4] * 4


@pytest.mark.parametrize("of_gradient", [False, True])
@pytest.mark.parametrize("of_parameter", [False, True])
@pytest.mark.parametrize("of_momentum", [False, True])
def test_memory_formats_may_differ(of_parameter, of_gradient, of_momentum):
    def laid_out(tensor, channels_last):
        return tensor.to(memory_format=CHANNELS_LAST) if channels_last else tensor

    trained = [nn.Parameter(laid_out(parameters()[0].detach(), of_parameter))]
    optimizer, plain = torch.optim.SGD(trained, **OPTIONS), Plain(trained, **OPTIONS)
    fuse_sgd(optimizer)
    for step in range(3):
        gradient = laid_out(gradients(step)[0], of_gradient)
        give(trained, [gradient])
        optimizer.step()
        plain.step([gradient])
        state = optimizer.state[trained[0]]  # as after resuming a run with the other format
        state["momentum_buffer"] = laid_out(state["momentum_buffer"].contiguous(), of_momentum)
    assert_same(trained, plain, **CLOSE)


def test_a_parameter_may_get_its_first_gradient_later():
    trained = parameters()
    optimizer, plain = torch.optim.SGD(trained, **OPTIONS), Plain(trained, **OPTIONS)
    fuse_sgd(optimizer)
    for step in range(4):
        grads = gradients(step)
        grads[1] = None if step in (0, 2) else grads[1]
        grads[2] = None
        give(trained, grads)
        optimizer.step()
        plain.step(grads)
    assert_same(trained, plain, **CLOSE)
    assert trained[2] not in optimizer.state


@pytest.mark.parametrize("old_is_fused, new_is_fused", [(True, True), (False, True), (True, False)])
def test_a_state_goes_on_with_and_without(old_is_fused, new_is_fused, fused_calls):
    trained = parameters()
    plain, state = Plain(trained, **OPTIONS), None
    for is_fused, steps in ((old_is_fused, (0, 1)), (new_is_fused, (2, 3))):
        # As Detectron2 builds it.
        optimizer = torch.optim.SGD(trained, **OPTIONS, foreach=True)
        if is_fused:
            fuse_sgd(optimizer)
        if state:
            optimizer.load_state_dict(state)
        fused_calls.clear()
        for step in steps:
            give(trained, gradients(step))
            optimizer.step()
            plain.step(gradients(step))
        assert fused_calls == [4] * 2 * is_fused
        state = optimizer.state_dict()
    assert_same(trained, plain, **CLOSE)


def test_resuming_is_exact():
    whole, trained = parameters(), parameters()
    optimizer = torch.optim.SGD(whole, **OPTIONS)
    fuse_sgd(optimizer)
    for step in range(4):
        give(whole, gradients(step))
        optimizer.step()
    state = None
    for steps in ((0, 1), (2, 3)):
        optimizer = torch.optim.SGD(trained, **OPTIONS)
        fuse_sgd(optimizer)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            give(trained, gradients(step))
            optimizer.step()
        state = optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole, trained, strict=True))


@pytest.mark.parametrize("of_class", [False, True])
def test_detectron2s_clipping_comes_first(of_class, fused_calls):
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.2
    trained = parameters()
    plain = Plain(trained, **OPTIONS)
    if of_class:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(trained, **OPTIONS)
    else:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(trained, **OPTIONS))
    fuse_sgd(optimizer)
    for step in range(3):
        give(trained, gradients(step))
        optimizer.step()
        plain.step([gradient.clamp(-0.2, 0.2) for gradient in gradients(step)])
    assert_same(trained, plain, **CLOSE)
    assert fused_calls == [4] * 3


def test_what_the_kernel_cannot_do_is_left_as_it_was(fused_calls):
    def step(optimizer, device="cpu"):
        fuse_sgd(optimizer)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, dampening=0.5))
    memory = torch.zeros(8, 10)
    step(torch.optim.SGD([nn.Parameter(memory[:, :4])], lr=0.1))
    assert torch.equal(memory, torch.cat([torch.full((8, 4), -0.1), torch.zeros(8, 6)], dim=1))
    step(torch.optim.Adam(parameters(), lr=0.1))
    step(torch.optim.SGD([nn.Parameter(p.to("meta")) for p in parameters()], lr=0.1))
    assert fused_calls == []


def test_sparse_gradients_are_left_to_pytorch():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    fuse_sgd(optimizer)
    expected = embedding.weight.detach().clone()
    embedding(torch.tensor([2])).sum().backward()
    optimizer.step()
    expected[2] -= 0.1
    torch.testing.assert_close(embedding.weight.detach(), expected)


def test_a_copy_is_plain_sgd():
    """Copies and pickles of an optimizer have its groups, but not its hooks."""
    trained = [nn.Parameter(p.detach().to(memory_format=CHANNELS_LAST)) for p in parameters()[:1]]
    plain = Plain(trained, **OPTIONS)
    optimizer = torch.optim.SGD(trained, **OPTIONS)
    fuse_sgd(optimizer)
    for step in range(3):
        if step == 1:
            optimizer = copy.deepcopy(optimizer)
            trained = optimizer.param_groups[0]["params"]
        give(trained, gradients(step)[:1])
        optimizer.step()
        plain.step(gradients(step)[:1])
    assert_same(trained, plain, **CLOSE)
