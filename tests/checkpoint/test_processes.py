"""Two processes of one run, on machines that share no directory: the files of the first count."""

import os
import pickle

import numpy as np
import pytest
import torch
from engine.pair import two_machines
from helpers import TINY, config
from safetensors.torch import save_file

from gn_detect.checkpoint import (
    Checkpointer,
    CheckpointError,
    WeightGuards,
    WeightsError,
    read_weights,
)
from gn_detect.config import ConfigError
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import prepare_run

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
GUARDS = WeightGuards.from_config(config(R18))


def there(rank, root, function, arguments):
    os.chdir(root / f"machine{rank}")
    return function(rank, *arguments)


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    """What a function returns or raises in two processes, each in a directory of its own."""
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()

    def start(function, *arguments):
        with two_machines(tmp_path_factory.mktemp("meeting")) as call:
            return call(there, tmp_path, function, arguments)

    return start


@pytest.fixture
def first(tmp_path, run):
    """The directory of the first machine."""
    return tmp_path / "machine0"


def make_checkpointer(rank, **kwargs):
    model = torch.nn.Linear(30, 20)
    torch.nn.init.constant_(model.weight, 10.0 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + rank, momentum=0.9)
    return Checkpointer(model, "output", guards=GUARDS, optimizer=optimizer, **kwargs)


def state_of(checkpointer):
    """To be sent by a pipe."""
    state = {name: value.numpy() for name, value in checkpointer.model.state_dict().items()}
    return state | {"lr": checkpointer.checkpointables["optimizer"].param_groups[0]["lr"]}


def save(directory, *iterations):
    checkpointer = make_checkpointer(0)
    checkpointer.save_dir = str(directory / "output")
    (directory / "output").mkdir(exist_ok=True)
    for iteration in iterations:
        torch.nn.init.constant_(checkpointer.model.weight, iteration)
        checkpointer.checkpointables["optimizer"].param_groups[0]["lr"] = iteration / 10
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


def assert_equal(states):
    for key, value in states[0].items():
        assert np.array_equal(value, states[1][key]), key


def resume(rank):
    checkpointer = make_checkpointer(rank)
    rest = checkpointer.resume_or_load("", resume=True)
    state = state_of(checkpointer)
    file = checkpointer.get_checkpoint_file()
    if rank == 0:  # alone, as its hooks do
        checkpointer.save("model_0000007", iteration=7)
        assert checkpointer.get_checkpoint_file() == "output/model_0000007.pth"
        checkpointer.save("model_final", iteration=7)
    checkpointer.save_safetensors()
    return state, rest["iteration"], file, checkpointer.has_checkpoint()


def test_all_resume_from_the_checkpoint_of_the_first(first, run):
    save(first, 3, 5)
    os.truncate(first / "output" / "model_0000005.pth", 999)
    states, iterations, files, found = zip(*run(resume), strict=True)
    assert_equal(states)
    assert (states[1]["weight"] == 3).all() and states[1]["lr"] == 0.3
    assert iterations == (3, 3) and files == 2 * ("output/model_0000003.pth",) and all(found)
    assert not (first.parent / "machine1" / "output").exists()


def test_a_checkpoint_of_another_machine_does_not_count(first, run):
    save(first, 3)
    other = first.parent / "machine1" / "output"
    (first / "output").rename(other)
    assert run(start_at_zero) == [(10.0, ""), (11.0, "")]  # DDP has made their weights the same
    assert os.listdir(other)


def load_directly(rank):
    model = torch.nn.Linear(30, 21)
    Checkpointer(model, "output", guards=GUARDS).load("output/model_0000003.pth")


def test_all_know_that_they_resume(first, run):
    save(first, 3)
    errors = run(load_directly)
    assert [type(error) for error in errors] == 2 * [ConfigError]
    assert all("--resume: output/model_0000003.pth is of another model" in str(e) for e in errors)


def start_at_zero(rank):
    checkpointer = make_checkpointer(rank)
    assert not checkpointer.resume_or_load("", resume=True) and not checkpointer.has_checkpoint()
    return checkpointer.model.weight[0, 0].item(), checkpointer.get_checkpoint_file()


def load(rank, path):
    checkpointer = make_checkpointer(rank)
    checkpointer.resume_or_load(path, resume=False)
    return state_of(checkpointer) | {"lr": None}


@pytest.mark.parametrize("form", ["pth", "numpy", "safetensors"])
def test_all_load_the_weights_of_the_first(form, first, run):
    save(first, 3)
    content = torch.load(first / "output" / "model_0000003.pth")
    if form == "safetensors":
        save_file(content["model"], first / "weights")
    elif form == "numpy":
        content["model"] = {k: v.numpy() for k, v in content["model"].items()}
        content["beside"] = np.arange(6).reshape(2, 3).T
        (first / "weights").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, first / "weights")
    states = run(load, "weights")
    assert_equal(states)
    assert (states[1]["weight"] == 3).all()


def test_what_the_first_cannot_read_ends_all(first, run):
    errors = run(load, "weights")
    assert [type(error) for error in errors] == 2 * [WeightsError]
    assert all("there is no file weights" in str(error) for error in errors)
    save(first, 3)
    os.truncate(first / "output" / "model_0000003.pth", 999)
    errors = run(resume)
    assert [type(error) for error in errors] == 2 * [CheckpointError]
    assert all("model_0000003.pth is damaged" in str(error) for error in errors)


def prepare(rank, files, resume, *opts):
    register_coco_json("own", str(files.json_file), str(files.image_root))
    data = ("DATASETS.TRAIN", ("own",), "DATASETS.TEST", ("own",), "OUTPUT_DIR", "output")
    cfg = config(R18, *TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, *data, *opts)
    prepare_run(cfg, processes=2, resume=resume)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU")
def test_the_first_looks_for_what_a_run_starts_from(first, run, coco_files):
    errors = run(prepare, coco_files, False, "MODEL.WEIGHTS", "weights")
    assert [type(error) for error in errors] == 2 * [ConfigError]
    assert all("MODEL.WEIGHTS: there is no file weights" in str(error) for error in errors)
    (first / "weights").touch()
    assert run(prepare, coco_files, False, "MODEL.WEIGHTS", "weights") == [None, None]
    # A run that is resumed needs no weights.
    save(first, 3)
    freeze = ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.WEIGHTS", "absent")
    assert run(prepare, coco_files, True, *freeze) == [None, None]
    os.truncate(first / "output" / "model_0000003.pth", 999)
    errors = run(prepare, coco_files, True, *freeze)
    assert [type(error) for error in errors] == 2 * [CheckpointError]


def test_an_array_of_a_file_is_sent_as_a_plain_one(tmp_path):
    content = {"model": {"stem.conv1.weight": np.ones((2, 3))}, "beside": np.eye(3)[:, :2]}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content, protocol=2))
    rest = read_weights(str(tmp_path / "weights.pkl")).rest
    sent = pickle.loads(pickle.dumps(rest))["beside"]
    assert type(sent) is np.ndarray and np.array_equal(sent, content["beside"])
