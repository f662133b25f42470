"""Two machines that share no folder, before a run."""

import functools
import json
import logging
import os
import shutil
from unittest import mock

import pytest
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from engine.pair import two_machines
from helpers import SQUARE_RLE, TINY, CocoFiles, coco_json

from gn_detect import get_config_file
from gn_detect.config import ConfigError, load_config
from gn_detect.data import coco
from gn_detect.data.coco import DataError, load_coco, register_coco_json
from gn_detect.data.splits import split_coco
from gn_detect.distributed import on_each_machine
from gn_detect.engine import prepare_run
from gn_detect.engine.prepare import start_log
from gn_detect.evaluation import check_evaluator


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with two_machines(tmp_path_factory.mktemp("meeting")) as run:
        yield run


@pytest.fixture
def files(tmp_path):
    """The same data on both machines; another one on one of them after ``write``."""
    return [CocoFiles(tmp_path / f"{rank}/data") for rank in range(2)]


def prepare(rank, directory, opts=(), names=("own", "own"), **arguments):
    """Return what follows for the run, and what is said on this machine."""
    here = directory / str(rank)
    register_coco_json(names[rank], str(here / "data/annotations.json"), str(here / "data/images"))
    if (here / "source").exists():
        copy = functools.partial(shutil.copytree, here / "source", here / "data")
        MetadataCatalog.get(names[rank]).set(generate=lambda: copy(dirs_exist_ok=True))
    data = ("DATASETS.TRAIN", (names[rank],), "DATASETS.TEST", ())
    output = ("OUTPUT_DIR", str(here / "output"))
    config_file = get_config_file("quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml")
    cfg = load_config(config_file, [*TINY, *data, *output, *opts])
    said, handler, logger = [], logging.Handler(), logging.getLogger("gn_detect")
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        prepare_run(cfg, **arguments)
    finally:
        logger.removeHandler(handler)
    return cfg, said


def refused(outcomes, kind):
    """The one sentence of both processes."""
    assert [type(outcome) for outcome in outcomes] == [kind, kind]
    first, second = map(str, outcomes)
    assert first == second
    return first


def test_what_follows_from_the_data_is_the_same(run, files, tmp_path):
    for data in files:
        data.content["annotations"][0]["segmentation"] = SQUARE_RLE
        data.write()
    (first, said), (second, other) = run(prepare, tmp_path, ("SOLVER.IMS_PER_GPU", 1))
    assert first.SOLVER.IMS_PER_BATCH == 2  # processes
    assert (first.MODEL.ROI_HEADS.NUM_CLASSES, first.INPUT.MASK_FORMAT) == (2, "bitmask")
    first.OUTPUT_DIR = second.OUTPUT_DIR
    assert first == second
    assert any(text.startswith("data of own: ") for text in said)
    assert not any("data of own" in text for text in other)


def test_other_annotations(run, files, tmp_path):
    files[1].content["annotations"][0]["bbox"][0] += 1
    files[1].write()
    first, second = (data.json_file for data in files)
    assert first.stat().st_size >= second.stat().st_size
    assert refused(run(prepare, tmp_path), DataError) == (
        f"own: {second} on rank 1 (host b) is another file than {first} on rank 0 (host a), which "
        "counts; copy it from there"
    )


@pytest.mark.parametrize(
    "rank, lacks, has", [(0, "0 (host a)", "1 (host b)"), (1, "1 (host b)", "0 (host a)")]
)
def test_annotations_of_one_machine_alone(run, files, tmp_path, rank, lacks, has):
    files[rank].json_file.unlink()
    assert refused(run(prepare, tmp_path), DataError) == (
        f"own: there is no file {files[rank].json_file} on rank {lacks}, but on rank {has} there "
        "is; copy it from there"
    )


def test_annotations_that_cannot_be_read(run, files, tmp_path):
    files[1].json_file.unlink()
    files[1].json_file.mkdir()
    wanted = f"on rank 1 (host b): cannot read {files[1].json_file}: Is a directory"
    assert refused(run(prepare, tmp_path), DataError) == wanted
    files[0].json_file.unlink()
    files[0].json_file.mkdir()  # on both
    wanted = f"cannot read {files[0].json_file}: Is a directory"
    assert refused(run(prepare, tmp_path), DataError) == wanted


def test_annotations_that_neither_has(run, files, tmp_path):
    for data in files:
        data.json_file.unlink()
    text = refused(run(prepare, tmp_path), DataError)
    assert text == f"cannot read {files[0].json_file}: No such file or directory"


def test_other_datasets(run, files, tmp_path):
    text = refused(run(prepare, tmp_path, (), ("own", "other")), DataError)
    assert "datasets of rank 1 (host b) are other, those of rank 0 (host a) own; start the" in text


def test_what_the_first_machine_refuses(run, files, tmp_path):
    text = refused(run(prepare, tmp_path, ("MODEL.ROI_HEADS.NUM_CLASSES", 80)), ConfigError)
    assert "NUM_CLASSES is 80, but the dataset own declares 2" in text
    text = refused(run(prepare, tmp_path, ("MODEL.ROI_BOX_HEAD.FC_NORM", "IN")), ConfigError)
    assert "a single position" in text
    text = refused(run(prepare, tmp_path, ("INPUT.MIN_SIZE_TRAIN", ())), ConfigError)
    assert "INPUT.MIN_SIZE_TRAIN" in text


@pytest.mark.parametrize("rank, name", [(0, "rank 0 (host a)"), (1, "rank 1 (host b)")])
def test_an_image_that_one_machine_lacks(run, files, tmp_path, rank, name):
    (files[rank].image_root / "3.png").unlink()
    assert refused(run(prepare, tmp_path), DataError) == (
        f"on {name}: 1 of the 3 images listed in {files[rank].json_file} are not in "
        f"{files[rank].image_root}, the first: '3.png'"
    )


def test_the_output_of_the_first_machine_counts(run, files, tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}/output").mkdir()
    (tmp_path / "1/output/metrics.json").write_text("{}")
    assert all(isinstance(outcome, tuple) for outcome in run(prepare, tmp_path))
    (tmp_path / "0/output/metrics.json").write_text("{}")
    (tmp_path / "1/output/metrics.json").unlink()
    text = refused(run(prepare, tmp_path), ConfigError)
    assert f"holds a run already ({tmp_path}/0/output/metrics.json)" in text


def packed(rank, directory):
    os.environ["FVCORE_CACHE"] = str(directory / f"{rank}/cache")
    coco._LARGE = 0
    prepare(rank, directory)
    return os.listdir(directory / f"{rank}/cache/gn_detect/coco")


def test_each_machine_packs_its_data_once(run, files, tmp_path):
    assert [len(names) for names in run(packed, tmp_path)] == [1, 1]


def test_data_are_generated_on_each_machine(run, files, tmp_path):
    for data in files:
        data.image_root.parent.rename(data.image_root.parent.with_name("source"))
    (first, _), (second, _) = run(prepare, tmp_path)
    assert first.MODEL.ROI_HEADS.NUM_CLASSES == second.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert files[1].json_file.exists()


def read(path):
    with open(path) as f:
        return f.read()


def split(rank, directory, fraction, keep=False, output="{}/split"):
    """Return the paths, and the files of the images for validation."""
    source = str(directory / f"{rank}/data/annotations.json")
    target = str(directory / output.format(rank))
    paths = split_coco(source, target, fraction, keep=keep)
    return paths, [load_coco(path).file_names for path in paths]


@pytest.mark.parametrize("output", ["{}/split", "shared"])
def test_each_machine_has_the_same_split(run, files, tmp_path, output):
    for data in files:
        data.content = coco_json(20)
        data.write()
    (first, parts), (second, others) = run(split, tmp_path, 0.2, False, output)
    assert parts == others and [len(part) for part in parts] == [16, 4]
    assert [read(path) for path in first] == [read(path) for path in second]
    assert first[0] == str(tmp_path / output.format(0) / "train.json")
    # Of an earlier run, of another fraction
    times = [os.stat(path).st_mtime_ns for path in (*first, *second)]
    assert [found for _, found in run(split, tmp_path, 0.6, True, output)] == [parts, parts]
    assert times == [os.stat(path).st_mtime_ns for path in (*first, *second)]


def test_the_split_of_the_first_machine_counts(run, files, tmp_path):
    for data in files:
        data.content = coco_json(20)
        data.write()
    (first, parts), (second, _) = run(split, tmp_path, 0.2)
    kept = [read(path) for path in first]
    for change in (lambda: shutil.rmtree(tmp_path / "1/split"), lambda: shutil.copy(*second)):
        change()
        assert [found for _, found in run(split, tmp_path, 0.6, True)] == [parts, parts]
        assert [read(path) for path in second] == kept
    shutil.rmtree(tmp_path / "0/split")
    (_, parts), (_, others) = run(split, tmp_path, 0.6, True)
    assert parts == others and [len(part) for part in parts] == [8, 12]


def test_a_split_of_other_data(run, files, tmp_path):
    files[1].content["images"].reverse()
    files[1].write()
    text = refused(run(split, tmp_path, 0.4), DataError)
    assert f"--train-json: {files[1].json_file} on rank 1 (host b) is another file" in text


def test_a_split_that_cannot_be_written_on_one_machine(run, files, tmp_path):
    (tmp_path / "1/split").touch()
    text = refused(run(split, tmp_path, 0.4), DataError)
    assert text == f"on rank 1 (host b): cannot write {tmp_path}/1/split: File exists"


def cityscapes(rank):
    check_evaluator("cityscapes_fine_instance_seg_val")


def test_an_evaluation_of_one_machine(run):
    text = refused(run(cityscapes), ConfigError)
    assert "cityscapes_fine_instance_seg_val (cityscapes_instance) works on one machine" in text


def on_one_machine(rank, directory):
    with mock.patch.multiple(comm, get_local_rank=lambda: rank, get_local_size=lambda: 2):
        found = on_each_machine(lambda: rank)
        return found, split_coco(str(directory / "a.json"), str(directory / f"{rank}"), 0.2)


def test_of_two_processes_of_a_machine_one_works(run, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(coco_json(10)))
    outcomes = run(on_one_machine, tmp_path)
    assert [found for found, _ in outcomes] == [{"rank 0 (host a)": 0}] * 2
    assert sorted(os.listdir(tmp_path)) == ["0", "a.json"]
    (tmp_path / "a.json").unlink()
    text = refused(run(on_one_machine, tmp_path), DataError)
    assert text == f"cannot read {tmp_path}/a.json: No such file or directory"


def log(rank, directory):
    start_log(load_config("", ["OUTPUT_DIR", str(directory / f"{rank}/output")]))


def test_each_machine_logs_into_its_own_output(run, tmp_path):
    assert run(log, tmp_path) == [None, None]
    assert (tmp_path / "1/output/log.txt.rank1").exists()
