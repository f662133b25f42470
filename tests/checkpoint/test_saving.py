"""Runs that are killed, or whose disk is full, while they save."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import safetensors
import torch
import yaml
from detectron2.checkpoint import PeriodicCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import config
from iopath.common.file_io import NativePathHandler
from safetensors.torch import load_file

from gn_detect.checkpoint import Checkpointer, CheckpointError, Origin, WeightGuards, saving
from gn_detect.checkpoint.saving import write_atomically
from gn_detect.config import load_config
from gn_detect.engine import sentence

pytestmark = pytest.mark.slow

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
GUARDS = WeightGuards.from_config(config(R18))
FORK = multiprocessing.get_context("fork")


def make_checkpointer(directory, *, model=None, **kwargs):
    model = torch.nn.Linear(3, 2) if model is None else model
    return Checkpointer(model, str(directory), guards=GUARDS, **kwargs)


def names(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


class Model(torch.nn.Module):
    """1 MB, all of it filled with the number of the iteration."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.zeros(250, 200) for _ in range(5))

    def fill(self, value):
        for parameter in self.parameters():
            parameter.data.fill_(value)


def read(path) -> int:
    """The iteration of a checkpoint, which is whole."""
    checkpoint = torch.load(path)
    values = torch.cat([v.flatten() for v in checkpoint["model"].values()])
    assert len(values) == 5 * 250 * 200 and (values == checkpoint["iteration"]).all()
    return checkpoint["iteration"]


def partial_files(directory) -> list:
    return list(directory.glob("*.partial"))


def train(directory, pipe):
    """Save without end, and say each time what was saved."""
    torch.set_num_threads(1)
    model = Model()
    checkpointer = make_checkpointer(directory, model=model, keep=2)
    iteration = checkpointer.resume_or_load("", resume=True).get("iteration", -1)
    os.write(pipe, b"%d\n" % iteration)
    while True:
        iteration += 1
        model.fill(iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        os.write(pipe, b"%d\n" % iteration)


def test_a_run_is_resumable_whenever_it_is_killed(tmp_path):
    last, cycle, interrupted, kills, generator = -1, 0.05, 0, 40, random.Random(0)
    for kill in range(kills):
        reader, writer = os.pipe()
        child = FORK.Process(target=train, args=(tmp_path, writer))
        child.start()
        os.close(writer)
        with open(reader) as said:
            acknowledged = int(said.readline())
            assert acknowledged == last
            if not kill:  # one save, to know how long it takes
                start = time.perf_counter()
                acknowledged = int(said.readline())
                cycle = time.perf_counter() - start
            time.sleep(generator.uniform(0, 2 * cycle))
            child.kill()
            acknowledged = [acknowledged, *map(int, said)][-1]
        child.join()
        assert child.exitcode == -signal.SIGKILL
        left = partial_files(tmp_path)
        assert len(left) <= 1, left  # those of earlier kills are gone
        interrupted += len(left)
        whole = {read(path): path for path in tmp_path.glob("*.pth")}
        last, pointer = max(whole, default=-1), tmp_path / "last_checkpoint"
        if pointer.exists() and whole[last].stat().st_mtime_ns <= pointer.stat().st_mtime_ns:
            last = read(tmp_path / pointer.read_text())  # as always, or the clock did not tick
        assert acknowledged <= last <= acknowledged + 1
    assert kills / 10 < interrupted < kills and last > kills / 10


def limited_files(directory):
    """The sizes of files are limited, which any user may do: a write beyond is refused."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = Model()
    checkpointer = make_checkpointer(directory, model=model, config="\n" * 100_000)

    def save(iteration, name):
        model.fill(iteration)
        checkpointer.save(name, iteration=iteration)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def refuses(path, last="model_0000000.pth (iteration 0)"):
        """Save model_final; assert that ``path`` fails."""
        with pytest.raises(CheckpointError) as error:
            save(1, "model_final")
        limit(resource.RLIM_INFINITY)
        assert str(error.value) == (
            f"{directory}/{path} could not be written: File too large. The last checkpoint "
            f"{directory}/{last} is intact. Free space there, or keep fewer checkpoints "
            "(SOLVER.CHECKPOINT_KEEP, in lazy configs train.checkpointer.max_to_keep), and "
            "continue with --resume"
        )
        assert not partial_files(directory)
        tagged = "model_final.pth" if "safetensors" in path else "model_0000000.pth"
        assert (directory / "last_checkpoint").read_text() == tagged
        assert read(directory / "model_0000000.pth") == 0
        assert (directory / "model_final.pth").exists() == (path != "model_final.pth")
        if path != "model_final.pth":
            assert read(directory / "model_final.pth") == 1
            (directory / "model_final.pth").unlink()
            (directory / "last_checkpoint").write_text("model_0000000.pth")
        assert not (directory / "model_final.safetensors").exists()

    save(0, "model_final")
    whole = (directory / "model_final.pth").stat().st_size
    assert whole < (directory / "model_final.safetensors").stat().st_size  # of two bytes a line
    for name in ("model_final.pth", "model_final.safetensors"):
        (directory / name).unlink()
    save(0, "model_0000000")
    for size in [0, 1, 5000, whole // 2, *(whole - back for back in (5000, 1000, 100, 22, 2, 1))]:
        limit(size)
        refuses("model_final.pth")
    limit(whole)
    refuses("model_final.safetensors", "model_final.pth (iteration 1)")
    tag = checkpointer.tag_last_checkpoint
    checkpointer.tag_last_checkpoint = lambda name: (limit(5), tag(name))
    refuses("last_checkpoint", "model_final.pth (iteration 1)")
    checkpointer.tag_last_checkpoint = tag
    save(1, "model_final")  # works again
    assert read(directory / "model_final.pth") == 1 and not partial_files(directory)
    weights = load_file(directory / "model_final.safetensors")
    assert all((v == 1).all() for v in weights.values()) and len(weights) == 5


def test_no_room_for_a_file(tmp_path):
    """In a process of its own, which has the imports of this one."""
    child = FORK.Process(target=limited_files, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize(
    "code, remedy",
    [
        *((code, "Free space there, or keep") for code in (errno.ENOSPC, errno.EDQUOT)),
        *((code, "Mend that, and start again") for code in (errno.EROFS, errno.EIO)),
    ],
)
def test_what_the_system_refuses_is_a_sentence(code, remedy, tmp_path):
    def fail(file):
        raise OSError(code, os.strerror(code))

    with pytest.raises(CheckpointError) as error:
        write_atomically(f"{tmp_path}/model_0000000.pth", fail)
    assert sentence(error.value).startswith(
        f"{tmp_path}/model_0000000.pth could not be written: {os.strerror(code)}. There is no "
        f"checkpoint yet. {remedy}"
    )
    assert not names(tmp_path)


def test_keeping_fewer_checkpoints_makes_room_for_the_next(tmp_path, monkeypatch):
    checkpointer = make_checkpointer(tmp_path)
    for iteration in range(2):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    checkpointer = make_checkpointer(tmp_path, keep=1)
    checkpointer.resume_or_load("", resume=True)
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpointer.save("model_0000002")
    assert names(tmp_path) == {"model_0000001.pth", "last_checkpoint"}


def test_what_is_no_fault_of_the_disk_keeps_its_error(tmp_path):
    (tmp_path / "file").write_text("before")

    def fail(file):
        file.write(b"after")
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error") as error:
        write_atomically(str(tmp_path / "file"), fail)
    assert not isinstance(error.value, CheckpointError)
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "before"


def test_left_overs_of_killed_runs_alone_are_removed(tmp_path):
    left = ["model_0000007.pth", "model_final.safetensors", "last_checkpoint"]
    left = {f"{name}.0123abcd.partial" for name in left}
    others = {"download.partial", "a.pth.partial", "b.jpg.0123abcd.partial", "c.pth.tmp"}
    for name in left | others:
        (tmp_path / name).touch()
    make_checkpointer(tmp_path).save("model_0000000")
    assert names(tmp_path) == {*others, "model_0000000.pth", "last_checkpoint"}


def save_slowly(directory, pipe):
    """Half of a file, until the test lets it go on."""

    def write(file):
        file.write(b"half")
        file.flush()
        pipe.send("half")
        pipe.recv()
        file.write(b" and half")

    write_atomically(f"{directory}/model_0000009.pth", write)


def test_what_another_run_is_writing_stays(tmp_path):
    pipe, theirs = FORK.Pipe()
    child = FORK.Process(target=save_slowly, args=(tmp_path, theirs))
    child.start()
    assert pipe.recv() == "half"
    (tmp_path / "model_0000008.pth.0123abcd.partial").touch()
    make_checkpointer(tmp_path).save("model_0000000")
    (partial,) = partial_files(tmp_path)
    assert partial.read_text() == "half" and "model_0000009" in partial.name
    pipe.send("go on")
    child.join()
    assert child.exitcode == 0 and not partial_files(tmp_path)
    assert (tmp_path / "model_0000009.pth").read_text() == "half and half"


def test_what_may_be_written_stays_where_there_are_no_locks(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    for name, minutes in (("old", 61), ("young", 59)):
        path = tmp_path / f"{name}.pth.0123abcd.partial"
        path.touch()
        os.utime(path, (time.time() - 60 * minutes,) * 2)
    make_checkpointer(tmp_path).save("model_0000000")
    assert [path.name for path in partial_files(tmp_path)] == ["young.pth.0123abcd.partial"]
    assert (tmp_path / "model_0000000.pth").exists()


@pytest.mark.parametrize("when", ["removed", "being removed"])
def test_a_file_that_another_run_takes_for_a_left_over(when, tmp_path, monkeypatch):
    """Just after it was made, before it is locked."""
    taken = []

    def lock(file):
        if taken:
            return True
        taken.append(file.name)
        if when == "being removed":
            return False
        os.remove(file.name)
        return True

    monkeypatch.setattr(saving, "try_lock", lock)
    write_atomically(f"{tmp_path}/file.pth", lambda file: file.write(b"whole"))
    assert (tmp_path / "file.pth").read_bytes() == b"whole"
    assert str(tmp_path) in taken[0]


def test_the_newest_checkpoints_are_kept_across_a_resume(tmp_path):
    others = {"model_best.pth", "model_0000001_copy.pth", "other_0000001.pth", "model_final.pth"}
    for name in others | {"model_0000099.pth"}:  # the last one is of a later iteration
        (tmp_path / name).touch()

    def train(start, stop):
        checkpointer = make_checkpointer(tmp_path, keep=2)
        checkpointer.resume_or_load("", resume=start > 0)
        checkpointer = PeriodicCheckpointer(checkpointer, period=2)
        for iteration in range(start, stop):
            checkpointer.step(iteration)
        last = names(tmp_path) - others - {"model_0000099.pth"}
        assert (tmp_path / "last_checkpoint").read_text() in last
        return last - {"last_checkpoint"}

    assert train(0, 2) == {"model_0000001.pth"}
    assert train(2, 8) == {"model_0000005.pth", "model_0000007.pth"}
    assert train(8, 10) == {"model_0000007.pth", "model_0000009.pth"}
    assert others < names(tmp_path)
    make_checkpointer(tmp_path, keep=2).save("model_best")
    make_checkpointer(tmp_path).save("model_0000011")
    assert len(list(tmp_path.glob("model_00000??.pth"))) == 4


def test_a_checkpoint_that_cannot_be_removed_is_said(tmp_path, caplog):
    checkpointer = make_checkpointer(tmp_path, keep=1)
    checkpointer.save("model_0000001")
    (tmp_path / "model_0000001.pth").unlink()
    (tmp_path / "model_0000001.pth").mkdir()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        checkpointer.save("model_0000003")
    assert "model_0000001.pth in" in caplog.text and "cannot be removed" in caplog.text


def test_checkpoints_of_another_run_stay(tmp_path):
    """One that was not resumed, though its iterations are earlier."""
    make_checkpointer(tmp_path).save("model_0000099")
    checkpointer = make_checkpointer(tmp_path, keep=1)
    checkpointer.save("model_0000149")
    checkpointer.save("model_0000199")
    periodic = {"model_0000099.pth", "model_0000199.pth"}
    assert names(tmp_path) == {*periodic, "last_checkpoint"}


class MemoryHandler(NativePathHandler):
    """``memory://run`` is a directory."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self):
        return ["memory://"]

    def _get_path_with_cwd(self, path):
        return str(self.root / path.removeprefix("memory://run").lstrip("/"))

    def _rm(self, path, **kwargs):
        super()._rm(self._get_path_with_cwd(path))


def test_a_directory_of_a_path_handler(tmp_path):
    checkpointer = make_checkpointer("memory://run", keep=1)
    checkpointer.path_manager = type(checkpointer.path_manager)()
    checkpointer.path_manager.register_handler(MemoryHandler(tmp_path))
    for name in ("model_0000000", "model_0000001", "model_final"):
        checkpointer.save(name)
    final = {"model_final.pth", "model_final.safetensors"}
    assert names(tmp_path) == {*final, "model_0000001.pth", "last_checkpoint"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_final.pth")["origin"]["input_format"] == "BGR"


def test_final_weights_as_safetensors(tmp_path):
    opts = ["SOLVER.CHECKPOINT_KEEP", 3, "SOLVER.ACCUMULATE_STEPS", "auto"]
    cfg = config(R18, "MODEL.ROI_BOX_HEAD.FC_DIM", 8, *opts)
    checkpointer = make_checkpointer(tmp_path, model=build_model(cfg), config=cfg.dump())
    checkpointer.save("model_0000000")
    checkpointer.save_safetensors()  # the last checkpoint is not the final one
    assert names(tmp_path) == {"model_0000000.pth", "last_checkpoint"}
    checkpointer.save("model_final", iteration=0)

    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    checkpoint = torch.load(tmp_path / "model_final.pth")
    weights = load_file(tmp_path / "model_final.safetensors")
    assert weights.keys() == checkpoint["model"].keys()
    for key, value in checkpoint["model"].items():
        assert torch.equal(weights[key], value) and weights[key].dtype == value.dtype, key

    with safetensors.safe_open(tmp_path / "model_final.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert Origin.from_dict(checkpoint["origin"]) == checkpointer.origin
    assert json.loads(metadata["gn_detect.origin"]) == json.loads(json.dumps(checkpoint["origin"]))
    fresh, ours = load_config(), yaml.safe_load(cfg.dump())
    assert yaml.safe_load(fresh.dump()) != ours
    fresh.merge_from_other_cfg(CfgNode.load_cfg(metadata["gn_detect.config"]))
    assert yaml.safe_load(fresh.dump()) == ours


def test_safetensors_of_tied_transposed_and_half_weights(tmp_path):
    model = torch.nn.Module()
    model.first = torch.nn.Parameter(torch.randn(4, 6))
    model.tied = model.first
    model.register_buffer("across", torch.randn(5, 3).T)
    model.register_buffer("row", model.first.data[1])
    model.register_buffer("bfloat16_", torch.randn(3).to(torch.bfloat16))
    model.register_buffer("count", torch.tensor(7))
    make_checkpointer(tmp_path, model=model).save("model_final")
    weights = load_file(tmp_path / "model_final.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value) and weights[key].dtype == value.dtype, key


def test_only_the_first_process_saves(tmp_path):
    checkpointer = make_checkpointer(tmp_path, save_to_disk=False)
    checkpointer.save("model_final")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    checkpointer.save_safetensors()
    assert names(tmp_path) == {"last_checkpoint"}
