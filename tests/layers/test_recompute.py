import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from gn_detect.layers import GroupNorm, recompute
from gn_detect.layers.recompute import MODES, rebuild_norms, rerun, run_block


class Chain(nn.Module):
    """Convolutions of 16 channels with GN+ReLU, and a linear layer on a view of the last map."""

    def __init__(self, again: bool = False):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(GroupNorm(4, 16) for _ in range(3))
        self.fc = nn.Linear(16 * 64 * 64, 3)
        self.again = again

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(rerun(conv, x) if self.again else conv(x), activation="relu")
        return self.fc(x.flatten(1))

    def reference(self, x):
        """The same with PyTorch's modules, which keep all they want."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(F.group_norm(conv(x), 4, norm.weight, norm.bias))
        return self.fc(x.flatten(1))


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain()


@pytest.fixture
def x():
    return torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(1))


def gradients(module, output, x, **kwargs):
    return torch.autograd.grad(output.square().sum(), [x, *module.parameters()], **kwargs)


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("again, dtype", [(False, torch.float32), (True, torch.float64)])
def test_gradients_are_those_of_pytorch(memory, again, dtype, x):
    torch.manual_seed(0)
    chain, x = Chain(again).to(dtype), x.to(dtype).requires_grad_()
    output = run_block(memory, chain, x)
    expected = chain.reference(x)
    assert torch.equal(output, expected)
    assert_equal(gradients(chain, output, x), gradients(chain, expected, x))


def storages(module):
    """Weak references to the storages of what the children of ``module`` put out."""
    refs = []
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, GroupNorm)):
            child.register_forward_hook(
                lambda module, _, y: refs.append(y.untyped_storage()._weak_ref())
            )
    return refs


def living(refs):
    return sum(not torch.UntypedStorage._expired(ref) for ref in refs)


@pytest.mark.parametrize(
    "memory, again, maps",
    [("fast", False, 6), ("balanced", False, 3), ("balanced", True, 0), ("checkpoint", False, 0)],
)
def test_outputs_of_convolutions_and_norms_that_the_graph_keeps_alive(memory, again, maps, x):
    """Those of norms are gone; where convolutions run again, the input alone stays."""
    chain = Chain(again)
    refs = storages(chain)
    output = run_block(memory, chain, x)
    assert living(refs) == maps and output.requires_grad


def test_a_second_backward_pass(chain, x):
    x.requires_grad_()
    output = run_block("balanced", chain, x)
    first = gradients(chain, output, x, retain_graph=True)
    rebuilt = [o for o in gc.get_objects() if type(o) is recompute._Rebuilt]
    assert len(rebuilt) == 3 and all(o.value is None for o in rebuilt)
    assert_equal(gradients(chain, output, x), first)


def test_gradients_of_gradients(x):
    torch.manual_seed(0)
    chain, x = Chain().double(), x[:, :, :8, :8].double().requires_grad_()
    chain.fc = nn.Linear(16 * 64, 3).double()

    def second(output):
        first = gradients(chain, output, x, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(chain.parameters()))

    found, expected = second(run_block("balanced", chain, x)), second(chain.reference(x))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "what, again",
    [
        *itertools.product(["gamma", "weight of a convolution", "input"], [False, True]),
        ("map", False),  # where convolutions run again, it is not needed
    ],
)
def test_a_change_in_place_is_noticed(what, again, x):
    """By all but PyTorch's checkpoint, as without any mode."""
    chain, maps, x = Chain(again), [], x.clone()
    chain.convs[1].register_forward_hook(lambda module, inputs, y: maps.append(y))
    output = run_block("balanced", chain, x)
    changed = {
        "gamma": chain.norms[1].weight,
        "map": maps[0],
        "weight of a convolution": chain.convs[1].weight,
        "input": x,
    }
    with torch.no_grad():
        changed[what].mul_(2)
    with pytest.raises(RuntimeError, match="in place"):
        output.sum().backward()


def test_a_change_of_the_output_is_noticed(x):
    """Which the last ReLU keeps."""
    norm = GroupNorm(4, 16)
    output = run_block("balanced", lambda x: norm(x, x, "relu"), x.requires_grad_())
    output.add_(1)
    with pytest.raises(RuntimeError, match=r"in place.*\[2, 16, 64, 64\]"):
        output.sum().backward()


@pytest.mark.parametrize("memory", MODES)
def test_a_graph_that_is_dropped_is_freed(memory, x):
    """As of a validation loss, or of a step that is left out."""
    chain = Chain(again=memory == "lean")
    refs = storages(chain)
    output = run_block(memory, chain, x)
    del output
    gc.collect()
    assert len(refs) == 6 and living(refs) == 0


@pytest.mark.parametrize("memory, maps", [("fast", [4, 2, 0]), ("balanced", [2, 1, 0])])
def test_maps_are_freed_while_the_backward_pass_goes_on(memory, maps, x):
    chain = Chain()
    refs, left = storages(chain), []
    for conv in chain.convs:
        conv.weight.register_hook(lambda gradient: left.append(living(refs)))
    run_block(memory, chain, x.requires_grad_()).sum().backward()
    assert left == maps


def test_what_others_change_in_place_is_kept(x):
    torch.manual_seed(0)
    norm, conv = GroupNorm(4, 16), nn.Conv2d(16, 4, 1)
    x.requires_grad_()

    def block(x):
        return conv(norm(x).mul_(2))

    inputs = [x, *norm.parameters(), *conv.parameters()]
    found = torch.autograd.grad(run_block("balanced", block, x).sum(), inputs)
    assert_equal(found, torch.autograd.grad(block(x).sum(), inputs))


def test_a_map_in_the_place_of_another_is_not_taken_for_it(x, monkeypatch):
    """The output of the norm dies in the block, and a later tensor gets its place in memory."""
    monkeypatch.setattr(recompute, "_storage", lambda tensor: 0)
    norm, x = GroupNorm(4, 16), x.requires_grad_()

    def block(x):
        norm(x)
        z = x * 3
        return z * z

    (found,) = torch.autograd.grad(run_block("balanced", block, x).sum(), [x])
    torch.testing.assert_close(found, 18 * x)


def test_nothing_is_noted_without_gradients(chain, x):
    with torch.no_grad(), rebuild_norms():
        output = chain(x)
    assert not output.requires_grad
    assert torch.equal(output, chain.reference(x))


def test_autocast_of_the_forward_pass_is_that_of_what_runs_again(x):
    torch.manual_seed(0)
    chain, x = Chain(again=True), x.requires_grad_()
    outputs = {}
    for memory in ("fast", "balanced"):
        with torch.autocast("cpu", torch.bfloat16):
            outputs[memory] = run_block(memory, chain, x)
    assert outputs["fast"].dtype == torch.bfloat16
    assert_equal(
        gradients(chain, outputs["balanced"].float(), x),
        gradients(chain, outputs["fast"].float(), x),
    )


def test_inside_a_checkpoint(chain, x):
    x.requires_grad_()
    output = run_block("checkpoint", lambda x: run_block("balanced", chain, x), x)
    assert_equal(gradients(chain, output, x), gradients(chain, chain.reference(x), x))


def test_frozen_layers_keep_nothing(chain, x):
    chain.requires_grad_(False)
    with saved_tensors_hooks(lambda t: pytest.fail("a tensor is saved"), lambda t: t):
        chain(x)
    chain.norms[0].requires_grad_(False)
    chain.fc.requires_grad_()
    found = torch.autograd.grad(run_block("balanced", chain, x).sum(), chain.fc.weight)
    assert_equal(found, torch.autograd.grad(chain.reference(x).sum(), chain.fc.weight))
