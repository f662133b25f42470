"""What two processes refuse to do together."""

import pytest
import torch
from dataset_commands import QUICK
from engine.pair import two_machines
from helpers import config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gn_detect
from gn_detect.config import ConfigError
from gn_detect.engine import agreement
from gn_detect.engine.agreement import check_same, check_weights_same
from gn_detect.engine.errors import ProcessesError
from gn_detect.engine.lazy_config import load_lazy_config

SENTENCE = "the processes were told different things: {}; start the same command, with the same "
SENTENCE += "software, on each machine"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with two_machines(tmp_path_factory.mktemp("agreement")) as run:
        yield run


def options(rank, theirs, arguments=({}, {})):
    check_same(
        config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", *theirs[rank]), **arguments[rank]
    )


def refused(outcomes, kind=ConfigError):
    """The one sentence of both processes."""
    assert [type(outcome) for outcome in outcomes] == [kind, kind]
    first, second = map(str, outcomes)
    assert first == second
    return first


@pytest.mark.parametrize(
    "key, first, second",
    [
        ("SOLVER.BASE_LR", 0.02, 0.01),
        ("MODEL.ROI_MASK_HEAD.CONV_DIM", 64, 128),
        ("SOLVER.MAX_ITER", 100, 200),
        ("SOLVER.IMS_PER_BATCH", 2, 4),
        ("SOLVER.IMS_PER_GPU", 1, 2),
        ("MODEL.RESNETS.NORM", "GN", "BN"),
        ("SEED", 1, 2),
        ("GUARDS.LEARNING_RATE", True, False),
        ("DATASETS.TRAIN", ("a",), ("a", "b")),
    ],
)
def test_a_key_that_differs(run, key, first, second):
    text = refused(run(options, [(key, first), (key, second)]))
    wanted = f"{key} is {first!r} on rank 0 (host a), {second!r} on rank 1 (host b)"
    assert text == SENTENCE.format(wanted)
    assert run(options, [(key, second), (key, second)]) == [None, None]


def test_what_is_typed_differs_though_it_is_what_the_file_states(run):
    """One would scale it, the other not."""
    typed = [{"typed": ["SOLVER.MAX_ITER", "OUTPUT_DIR"]}, {"typed": []}]
    text = refused(run(options, [(), ()], typed))
    wanted = "what is typed is SOLVER.MAX_ITER on rank 0 (host a), nothing on rank 1 (host b)"
    assert text == SENTENCE.format(wanted)


def test_many_keys_that_differ(run):
    guards = [f"GUARDS.{name}" for name in config().GUARDS]
    on, off = ([x for key in guards for x in (key, value)] for value in (True, False))
    text = refused(run(options, [on, off]))
    assert text.count("on rank 1 (host b)") == 8 and f"; and {len(guards) - 8} more; " in text


def test_each_machine_may_have_its_own_output(run):
    assert run(options, [("OUTPUT_DIR", "x"), ("OUTPUT_DIR", "y")]) == [None, None]


@pytest.mark.parametrize(
    "name, first, second", [("resume", False, True), ("val_fraction", 0.2, 0.1)]
)
def test_an_argument_that_differs(run, name, first, second):
    text = refused(run(options, [(), ()], [{name: first}, {name: second}]))
    option = f"--{name.replace('_', '-')}"
    wanted = f"{option} is {first} on rank 0 (host a), {second} on rank 1 (host b)"
    assert text == SENTENCE.format(wanted)


def other_machine(rank):
    if rank:
        versions = [(module, module.__version__) for module in (gn_detect, torch)]
        cuda = torch.cuda.is_available
        try:
            gn_detect.__version__, torch.__version__ = "0.0", "2.0"
            torch.cuda.is_available = lambda: "soon"
            return options(rank, [(), ()])
        finally:
            torch.cuda.is_available = cuda
            for module, version in versions:
                module.__version__ = version
    return options(rank, [(), ()])


def test_other_software(run):
    text = refused(run(other_machine))
    versions = {"gn_detect": (gn_detect.__version__, "0.0"), "torch": (torch.__version__, "2.0")}
    for name, (ours, theirs) in versions.items():
        wanted = f"the version of {name} is {ours} on rank 0 (host a), {theirs} on rank 1 (host b)"
        assert wanted in text
    assert f"is_available() is {torch.cuda.is_available()} on rank 0 (host a), soon on" in text


def lazy(rank, theirs, objects=False):
    cfg = load_lazy_config(QUICK, theirs[rank])
    if objects:  # at an address of its own in each process
        kept = [object() for _ in range(50 * rank + 1)]
        cfg.model.unknown, cfg.model.function = kept[-1], lazy
    check_same(cfg)


def test_a_lazy_config(run):
    text = refused(run(lazy, [["optimizer.lr=0.02"], ["optimizer.lr=0.01"]]))
    wanted = "optimizer.lr is 0.02 on rank 0 (host a), 0.01 on rank 1 (host b)"
    assert text == SENTENCE.format(wanted)
    key = "dataloader.train.mapper.augmentations.0.max_size"
    text = refused(run(lazy, [[f"{key}=640"], [f"{key}=320"]]))
    assert "augmentations[0].max_size is 640 on rank 0 (host a), 320 on rank 1" in text
    text = refused(run(lazy, [[], ["model.backbone.extra=1"]]))
    assert "model.backbone.extra is absent on rank 0 (host a), 1 on rank 1 (host b)" in text
    assert run(lazy, [["train.output_dir=x"], ["train.output_dir=y"]], True) == [None, None]


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.setattr(agreement, "_options", None)
    monkeypatch.setattr(agreement.comm, "all_gather", None)
    options(0, [()])
    check_weights_same(nn.Linear(2, 2), 0)


def drift(rank, name, change, everywhere=False, parallel=False):
    """``change(value)`` replaces a parameter or buffer of the second process, or of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3))
    model.register_parameter("zero", nn.Parameter(torch.zeros(3), requires_grad=False))
    if parallel:
        model = DistributedDataParallel(model)
    if rank or everywhere:
        with torch.no_grad():
            value = getattr(model, "module", model).state_dict()[name]
            value.copy_(change(value))
    check_weights_same(model, 500)


def by_a_thousandth(value):
    return value * 1.001


def by_one_ulp(value):
    return value.nextafter(torch.tensor(torch.inf))


def with_one(number, value):
    return value.flatten().index_fill(0, torch.tensor(5), number).view_as(value)


def one_nan(value):
    return with_one(torch.nan, value)


def one_infinite(value):
    return with_one(-torch.inf, value)


def one_flipped_exponent(value):
    return with_one(1e20, value)


def negated(value):
    return -value


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["0.bias", "2.weight", "1.weight"])
@pytest.mark.parametrize(
    "change", [by_a_thousandth, one_nan, one_infinite, one_flipped_exponent, negated]
)
def test_a_parameter_that_differs(run, name, change, parallel):
    text = refused(run(drift, name, change, False, parallel), ProcessesError)
    assert text.startswith(
        "at iteration 500 the weights of rank 1 (host b) are not those of rank 0 (host a): 1 of 7 "
        f"parameters differ, most of all {name}, whose sum is "
    )


def test_the_values_of_a_parameter_that_differs(run):
    text = refused(run(drift, "1.weight", by_a_thousandth), ProcessesError)
    assert "whose sum is 64 on rank 0 (host a) and 64.064 on rank 1 (host b)" in text
    text = refused(run(drift, "zero", torch.cos), ProcessesError)
    assert "zero, whose sum is 0 on rank 0 (host a) and 3 on rank 1 (host b)" in text


def several(rank):
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    for i, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, 1 + rank * [0.0, 1e-3, 1e-2, 1e-6][i])
    nn.init.constant_(model[0].weight, torch.nan)
    check_weights_same(model, 0)


def test_the_worst_of_several_is_named(run):
    text = refused(run(several), ProcessesError)
    assert "2 of 4 parameters differ, most of all 1.weight" in text


@pytest.mark.parametrize(
    "name, change, everywhere",
    [
        ("2.weight", by_one_ulp, False),  # other hardware rounds otherwise
        ("2.bias", by_one_ulp, False),
        ("1.running_mean", torch.cos, False),  # of the images of a process
        ("2.weight", one_nan, True),
        ("2.weight", one_infinite, True),
    ],
)
def test_what_is_the_same(run, name, change, everywhere):
    assert run(drift, name, change, everywhere) == [None, None]
