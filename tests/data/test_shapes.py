import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from gn_detect.data.coco import DataError
from gn_detect.data.shapes import CLASSES, draw_image, write_shapes

SMALL = {"num_train": 12, "num_val": 5, "image_size": 64}


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_deterministic_for_a_seed_and_written_once(tmp_path):
    first = contents(write_shapes(tmp_path / "a", **SMALL))
    assert len(first) == 2 + 12 + 5
    assert contents(write_shapes(tmp_path / "b", **SMALL)) == first
    other = contents(write_shapes(tmp_path / "c", **SMALL, seed=1))
    assert other.keys() == first.keys() and other != first
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    write_shapes(tmp_path / "a", **SMALL)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_coco_format(tmp_path):
    root = write_shapes(tmp_path / "shapes", num_train=80, num_val=5, image_size=64)
    coco = COCO(str(root / "train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(CLASSES) >= 3
    areas = {category: [] for category in coco.getCatIds()}
    for image in coco.loadImgs(coco.getImgIds()):
        assert Image.open(root / "train" / image["file_name"]).size == (64, 64)
        visible = np.zeros((64, 64), dtype=int)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = coco.annToMask(annotation)
            visible += mask
            areas[annotation["category_id"]].append(annotation["area"])
            assert mask.sum() == annotation["area"] > 0
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == box
        assert visible.max() <= 1  # masks of what is visible do not overlap
    assert all(len(a) > 10 and max(a) > 3 * min(a) for a in areas.values())
    empty = [i for i in coco.getImgIds() if not coco.getAnnIds(i)]
    assert 0 < len(empty) < 40


def test_mixed_orientations(tmp_path):
    root = write_shapes(tmp_path / "shapes", **SMALL, mixed=True)
    coco = COCO(str(root / "train.json"))
    shapes = [Image.open(root / "train" / i["file_name"]).size for i in coco.loadImgs(range(1, 13))]
    assert shapes == [(64, 48), (48, 64)] * 6  # width, height
    assert shapes == [(i["width"], i["height"]) for i in coco.loadImgs(range(1, 13))]
    for image in coco.loadImgs(coco.getImgIds()):
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            assert coco.annToMask(annotation).shape == (image["height"], image["width"])
    with pytest.raises(DataError, match="holds something else than shapes"):
        write_shapes(root, **SMALL)


def test_masks_lie_on_the_objects():
    """Across the edge of a mask the colour changes more than inside it."""
    inside, across = [], []
    for seed in range(20):
        image, objects = draw_image(np.random.default_rng(seed), 96)
        pixels = np.asarray(image, dtype=float)
        step = np.abs(np.diff(pixels, axis=1)).sum(2)
        for _, mask in objects:
            edge = np.diff(mask.astype(int), axis=1) != 0
            interior = (mask[:, 1:] & mask[:, :-1]).astype(bool)
            across.append(step[edge].mean())
            inside.append(step[interior].mean())
    assert np.mean(across) > 3 * np.mean(inside)


def test_objects_occlude_each_other():
    whole = [draw_image(np.random.default_rng(s), 96)[1] for s in range(60)]
    touching = 0
    for objects in whole:
        for i, (_, a) in enumerate(objects):
            for _, b in objects[i + 1 :]:
                grown = np.pad(a, 1)
                near = grown[2:, 1:-1] | grown[:-2, 1:-1] | grown[1:-1, 2:] | grown[1:-1, :-2]
                touching += bool((near & b).sum() > 5)
    assert touching > 5


def test_other_arguments_are_refused(tmp_path):
    root = write_shapes(tmp_path / "shapes", **SMALL)
    with pytest.raises(ValueError, match="shapes exists and holds something else.*delete it"):
        write_shapes(root, **{**SMALL, "image_size": 96})
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="mine exists and holds something else"):
        write_shapes(tmp_path / "mine", **SMALL)
    with pytest.raises(ValueError, match="images of 32 pixels"):
        write_shapes(tmp_path / "small", num_train=1, num_val=1, image_size=8)


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shapes(tmp_path / "shapes", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_is_faster(tmp_path, monkeypatch):
    rename = Path.rename

    def rename_late(self, target):
        monkeypatch.undo()
        write_shapes(target, **SMALL)  # the other process
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    root = write_shapes(tmp_path / "shapes", **SMALL)
    assert list(tmp_path.iterdir()) == [root]
    assert contents(root) == contents(write_shapes(tmp_path / "again", **SMALL))
