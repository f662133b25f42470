"""Tiles against the whole image, with a detector that sees all that is in its pixels, and no more:
objects are of one color each, the red of which is the class."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util
from supervision.detection.compact_mask import CompactMask

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.predict import Predictor
from gn_detect.predict.joining import compact_mask
from gn_detect.predict.outputs import to_results
from gn_detect.predict.statistics import fixed_statistics, recorded_statistics
from gn_detect.predict.tiles import Masks, TiledPredictor, starts

SIZE = (260, 330)


def detect(pixels, masks=True, keypoints=False):
    """The score of an object grows with its area."""
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    colors = [color for color in np.unique(codes) if color]
    found = [codes == color for color in colors]
    rows = [np.flatnonzero(mask.any(axis=1)) for mask in found]
    columns = [np.flatnonzero(mask.any(axis=0)) for mask in found]
    boxes = [[x[0], y[0], x[-1] + 1, y[-1] + 1] for x, y in zip(columns, rows, strict=True)]
    result = Instances(pixels.shape[:2])
    result.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
    result.scores = torch.tensor([mask.mean() for mask in found]).float().sqrt()
    result.pred_classes = torch.tensor([int(color >> 16) for color in colors]).long()
    if masks:
        result.pred_masks = torch.from_numpy(np.array(found).reshape(-1, *pixels.shape[:2]))
    if keypoints:  # the corners of the box; that which is seen the most has the higher score
        scores = result.scores[:, None].expand(-1, 2)
        corners = result.pred_boxes.tensor.reshape(-1, 2, 2)
        result.pred_keypoints = torch.cat([corners, scores[..., None]], dim=2)
    return result


def picture(seed, size=SIZE, count=80, largest=70):
    """Ellipses and rectangles, of a tenth to all of ``largest``, that may touch."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size[::-1])
    for i in range(count):
        w, h = rng.integers(largest // 10 + 3, largest, 2)
        x, y = rng.integers(-w // 2, size[1]), rng.integers(-h // 2, size[0])
        if np.any(image.crop((x, y, x + w + 1, y + h + 1))):
            continue  # what is covered in the middle would be two objects
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if i % 2 else draw.rectangle
        shape((int(x), int(y), int(x + w), int(y + h)), fill=(1 + i % 3, i, 255))
    return np.array(image)


def assert_same(found, expected):
    """Each detection, whatever the score and the order; masks and boxes to the pixel."""

    def key(instances):
        boxes = instances.pred_boxes.tensor.long().tolist()
        return sorted(range(len(boxes)), key=lambda i: (instances.pred_classes[i], boxes[i]))

    assert len(found) == len(expected) and found.image_size == expected.image_size
    found, expected = (instances[key(instances)] for instances in (found, expected))
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    if expected.has("pred_masks"):
        assert torch.equal(torch.stack(list(found.pred_masks)), expected.pred_masks)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("size", "overlap"), [(128, 0.3), (100, 0.5), (170, 0.2), (260, 0.25)])
def test_equal_to_the_untiled_result(size, overlap, masks):
    for seed in range(4):
        # Smaller than the overlap, so that each is whole somewhere.
        pixels = picture(seed, largest=int(size * overlap) - 4)
        found = TiledPredictor(lambda tile: detect(tile, masks), size, overlap)(pixels)
        assert_same(found, detect(pixels, masks))
        assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_objects_larger_than_the_overlap_are_joined():
    pixels = np.zeros((300, 420, 3), np.uint8)
    pixels[10:290, 15:45] = 1, 1, 0  # through all rows of tiles
    pixels[40:70, 60:400] = 1, 2, 0  # through all columns
    pixels[90:290, 70:400] = 2, 3, 0  # in the middle tiles all that there is
    pixels[120:150, 100:130] = 2, 4, 0  # in the one before, and of its class
    pixels[200:240, 300:340] = 1, 5, 0
    pixels[75:85, 60:400] = 1, 6, 0  # beside one of its class
    pixels[160:170, 60:65] = 3, 7, 0
    for size, overlap in ((120, 0.25), (100, 0.3), (150, 0.2)):
        assert_same(TiledPredictor(detect, size, overlap)(pixels), detect(pixels))


def test_both_of_two_tiles_may_show_the_same_part():
    pixels = np.zeros((200, 180, 3), np.uint8)
    pixels[30:190, 75:95] = 1, 1, 0  # where the tiles of each row overlap, through both rows
    assert_same(TiledPredictor(detect, 110, 0.3)(pixels), detect(pixels))


def test_the_class_and_score_are_those_of_the_whole():
    """A part looks like something else, and surely so."""

    def wrong(tile):
        found = detect(tile)
        part = found.pred_boxes.area() < 1200
        found.pred_classes[part], found.scores[part] = 9, 0.99
        return found

    pixels = np.zeros((100, 180, 3), np.uint8)
    pixels[30:60, 75:115] = 1, 1, 0  # whole in the second tile, from 70 on
    found = TiledPredictor(wrong, 110, 0.3)(pixels)
    assert found.pred_classes.tolist() == [1] and found.scores.item() < 0.5


def test_without_overlap_parts_are_left_as_they_are():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[30:60, 80:120] = 1, 1, 0
    found = TiledPredictor(detect, 100, 0)(pixels)
    boxes = sorted(found.pred_boxes.tensor.tolist())
    assert boxes == [[80, 30, 100, 60], [100, 30, 120, 60]]


def test_keypoints_are_taken_from_where_they_are_seen_best():
    pixels = np.zeros((100, 180, 3), np.uint8)
    pixels[30:60, 10:50] = 1, 1, 0
    pixels[70:90, 20:170] = 1, 2, 0  # 90 pixels of it in the first tile, 100 in the second
    tiled = TiledPredictor(lambda tile: detect(tile, masks=False, keypoints=True), 110, 0.3)
    found = tiled(pixels)
    assert found.pred_keypoints[..., :2].tolist() == [[[70, 70], [170, 90]], [[10, 30], [50, 60]]]


@pytest.mark.parametrize("size", [330, 1000])
def test_an_image_of_one_tile_is_predicted_as_it_is(size):
    pixels, seen = picture(0), []

    def predict(tile):
        seen.append(tile)
        return detect(tile)

    found = TiledPredictor(predict, size, 0.2)(pixels)
    assert len(seen) == 1 and seen[0] is pixels
    assert isinstance(found.pred_masks, torch.Tensor)  # the very result


def test_nothing_found():
    pixels = np.zeros((*SIZE, 3), np.uint8)
    for masks in (True, False):
        found = TiledPredictor(lambda tile, m=masks: detect(tile, m), 100)(pixels)
        assert len(found) == 0 and found.image_size == SIZE and found.has("pred_masks") == masks
        assert found.pred_boxes.tensor.shape == (0, 4)


def test_tiles_cover_the_image_evenly():
    assert starts(100, 100, 80) == starts(99, 100, 80) == [0]
    assert starts(101, 100, 80) == [0, 1]
    assert starts(260, 100, 80) == [0, 80, 160]
    assert starts(261, 100, 80) == [0, 80, 160, 161]


def test_a_list_of_images():
    images = [picture(seed) for seed in range(2)]
    found = TiledPredictor(detect, 200, 0.4)(images)
    assert [len(f) for f in found] == [len(detect(image)) for image in images]


def test_large_images_need_no_memory_for_all_masks():
    pixels = np.zeros((1800, 1500, 3), np.uint8)
    for i in range(200):
        y, x = divmod(i, 14)
        pixels[y * 120 + 40 : y * 120 + 90, x * 105 + 30 : x * 105 + 80] = 1, 1 + i, 200
    found = TiledPredictor(detect, 512, 0.2)(pixels)
    assert len(found) == 200
    assert len(pickle.dumps(found.pred_masks.compact)) < 300_000  # as a tensor 540 MB
    one = found.pred_masks[-1]
    assert one.shape == (1800, 1500) and one.sum() == 2500 and one.T.is_contiguous()


def test_results_of_coco_are_those_of_whole_masks():
    pixels = picture(2, count=300)  # up to all sides
    found = TiledPredictor(detect, 128, 0.6)(pixels)
    assert to_results(found) == instances_to_coco_json(found, 0)
    covered = torch.stack(list(found.pred_masks)).any(dim=0)
    assert covered[0].any() and covered[-1].any() and covered[:, 0].any() and covered[:, -1].any()
    masks = np.zeros((3, 40, 50), bool)
    masks[1], masks[2, :, 40:] = True, True
    masks = Masks(CompactMask.merge([compact_mask(mask, (0, 0), (40, 50)) for mask in masks]))
    whole = [mask_util.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in masks]
    assert masks.rles() == [{**rle, "counts": rle["counts"].decode()} for rle in whole]


def test_masks_are_indexed_as_instances_index_tensors():
    found = TiledPredictor(detect, 128, 0.4)(picture(1))
    dense = torch.stack(list(found.pred_masks))
    for index in (found.scores > 0.2, torch.tensor([2, 0]), slice(1, 3)):
        part = found[index].pred_masks
        assert isinstance(part, Masks)
        assert torch.equal(torch.stack(list(part)), dense[index])
    assert found.to("cpu").pred_masks[0].dtype == torch.bool
    with pytest.raises(IndexError):
        found.pred_masks[len(found)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "--tiles is 0; it must be"),
        ({"size": -5}, "--tiles is -5"),
        ({"size": 10.5}, "--tiles is 10.5"),
        ({"overlap": 1}, "--overlap is 1 of tiles of 1024 pixels"),
        ({"overlap": -0.1}, "--overlap is -0.1"),
        ({"size": 4, "overlap": 0.9}, "--overlap is 0.9 of tiles of 4 pixels"),
        ({"overlap": float("nan")}, "--overlap is nan"),
        ({"statistics": "both"}, "--statistics is 'both'; known: tile, image"),
        ({"statistics": "image"}, "--statistics is 'image', but the predictor is no PyTorch"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TiledPredictor(detect, **arguments)


@pytest.fixture(scope="module")
def tiny(weights):
    return Predictor(weights, device="cpu")


def test_a_model_by_both_kinds_of_statistics(tiny):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    maps = []
    handle = tiny.model.backbone.register_forward_hook(lambda *call: maps.append(call[2]["p3"]))
    tiny(pixels[:, 64:])
    (alone,) = maps
    tiled = TiledPredictor(tiny, 64, 0, "tile")
    assert len(tiled(pixels)) > 3 and tiled.class_names == tiny.class_names  # and all else
    assert len(maps) == 3 and torch.equal(maps[2], alone)
    with recorded_statistics(tiny.model) as statistics:
        tiny(pixels)
    with fixed_statistics(statistics):
        tiny(pixels[:, 64:])
    assert not torch.allclose(maps[4], alone, atol=0.1)
    TiledPredictor(tiny, 64, 0, "image")(pixels)
    handle.remove()
    assert len(maps) == 8 and torch.equal(maps[7], maps[4])


def test_may_be_larger_than_an_image_that_is_not_tiled(tiny, tmp_path):
    (tmp_path / "map.pbm").write_text("P4 15000 12000\n")  # without its pixels
    with pytest.raises(DataError, match="--tiles"):
        tiny.read(tmp_path / "map.pbm")
    with pytest.raises(DataError, match="cannot use the image"):
        TiledPredictor(tiny)(tmp_path / "map.pbm")


def test_augmented(weights):
    sizes = ["TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", "96"]
    augmented = Predictor(weights, device="cpu", opts=["TEST.AUG.ENABLED", "True", *sizes])
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    reference = GeneralizedRCNNWithTTA(augmented.cfg, augmented.model).eval()
    resized = augmented._input(pixels)["image"]
    with torch.no_grad():
        (expected,) = reference([{"image": resized, "height": 64, "width": 128}])
    found, expected = augmented(pixels), expected["instances"]
    assert len(found) > 3 and torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_masks, expected.pred_masks)
    assert len(TiledPredictor(augmented, 64, 0.4)(pixels)) > 3
    with pytest.raises(ConfigError, match="'image' and TEST.AUG.ENABLED True"):
        TiledPredictor(augmented, 64, 0.4, "image")
