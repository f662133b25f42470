"""Runs that are killed, or whose disk is full, while they save."""

import json
import logging
import shutil
import subprocess

import pytest
import safetensors
import torch
import yaml
from detectron2.checkpoint import PeriodicCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers import config, run_script
from iopath.common.file_io import PathHandler
from safetensors.torch import load_file

from gn_detect.checkpoint import Checkpointer, CheckpointError, Origin, WeightGuards
from gn_detect.checkpoint.saving import write_atomically
from gn_detect.checkpoint.weight_guards import SWITCHES
from gn_detect.config import load_config
from gn_detect.engine import sentence

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"


def make_checkpointer(directory, *, model=None, **kwargs):
    guards = WeightGuards(
        Origin("BGR", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), None),
        {"input_format": "", "pixel_mean": "", "pixel_std": "", "stride_in_1x1": ""},
        {name: (name, True) for name in SWITCHES},
    )
    model = torch.nn.Linear(3, 2) if model is None else model
    return Checkpointer(model, str(directory), guards=guards, **kwargs)


def names(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


# What the scripts share: a model of 5 MB, all of it filled with the number of the iteration.
COMMON = """
import os, sys
from pathlib import Path
import torch
from checkpoint.test_saving import make_checkpointer

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.zeros(500, 500) for _ in range(5))

    def fill(self, value):
        for parameter in self.parameters():
            parameter.data.fill_(value)

def read(directory):
    '''The iteration of the last checkpoint, which is whole.'''
    path = directory / (directory / "last_checkpoint").read_text()
    checkpoint = torch.load(path, weights_only=True)
    values = torch.cat([v.flatten() for v in checkpoint["model"].values()])
    assert len(checkpoint["model"]) == 5 and len(values) == 5 * 500 * 500
    assert (values == checkpoint["iteration"]).all()
    return checkpoint["iteration"]

def partial_files(directory):
    return list(directory.glob("*.partial"))

torch.set_num_threads(1)
"""

KILLS = """
import random, signal, time

def train(directory, pipe):
    model = Model()
    checkpointer = make_checkpointer(directory, model=model, keep=2)
    iteration = checkpointer.resume_or_load("", resume=True).get("iteration", -1)
    os.write(pipe, b"%d\\n" % iteration)
    while True:
        iteration += 1
        model.fill(iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        os.write(pipe, b"%d\\n" % iteration)

directory, generator = Path("run"), random.Random(0)
directory.mkdir()
last, cycle, interrupted = -1, 0.05, 0
for kill in range(200):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            train(directory, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as said:
        resumed = int(said.readline())
        assert resumed == last, f"kill {kill}: resumed at {resumed}, not {last}"
        if not kill:  # one save, to know how long it takes
            start = time.perf_counter()
            said.readline()
            cycle = time.perf_counter() - start
        time.sleep(generator.uniform(0, 2 * cycle))
        os.kill(child, signal.SIGKILL)
        acknowledged = [last, *map(int, said)][-1]
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = partial_files(directory)
    assert len(left) <= 1, left  # those of earlier kills are gone
    interrupted += len(left)
    if (directory / "last_checkpoint").exists():
        last = read(directory)
        assert acknowledged <= last <= acknowledged + 1, f"kill {kill}: {last}"
    else:
        assert acknowledged == -1
print(f"{interrupted} of 200 kills left a partial file; {last + 1} checkpoints, {cycle:.3f} s each")
assert 40 < interrupted < 200 and last > 40
"""


def test_a_killed_run_is_resumable_200_times_of_200(tmp_path):
    run_script(COMMON + KILLS, cwd=tmp_path)


# Two checkpoints, then a last one for which there is no room.
FULL_DISK = """
import safetensors.torch
from gn_detect.checkpoint import CheckpointError

directory = Path("run")
model = Model()
checkpointer = make_checkpointer(directory, model=model, config="x" * 100_000)

def save(iteration, name):
    model.fill(iteration)
    checkpointer.save(name, iteration=iteration)

def refused(path, earlier="model_0000000.pth", reason="No space left on device"):
    '''Save model_final; assert that ``path`` fails.'''
    try:
        save(1, "model_final")
    except CheckpointError as error:
        expected = (
            f"run/{path} could not be written: {reason}. The earlier checkpoint run/{earlier} is "
            "intact. Free space there, or keep fewer checkpoints (SOLVER.CHECKPOINT_KEEP, in lazy "
            "configs train.checkpointer.max_to_keep), and continue with --resume"
        )
        assert str(error) == expected, error
    else:
        raise AssertionError(f"{path} was written")
    assert not partial_files(directory)
    assert (directory / "last_checkpoint").read_text() == earlier
    assert read(directory) == (earlier == "model_final.pth")
    assert (directory / "model_final.pth").exists() == (path != "model_final.pth")
    assert not (directory / "model_final.safetensors").exists()
    (directory / "model_final.pth").unlink(missing_ok=True)
    if earlier == "model_final.pth":
        (directory / "last_checkpoint").write_text("model_0000000.pth")

def works_again():
    save(1, "model_final")
    assert read(directory) == 1 and not partial_files(directory)
    weights = safetensors.torch.load_file("run/model_final.safetensors")
    assert all((v == 1).all() for v in weights.values()) and len(weights) == 5
"""

# The sizes of files are limited, which any user may do: a write beyond is refused.
LIMIT = """
import resource, signal

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

directory.mkdir()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save(0, "model_final")
whole = (directory / "model_final.pth").stat().st_size
assert whole < (directory / "model_final.safetensors").stat().st_size  # 100 kB of config
for name in ("model_final.pth", "model_final.safetensors"):
    (directory / name).unlink()
save(0, "model_0000000")

sizes = [0, 1, 100, 5000, *range(whole // 7, whole, whole // 7)]
for size in [*sizes, *(whole - back for back in (5000, 1000, 300, 100, 22, 2, 1))]:
    limit(size)
    refused("model_final.pth", reason="File too large")
limit(whole)
refused("model_final.safetensors", "model_final.pth", "File too large")
tag = checkpointer.tag_last_checkpoint
checkpointer.tag_last_checkpoint = lambda name: (limit(5), tag(name))
refused("last_checkpoint", reason="File too large")
checkpointer.tag_last_checkpoint = tag
limit(resource.RLIM_INFINITY)
works_again()
"""


def test_no_room_for_a_file(tmp_path):
    run_script(COMMON + FULL_DISK + LIMIT, cwd=tmp_path)


# A real file system of 20 MB, in name spaces of the script's own, which need no root.
TMPFS = """
if len(sys.argv) == 1:
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "script.py", "-"]
    os.execvp("unshare", command)
import subprocess

directory.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", "run"], check=True)
save(0, "model_0000000")
PAGE = os.sysconf("SC_PAGE_SIZE")
filler = directory / "filler"

def leave(pages):
    '''Fill the disk but for so many pages.'''
    filler.unlink(missing_ok=True)
    free = os.statvfs(directory).f_bavail
    with filler.open("wb") as f:
        f.write(bytes((free - pages) * PAGE))
    assert os.statvfs(directory).f_bavail == pages

whole = -(-(directory / "model_0000000.pth").stat().st_size // PAGE)  # that of model_final.pth
for pages in [0, 1, 2, *range(whole // 9, whole, whole // 9), whole - 2, whole - 1]:
    leave(pages)
    refused("model_final.pth")
leave(whole)
refused("last_checkpoint")
for pages in (1, 2, whole // 2, whole):  # beside the checkpoint and a second last_checkpoint
    leave(whole + pages)
    refused("model_final.safetensors", "model_final.pth")
filler.unlink()
works_again()

# Keeping fewer checkpoints makes room.
(directory / "model_final.safetensors").unlink()
(directory / "model_final.pth").rename(directory / "model_0000001.pth")
(directory / "last_checkpoint").write_text("model_0000001.pth")
leave(whole - 1)
checkpointer = make_checkpointer(directory, model=model, keep=1)
checkpointer.resume_or_load("", resume=True)
checkpointer.save("model_0000002", iteration=1)
assert read(directory) == 1
assert [path.name for path in directory.glob("*.pth")] == ["model_0000002.pth"]
"""


def test_a_full_disk(tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("a file system of the test's own needs unshare (util-linux)")
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs"]
    probe = subprocess.run([*command, "tmpfs", tmp_path], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine allows no file system of the test's own: {probe.stderr}")
    run_script(COMMON + FULL_DISK + TMPFS, cwd=tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    checkpointer = make_checkpointer(tmp_path / "absent")
    with pytest.raises(CheckpointError) as error:
        checkpointer.save("model_0000000")
    assert sentence(error.value) == (
        f"{tmp_path}/absent/model_0000000.pth could not be written: No such file or directory. "
        "There is no earlier checkpoint. Mend that, and start again"
    )


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


def test_the_newest_checkpoints_are_kept_across_a_resume(tmp_path):
    others = {"model_best.pth", "model_0000001_copy.pth", "other_0000001.pth", "model_final.pth"}
    for name in others | {"model_0000099.pth"}:  # the last one is of a later iteration
        (tmp_path / name).touch()

    def train(start, stop):
        checkpointer = make_checkpointer(tmp_path, keep=2)
        checkpointer.resume_or_load("", resume=True)
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


class MemoryHandler(PathHandler):
    """``memory://`` is a directory."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self):
        return ["memory://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._local(path), mode)

    def _ls(self, path, **kwargs):
        return [p.name for p in self._local(path).iterdir()]

    def _rm(self, path, **kwargs):
        self._local(path).unlink()

    def _local(self, path):
        return self.root / path.removeprefix("memory://run").lstrip("/")


def test_a_directory_of_a_path_handler(tmp_path):
    checkpointer = make_checkpointer("memory://run", keep=1)
    checkpointer.path_manager = type(checkpointer.path_manager)()
    checkpointer.path_manager.register_handler(MemoryHandler(tmp_path))
    for name in ("model_0000000", "model_0000001", "model_final"):
        checkpointer.save(name)
    assert names(tmp_path) == {"model_0000001.pth", "model_final.pth", "last_checkpoint"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(tmp_path / "model_final.pth")["origin"]["input_format"] == "BGR"


def as_yaml(cfg):
    """What YAML can hold of a config: tuples in tuples become lists."""
    return yaml.safe_load(cfg.dump())


def test_final_weights_as_safetensors(tmp_path):
    cfg = config(R18, "SOLVER.CHECKPOINT_KEEP", 3, "SOLVER.ACCUMULATE_STEPS", "auto")
    guards = WeightGuards.from_config(cfg)
    checkpointer = Checkpointer(
        build_model(cfg), str(tmp_path), guards=guards, config=cfg.dump(), keep=3
    )
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
    fresh = load_config()
    assert as_yaml(fresh) != as_yaml(cfg)
    fresh.merge_from_other_cfg(CfgNode.load_cfg(metadata["gn_detect.config"]))
    assert as_yaml(fresh) == as_yaml(cfg)


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
    checkpointer.save_safetensors()
    assert not names(tmp_path)
