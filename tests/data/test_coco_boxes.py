"""Boxes in other formats than COCO's are recognized, with and without the help of masks."""

import numpy as np
import pytest
from PIL import Image

from gn_detect.data.coco import DataError, check_coco_json

WIDTH, HEIGHT = 96, 64


def octagon(x, y, w, h):
    xs, ys = (0.3, 0.7, 1, 1, 0.7, 0.3, 0, 0), (0, 0, 0.3, 0.7, 1, 1, 0.7, 0.3)
    return [v for i, j in zip(xs, ys, strict=True) for v in (x + w * i, y + h * j)]


@pytest.fixture
def objects(coco_files):
    """20 objects all over an image of other width than height."""
    rng = np.random.default_rng(0)
    Image.new("RGB", (WIDTH, HEIGHT)).save(coco_files.image_root / "1.png")
    coco_files.content["images"] = [
        {"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}
    ]
    coco_files.content["categories"] = [{"id": 3, "name": "dog"}]
    coco_files.content["annotations"] = annotations = []
    for i in range(20):
        w, h = rng.uniform(8, 30, 2)
        x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
        mask = [octagon(x, y, w, h)]
        annotations.append(
            {
                **{"id": i + 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "area": w * h},
                **{"bbox": [x, y, w, h], "segmentation": mask},
            }
        )
    return coco_files


def check(files, masks=True, **kwargs):
    files.write()
    arguments = {"masks": masks, "training": True, "evaluation": False, **kwargs}
    return check_coco_json(str(files.json_file), str(files.image_root), **arguments)


def scaled(box):
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


FORMATS = {
    "x1, y1, x2, y2": lambda x, y, w, h: [x, y, x + w, y + h],
    "centre x, centre y, width, height": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "y, x, height, width": lambda x, y, w, h: [y, x, h, w],
    "y1, x1, y2, x2": lambda x, y, w, h: [y, x, y + h, x + w],
    "x, y, width, height": lambda *box: list(box),
}
DIVIDED = ", divided by the size of the image"


@pytest.mark.parametrize("name", [*FORMATS, *(f"{name}{DIVIDED}" for name in FORMATS)])
def test_the_format_is_named(objects, name):
    convert = FORMATS[name.removesuffix(DIVIDED)]
    for annotation in objects.content["annotations"]:
        box = annotation["bbox"]
        annotation["bbox"] = convert(*(scaled(box) if name.endswith(DIVIDED) else box))
    if name in FORMATS and name.startswith("x, y"):
        assert not check(objects).warnings
        return
    with pytest.raises(DataError) as error:
        check(objects)
    assert f"these seem to be {name}: convert them" in str(error.value)
    assert "the first: annotation " in str(error.value) and "on 96 x 64 pixels" in str(error.value)
    assert check(objects, box_format=False).warnings  # passes, and says it
    if "y" in name[:2] and not name.endswith(DIVIDED):
        return  # without masks, they may be boxes as they should be
    for annotation in objects.content["annotations"]:
        annotation["segmentation"] = []
    with pytest.raises(DataError, match="reach beyond their image"):
        check(objects, masks=False)


@pytest.mark.parametrize("name, axes, size", [("have x and y exchanged", -1, 1), ("", 1, 64)])
def test_the_format_of_polygons_is_named(objects, name, axes, size):
    for annotation in objects.content["annotations"]:
        points = np.reshape(annotation["segmentation"][0], (-1, 2))[:, ::axes] / size
        annotation["segmentation"] = [points.ravel().tolist()]
    with pytest.raises(DataError, match=name or r"COCO boxes are x, y, width, height in pixels \("):
        check(objects)
    assert not any("boxes" in text for text in check(objects, masks=False).warnings)


def test_single_boxes_are_warned_of(objects):
    first, second, *_ = objects.content["annotations"]
    first["bbox"], second["bbox"] = [70, 40, 90, 90], [-1, 10, 30, 30]
    first["segmentation"], second["segmentation"] = (
        [octagon(70, 40, 26, 24)],
        [octagon(0, 10, 29, 30)],
    )
    boxes, beyond = check(objects).warnings
    assert boxes.startswith("the boxes of 1 of 20 objects reach beyond their image or disagree")
    assert "annotation 1 (image 1.png) with the bbox [70, 40, 90, 90]" in boxes
    assert beyond == "boxes that reach beyond their image are clipped in training (1, by 1 pixels)"


def test_boxes_that_hold_their_masks_are_warned_of(objects):
    """Drawn loosely, or around hidden parts (amodal): no format explains them."""
    for annotation in objects.content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [octagon(x, y, w, 0.3 * h)]
    assert check(objects).warnings[0].startswith("the boxes of 20 of 20 objects")
    objects.content["annotations"][3:] = []
    for i, annotation in enumerate(objects.content["annotations"]):
        annotation["bbox"], annotation["segmentation"] = [5, 5 + i, 9, 9], [octagon(40, 40, 9, 9)]
    with pytest.raises(DataError, match="3 of 3 objects"):
        check(objects)
    for annotation in objects.content["annotations"][1:]:
        annotation["segmentation"] = [octagon(*annotation["bbox"])]
    assert check(objects).warnings[0].startswith("the boxes of 1 of 3 objects")
