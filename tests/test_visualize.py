"""Pictures are compared with blends computed here and with what is told to Pillow to write, curves
with hand-made logs."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import supervision as sv
from image_files import with_orientation
from PIL import Image, ImageDraw

from gn_detect import drawing, visualize
from gn_detect.data import DataError
from gn_detect.drawing import draw, from_coco
from gn_detect.visualize import draw_pairs, read_curves

WIDTH, HEIGHT, GRAY = 60, 50, 90
BOX = (5, 10, 20, 30)


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def rectangle(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def item(image_id, category_id, box, **more):
    ids = {"id": 1, "image_id": image_id, "category_id": category_id}
    return {**ids, "bbox": list(box), **more}


class Workspace:
    """A dataset of plain gray images, written where `draw` finds it."""

    def __init__(self, root, monkeypatch):
        self.root, self.results = root, []
        self.dataset = {"categories": [{"id": 20, "name": "cat"}, {"id": 19, "name": "dog"}]}
        self.set_images(1)
        self.sides = []  # what is drawn: (picture, texts, boxes), ground truth and predictions
        self.texts, self.boxes = [], []
        text, rectangle = ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.rectangle

        def record_text(pen, xy, words, *args, **kwargs):
            self.texts.append(words)
            text(pen, xy, words, *args, **kwargs)

        def record_box(pen, xy, fill=None, outline=None, **kwargs):
            if outline:
                self.boxes.append((xy, outline))
            rectangle(pen, xy, fill, outline, **kwargs)

        def record(*args):
            self.sides.append((draw(*args), self.texts[:], self.boxes[:]))
            self.texts.clear(), self.boxes.clear()
            return self.sides[-1][0]

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
        monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record_box)
        monkeypatch.setattr(visualize, "draw", record)

    def set_images(self, number):
        self.dataset["images"] = [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(1, number + 1)
        ]
        for image in self.dataset["images"]:
            Image.new("RGB", (WIDTH, HEIGHT), (GRAY,) * 3).save(self.root / image["file_name"])

    def write(self):
        for number, annotation in enumerate(self.dataset.get("annotations", [])):
            annotation["id"] = number
        for name in ("dataset", "results"):
            (self.root / f"{name}.json").write_text(json.dumps(getattr(self, name)))
        return [self.root / name for name in ("dataset.json", "", "results.json")]

    def draw(self, ids=(1,), **options):
        """Ground truth and predictions, in turn: picture, texts (after the first side, the title of
        the one before comes first), boxes."""
        self.sides.clear(), self.texts.clear()
        self.pairs = list(draw_pairs(*self.write(), ids, **options))
        return [*self.sides, (None, self.texts[:], [])]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    return Workspace(tmp_path, monkeypatch)


SCALE = visualize.SIDE / WIDTH


def color(number, count=2):
    return drawing._palettes(count)[0].by_idx(number).as_rgb()


def check(side, labels, *points):
    """Texts; and x, y of the image -> colors over the gray there, from below, of which the last
    covers those of objects."""
    picture, texts, _ = side
    assert texts == labels
    for x, y, *colors in points:
        expected = 0.55 * GRAY + 0.45 * np.array(colors[-1]) if colors else [GRAY] * 3
        found = picture[round((y + 0.5) * SCALE), round((x + 0.5) * SCALE)]
        np.testing.assert_allclose(found, expected, atol=1.5)


def test_masks_boxes_and_labels(workspace):
    found = rectangle(30, 10, 20, 30)
    polygons = [[0, 0, 9, 9], [5, 10, 25, 10, 25, 40, 5, 40]]  # the first has no area
    workspace.dataset["annotations"] = [item(1, 20, BOX, segmentation=polygons)]
    workspace.results = [
        item(1, 19, (30, 10, 20, 30), score=0.9, segmentation=encode(found)),
        item(1, 20, (1, 1, 9, 9), score=0.49),
    ]
    left, right, last = workspace.draw()
    dog, cat = color(0), color(1)  # ordered by id
    check(left, ["cat"], (15, 25, cat), (7, 38, cat), (23, 12, cat), (27, 25), (15, 42))
    check(right, ["ground truth: 1 object", "dog 0.90"], (40, 25, dog), (15, 25))
    assert last[1] == ["predictions ≥ 0.5: 1 object"]
    ((box, outline),) = right[2]
    np.testing.assert_allclose(box, np.array([30, 10, 50, 40]) * SCALE)
    assert outline == dog
    *_, right, last = workspace.draw(score_threshold=0.4)
    assert right[1][1:] == ["dog 0.90", "cat 0.49"]
    assert last[1] == ["predictions ≥ 0.4: 2 objects"]
    workspace.dataset["categories"], workspace.results = [{"id": 20, "name": "cat"}], []
    check(workspace.draw()[0], [], (15, 25, color(0, 1)))  # of one class


def test_small_objects_are_on_top_and_a_crowd_is_below_and_gray(workspace):
    large, small = rectangle(5, 5, 30, 30), rectangle(10, 10, 5, 5)
    runs = {"size": [HEIGHT, WIDTH], "counts": [30 * HEIGHT, 9 * HEIGHT, 21 * HEIGHT]}
    workspace.dataset["annotations"] = [
        item(1, 19, (10, 10, 5, 5), segmentation=encode(small)),
        item(1, 20, (5, 5, 30, 30), segmentation=encode(large)),
        item(1, 20, (30, 0, 3, 3), segmentation=runs, iscrowd=1),
    ]
    left, right, _ = workspace.draw()
    gray = drawing.CROWD_COLOR.as_rgb()
    points = (12, 13, color(0)), (8, 30, color(1)), (32, 20, color(1)), (37, 45, gray)
    check(left, ["crowd", "cat", "dog"], *points)
    assert right[1] == ["ground truth: 2 objects"]


def test_many_objects_are_masks_alone(workspace):
    found = item(1, 20, BOX, score=1, segmentation=encode(rectangle(*BOX)))
    workspace.results = [found] * 30
    _, (_, texts, boxes), _ = workspace.draw()
    assert len(boxes) == 30 and texts[1:] == ["cat 1.00"] * 30
    workspace.results.append(item(1, 20, BOX, score=1))  # has no mask
    _, (_, texts, boxes), _ = workspace.draw()
    assert (len(boxes), texts) == (1, ["ground truth: 0 objects"])


def test_pairs_of_chosen_images(workspace):
    workspace.set_images(3)
    workspace.dataset["annotations"] = [item(3, 20, (10, 10, 5, 5))]
    *sides, _ = workspace.draw([3, 1])
    assert [image_id for image_id, _ in workspace.pairs] == [3, 1]
    height, width = round(HEIGHT * SCALE), visualize.SIDE
    for (_, picture), left, right in zip(workspace.pairs, sides[::2], sides[1::2], strict=True):
        np.testing.assert_array_equal(picture[-height:, :width], left[0])
        np.testing.assert_array_equal(picture[-height:, -width:], right[0])
    assert len(sides[0][2]) == 1 and not sides[2][2]
    with pytest.raises(DataError, match="dataset.json has no image 7"):
        workspace.draw([1, 7])


def test_exif_orientation(workspace):
    image = Image.new("RGB", (HEIGHT, WIDTH), (GRAY,) * 3)
    image.save(workspace.root / "1.png", exif=with_orientation(6))  # to be turned
    mask = rectangle(*BOX)
    workspace.results = [item(1, 20, BOX, score=1, segmentation=encode(mask))]
    _, right, _ = workspace.draw()
    check(right, ["ground truth: 0 objects", "cat 1.00"], (15, 25, color(1)), (27, 25))


def test_more_than_8_bits_and_a_name_that_differs(workspace):
    pixels = np.full((HEIGHT, WIDTH), GRAY * 4095 // 255, np.uint16)
    Image.fromarray(pixels).save(workspace.root / "1.PNG")
    (workspace.root / "1.png").unlink()
    left, *_ = workspace.draw(bit_depth_range=(0, 4095))
    check(left, [], (15, 25))


FOUND = item(1, 20, BOX, score=0.9)
RLE = {"size": [HEIGHT, WIDTH], "counts": "! ~"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("dataset.json", None, "cannot read .*dataset.json"),  # and what check_coco_json finds
        (
            *("dataset.json", {"annotations": [item(1, 20, BOX, segmentation=RLE)]}),
            r"dataset.json: annotation 1 \(image 1.png\) has an RLE with damaged counts",
        ),
        ("1.png", None, "not in .*: '1.png'"),
        ("1.png", "GIF", "1 image: unknown to Pillow.*1.png.*; correct or replace"),
        ("results.json", None, "cannot read .*results.json"),  # and what read_results finds
        ("results.json", [FOUND | {"segmentation": RLE}], "results.json: .* damaged counts"),
    ],
)
def test_errors_name_the_file(workspace, name, content, message):
    paths, path = workspace.write(), workspace.root / name
    path.unlink()
    if isinstance(content, dict):
        content = {**workspace.dataset, **content}
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(draw_pairs(*paths, [1]))


def test_boxes_far_outside(workspace):
    boxes = [(1e30, 1, 5, 5), (-1e308, 1, 5, 5), (1, 1, 1e308, 1e308), (9, 9, -5, -5)]
    workspace.dataset["annotations"] = [item(1, 19, box) for box in boxes[:3]]
    workspace.results = [item(1, 19, box, score=0.9) for box in boxes]
    left, right, _ = workspace.draw()
    assert (len(left[2]), len(right[2])) == (3, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (100, 100), (480, 640), (2000, 3000)])
def test_objects_are_drawn_in_sizes_that_fit(size):
    """Lines are seen at any size; what is written stays small, and nothing changes the input."""
    height, width = size
    box = np.array([[0.2, 0.4, 0.6, 0.8]]) * ([width, height] * 2)
    mask = np.zeros(size, bool)
    mask[int(0.4 * height) : int(0.8 * height) + 1, int(0.2 * width) : int(0.6 * width) + 1] = True
    found = from_coco(box, np.array([1]), [encode(mask)], size, confidence=np.array([0.5]))
    image = np.full((*size, 3), GRAY, np.uint8)
    picture = draw(image, found, ["Straße", "собака"])
    assert picture.shape == image.shape and picture.dtype == np.uint8 and (image == GRAY).all()
    if min(size) > 1:
        inside = picture[int(0.7 * height), int(0.4 * width)]
        np.testing.assert_allclose(inside, 0.55 * GRAY + 0.45 * np.array(color(1)), atol=1.5)
        colored = (picture == color(1)).all(axis=-1)
        assert max(1, min(size) / 500) <= colored[int(0.6 * height)].sum() / 2 <= min(size) / 100
        assert 0.005 < colored.mean() < 0.25  # box and label


def test_masks_that_are_an_array_are_drawn_as_runs_are():
    image = np.full((HEIGHT, WIDTH, 3), GRAY, np.uint8)
    masks = np.stack([rectangle(*BOX), rectangle(0, 0, 3, 3)])
    runs = from_coco(np.ones((2, 4)), np.array([0, 1]), list(map(encode, masks)), (HEIGHT, WIDTH))
    dense = sv.Detections(np.ones((2, 4)), mask=masks, class_id=np.array([0, 1]))
    pictures = [draw(image, objects, ["a", "b"]) for objects in (runs, dense)]
    np.testing.assert_array_equal(*pictures)
    assert (pictures[0] != image).any(axis=-1).sum() >= masks.sum() - 4


def test_labels_hide_no_other_and_stay_inside(monkeypatch):
    places = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "rectangle",
        lambda pen, xy, fill=None, outline=None, width=1: places.append(xy) if fill else None,
    )
    boxes = np.array([[590, -20, 700, 90], [2, 2, 50, 50], [4, 3, 40, 40], [3, 4, 30, 30.0]])
    objects = sv.Detections(boxes, class_id=np.arange(4), confidence=np.full(4, 0.5))
    draw(np.zeros((480, 640, 3), np.uint8), objects, ["one", "two", "three", "four"])
    assert len(places) == 4
    for number, (left, top, right, bottom) in enumerate(places):
        assert left >= 0 and top >= 0 and right <= 640 and bottom <= 480
        for other in places[:number]:
            apart = [left - other[2], top - other[3], other[0] - right, other[1] - bottom]
            assert max(apart) >= 0


def test_keypoints_are_drawn_where_they_are_seen():
    points = np.array([[[100, 100, 0.9], [300, 300, 0.01], [500, 100, 0.9]]])
    objects = sv.Detections(np.array([[50, 50, 600, 400.0]]), class_id=np.array([0]))
    picture = draw(np.zeros((480, 640, 3), np.uint8), objects, ["a"], points)
    seen = [tuple(picture[y, x]) == color(0, 1) for x, y in ((100, 100), (300, 300), (500, 100))]
    assert seen == [True, False, True]


def test_a_font_that_has_the_characters_is_found_or_asked_for(monkeypatch, caplog):
    drawing.find_font.cache_clear()
    own = drawing.findfont("DejaVu Sans")
    assert drawing.find_font("Größe собака") == own and not caplog.records
    other = drawing.findfont("STIXGeneral")
    letter = next(c for c in map(chr, range(0x2100, 0x2200)) if drawing.missing(own, c))
    monkeypatch.setattr(drawing, "findSystemFonts", lambda: [own, other])
    assert not drawing.missing(other, letter)
    assert drawing.find_font(letter) == other and not caplog.records
    assert drawing.find_font("\U0001f9ff") in (own, other)
    assert "lacks '\U0001f9ff'" in caplog.text and "fonts-noto-cjk" in caplog.text


def test_other_data_is_an_error(workspace):
    Image.new("RGB", (6, 5)).save(workspace.root / "1.png")
    with pytest.raises(ValueError, match=rf"1.png is 6 x 5, declared {WIDTH} x {HEIGHT}"):
        workspace.draw()


def write_metrics(root, *lines):
    path = root / "metrics.json"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_resumed_run_replaces_the_iterations_that_it_repeats(tmp_path):
    """An evaluation that is written after later losses keeps both; a cut last line is ignored."""
    lines = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59, 79)]
    lines += [{"iteration": 49, "bbox/AP": 7.0}]
    lines += [{"iteration": i, "total_loss": -float(i)} for i in (39, 55)]
    metrics = write_metrics(tmp_path, *lines, '{"iteration": 39, "l')
    expected = {"total_loss": ([19, 39, 55], [19.0, -39.0, -55.0]), "bbox/AP": ([49], [7.0])}
    assert read_curves(metrics) == expected


@pytest.mark.parametrize(
    "lines, words",
    [
        (['{"iter'], "metrics.json holds no complete line"),
        (['{"iteration": 1, "lr": 1}', '{"it', '{"iteration": 2}'], "metrics.json, line 2,"),
        *(
            ([line, '{"iteration": 2, "lr": 1}'], "metrics.json, line 1,.*'iteration'")
            for line in (
                "[1]",
                '{"iteration": "1"}',
                '{"iteration": NaN}',
                '{"iteration": 1e999}',
                '{"iteration": 1, "lr": "0.1"}',
                '{"iteration": 1, "lr": [1]}',
                '{"iteration": 1, "lr": ' + "[" * 10**5,
            )
        ),
    ],
)
def test_unreadable_metrics_are_named(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        read_curves(write_metrics(tmp_path, *lines))
