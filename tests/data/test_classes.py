from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from gn_detect.data.classes import CLASSES, draw_class, read_classes, write_classes
from gn_detect.data.coco import DataError

SMALL = {"num_train": 23, "num_val": 10, "image_size": 32}


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_deterministic_for_the_arguments_and_written_once(tmp_path):
    first = contents(write_classes(tmp_path / "a", **SMALL))
    assert len(first) == len(set(first.values())) == 23 + 10 + 1
    assert contents(write_classes(tmp_path / "b", **SMALL)) == first
    others = dict(radii=(0.3, 0.3), clutter=3, noise=3, seed=3)
    for name, value in others.items():
        other = contents(write_classes(tmp_path / name, **SMALL, **{name: value}))
        assert other.keys() == first.keys()
        assert len(set(first.values()) - set(other.values())) > 10
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    write_classes(tmp_path / "a", **SMALL)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_folder_of_each_class(tmp_path):
    root = str(tmp_path / "classes/train")
    images = read_classes(root, **SMALL)
    folder = ImageFolder(root)
    assert folder.classes == list(CLASSES) and len(CLASSES) == 10
    assert [(image["file_name"], image["label"]) for image in images] == folder.samples
    assert np.bincount([image["label"] for image in images]).tolist() == [3, 3, 3] + [2] * 7
    assert Image.open(images[0]["file_name"]).size == (32, 32)
    for image in images[::3]:
        file = Path(image["file_name"])
        rng = np.random.default_rng([0, 0, int(file.stem)])
        drawn = draw_class(rng, CLASSES[image["label"]], 32, (0.3, 0.4), 2, 4)
        error = np.asarray(drawn, dtype=float) - np.asarray(Image.open(file))
        assert np.abs(error).mean() < 8  # of JPEG


def test_other_arguments_are_refused(tmp_path):
    write_classes(tmp_path / "classes", **SMALL)
    with pytest.raises(DataError, match="classes exists and holds something else.*delete it"):
        read_classes(str(tmp_path / "classes/val"), **{**SMALL, "noise": 5})
    with pytest.raises(DataError, match="an image of each class"):
        write_classes(tmp_path / "few", num_train=9)


def test_classes_differ_by_the_shape():
    """Of the same random numbers: the background is the same, and what is drawn on it is not."""
    drawn = {
        name: np.asarray(
            draw_class(np.random.default_rng(7), name, 64, (0.3, 0.3), 0, 0), dtype=float
        )
        for name in CLASSES
    }
    for one in CLASSES:
        for other in CLASSES:
            differs = np.abs(drawn[one] - drawn[other]).sum(2) > 60
            assert (one == other) == (not differs.any()) and differs.mean() < 0.5


@pytest.mark.parametrize("name", CLASSES)
def test_the_shape_is_brighter_than_all_else(name):
    rng = np.random.default_rng(CLASSES.index(name))
    pixels = np.asarray(draw_class(rng, name, 64, (0.3, 0.4), 3, 0), dtype=float).mean(2)
    assert np.median(pixels) < 130 and np.quantile(pixels, 0.98) > 140
