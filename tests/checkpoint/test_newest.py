"""Which checkpoint a run goes on from, whatever has become of the others."""

import logging
import os
import shutil
import zipfile

import pytest
import torch
from helpers import config

from gn_detect.checkpoint import Checkpointer, CheckpointError, WeightGuards, newest
from gn_detect.checkpoint.newest import describe_last, newest_checkpoint
from gn_detect.checkpoint.safe_load import load_file

GUARDS = WeightGuards.from_config(config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"))


def make_checkpointer(directory, **kwargs):
    model = torch.nn.Linear(300, 20)
    torch.nn.init.constant_(model.weight, 7.0)
    return Checkpointer(model, str(directory), guards=GUARDS, **kwargs)


@pytest.fixture
def run(tmp_path):
    """The directory of a run that saved at iterations 1, 3 and 5, a minute each."""
    checkpointer = make_checkpointer(tmp_path)
    for iteration in (1, 3, 5):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        date(tmp_path / f"model_{iteration:07d}.pth", iteration)
        date(tmp_path / "last_checkpoint", iteration)
    return tmp_path


def date(path, minute):
    os.utime(path, (1e9 + 60 * minute, 1e9 + 60 * minute))


def tag(directory, name, minute=9):
    """As the user does, to go back."""
    (directory / "last_checkpoint").write_text(name)
    date(directory / "last_checkpoint", minute)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    """One byte amid the data of a tensor, which no reader of torch notices."""
    content = bytearray(path.read_bytes())
    at = content.index(bytes(torch.full((900,), 7.0).numpy())) + 1800
    content[at] ^= 1
    path.write_bytes(content)
    assert not (torch.load(path)["model"]["weight"] == 7).all()


def remove(path):
    path.unlink()


def make_directory(path):
    path.unlink()
    path.mkdir()


def write_text(path):
    path.write_text("<html>404")


DAMAGE = {
    truncate: "is damaged (",
    empty: "is not a file of weights: it is empty",
    overwrite: "is damaged (in archive/data/",
    remove: "'model_0000005.pth' (named by last_checkpoint) does not exist",
    make_directory: "is a folder or a device",
    write_text: "is not a file of weights: it is a web page",
}


def resumed(directory) -> int:
    return make_checkpointer(directory).resume_or_load("", resume=True).get("iteration", -1)


@pytest.fixture
def warned(caplog):
    """The warnings since it was called before."""

    def since():
        records = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
        caplog.clear()
        return [message for message in records if "does not say with which" not in message]

    return since


def test_the_one_that_is_named(run, warned):
    assert newest_checkpoint(str(run)) == str(run / "model_0000005.pth")
    assert resumed(run) == 5 and not warned()


def test_no_checkpoint(tmp_path, warned):
    for directory in (tmp_path / "absent", tmp_path):
        assert newest_checkpoint(str(directory)) == ""
        assert describe_last(str(directory)) == "there is no checkpoint yet"
        assert not make_checkpointer(directory).has_checkpoint()
    (tmp_path / "last_checkpoint").touch()
    (tmp_path / "model_best.pth").touch()  # of the user
    assert resumed(tmp_path) == -1 and newest_checkpoint("") == "" and not warned()


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_named_and_left_for_the_newest_intact_one(damage, run, warned):
    newest = run / "model_0000005.pth"
    shutil.copy(newest, run / "model_best.pth")
    damage(newest)
    damaged = newest.is_file() and newest.read_bytes()
    checkpointer = make_checkpointer(run)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    assert checkpointer.get_checkpoint_file() == str(run / "model_0000003.pth")
    assert newest_checkpoint(str(run)) == checkpointer.get_checkpoint_file()
    (warning,) = warned()  # though it was asked for three times
    assert warning.startswith(str(run)) and "model_0000005.pth" in warning
    assert DAMAGE[damage] in warning
    assert warning.endswith(". model_0000003.pth (iteration 3) is intact and used")

    checkpointer.save("model_0000007", iteration=7)  # mends it
    assert checkpointer.get_checkpoint_file() == str(run / "model_0000007.pth")
    assert damaged == (newest.is_file() and newest.read_bytes())
    assert resumed(run) == 7 and not warned()


def test_two_damaged_ones(run, warned):
    truncate(run / "model_0000005.pth")
    overwrite(run / "model_0000003.pth")
    assert resumed(run) == 1
    (warning,) = warned()
    assert "model_0000005.pth is damaged (" in warning
    assert "model_0000003.pth is damaged (in archive/data/" in warning


def test_none_that_is_intact(run, warned):
    for iteration, damage in ((1, truncate), (3, overwrite), (5, remove)):
        damage(run / f"model_000000{iteration}.pth")
    with pytest.raises(CheckpointError) as error:
        resumed(run)
    for name in ("model_0000001.pth is dam", "model_0000003.pth is dam", "model_0000005.pth' (nam"):
        assert name in str(error.value)
    assert str(error.value).startswith(f"no checkpoint in {run} is intact: ")
    assert "Put a copy there that is; or, to start at iteration 0, delete" in str(error.value)
    assert not warned()


def test_a_name_alone(tmp_path):
    """A run was here: it would not be continued by starting at iteration 0."""
    tag(tmp_path, "model_0000009.pth")
    with pytest.raises(CheckpointError, match="'model_0000009.pth' .named by last_check"):
        resumed(tmp_path)
    assert describe_last(str(tmp_path)) == "there is no checkpoint yet"


@pytest.mark.parametrize(
    "content", [None, b"", b" \n", b"\x00\xff\xfe" * 999, b"x" * 9999, b"../run"]
)
def test_without_a_name_it_is_the_greatest_iteration(content, run, warned):
    if content is None:
        (run / "last_checkpoint").unlink()
    else:
        (run / "last_checkpoint").write_bytes(content)
    shutil.copy(run / "model_0000005.pth", run / "model_0000009.pth")  # the file tells, no name
    date(run / "model_0000009.pth", 0)
    shutil.copy(run / "model_0000003.pth", run / "model_final.pth")
    assert newest_checkpoint(str(run)) == str(run / "model_0000005.pth")
    (warning,) = warned()
    assert "last_checkpoint" in warning and "model_0000005.pth (iteration 5) is" in warning
    assert len(warning) < 400


@pytest.mark.parametrize("name", ["model_0000007", "model_final", "model_latest"])
def test_a_run_that_was_killed_before_it_could_name_its_checkpoint(name, run, warned):
    pointer = (run / "last_checkpoint").read_text()
    make_checkpointer(run).save(name, iteration=6)
    tag(run, pointer, minute=5)
    date(run / f"{name}.pth", 6)
    assert resumed(run) == 6
    (warning,) = warned()
    assert "last_checkpoint names model_0000005.pth, but a later one was saved after" in warning
    truncate(run / f"{name}.pth")
    date(run / f"{name}.pth", 6)
    assert resumed(run) == 5
    (warning,) = warned()
    assert f"{name}.pth is damaged" in warning and "model_0000005.pth (iteration 5) is" in warning


def test_the_first_save_of_a_run_that_was_killed(tmp_path):
    make_checkpointer(tmp_path).save("model_0000000", iteration=0)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == 0


def test_the_user_goes_back(run, warned):
    tag(run, "model_0000003.pth")
    assert resumed(run) == 3 and not warned()
    # Of what is written after that, later iterations alone count.
    make_checkpointer(run).save("model_0000002", iteration=2)
    tag(run, "model_0000003.pth")
    date(run / "model_0000002.pth", 10)
    assert resumed(run) == 3 and not warned()
    overwrite(run / "model_0000003.pth")
    date(run / "model_0000003.pth", 3)
    assert resumed(run) == 5


def test_a_file_of_another_name_counts_where_it_is_named(run, warned):
    make_checkpointer(run).save("model_best", iteration=4)
    assert resumed(run) == 4 and not warned()
    date(run / "model_best.pth", 9)
    tag(run, "model_0000003.pth", minute=5)
    assert resumed(run) == 3


def test_a_file_of_old_and_one_without_iteration(run, warned):
    content = torch.load(run / "model_0000005.pth")
    path = run / "model_0000005.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    date(path, 5)
    assert not zipfile.is_zipfile(path) and resumed(run) == 5 and not warned()
    truncate(path)
    torch.save({"model": content["model"]}, run / "model_final.pth")
    date(run / "model_final.pth", 4)
    assert resumed(run) == 3 and "model_0000005.pth" in warned()[0]


def test_what_it_costs(run, monkeypatch):
    """Those that are not needed are not looked at, and of no file are data read to know its
    iteration."""
    read, devices = [], []
    monkeypatch.setattr(
        newest, "load_file", lambda path, device: devices.append(device) or load_file(path, device)
    )
    testzip = zipfile.ZipFile.testzip
    monkeypatch.setattr(
        zipfile.ZipFile, "testzip", lambda file: read.append(file.filename) or testzip(file)
    )
    (run / "model_0000003.pth").write_text("not needed")
    date(run / "model_0000003.pth", 3)
    checkpointer = make_checkpointer(run)
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.has_checkpoint() and newest_checkpoint(str(run))
    assert read == [str(run / "model_0000005.pth")]
    checkpointer.save("model_0000007", iteration=7)
    assert checkpointer.get_checkpoint_file() == str(run / "model_0000007.pth")
    describe_last(str(run))
    assert len(read) == 1 and devices == ["meta", "meta"]
    assert load_file(run / "model_0000007.pth", "meta")["model"]["weight"].device.type == "meta"


def test_half_a_sentence(run):
    last = f"the last checkpoint {run}/model_000000"
    assert describe_last(str(run)) == f"{last}5.pth (iteration 5) is intact"
    truncate(run / "model_0000005.pth")
    assert describe_last(str(run)) == f"{last}3.pth (iteration 3) is intact"
    assert describe_last("unknown://run") == "there is no checkpoint yet"


def test_evaluation_takes_the_same(run, warned):
    truncate(run / "model_0000005.pth")
    checkpointer = make_checkpointer(run, evaluation=True)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    assert len(warned()) == 1


def test_a_damaged_final_checkpoint_has_no_safetensors(run):
    checkpointer = make_checkpointer(run)
    checkpointer.save("model_final", iteration=6)
    (run / "model_final.safetensors").unlink()
    overwrite(run / "model_final.pth")
    checkpointer = make_checkpointer(run)
    checkpointer.resume_or_load("", resume=True)
    checkpointer.save_safetensors()
    assert not (run / "model_final.safetensors").exists()
