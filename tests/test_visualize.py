"""Pictures are compared with blends computed here, curves with hand-made logs."""

import json
import runpy

import numpy as np
import pycocotools.mask as mask_util
import pytest
from helpers import ROOT
from image_files import with_orientation
from PIL import Image

from gn_detect import visualize
from gn_detect.visualize import draw_curves, draw_predictions, read_curves

tool = runpy.run_path(str(ROOT / "tools/visualize_predictions.py"))["main"]

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
        self.root, self.results, self.figures = root, [], []
        self.dataset = {"categories": [{"id": 20, "name": "cat"}, {"id": 19, "name": "dog"}]}
        self.set_images(1)
        monkeypatch.setattr(visualize, "_save", lambda figure, _: self.figures.append(figure))

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

    def draw(self, **options):
        """Axes of ground truth and predictions, in turn."""
        draw_predictions(*self.write(), "out.png", **options)
        return self.figures[-1].axes


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    return Workspace(tmp_path, monkeypatch)


def check(axes, title, labels, *areas):
    """Later areas are on top."""
    expected = np.full((HEIGHT, WIDTH, 3), GRAY / 255)
    for mask, colour in areas:
        expected[mask] = 0.55 * expected[mask] + 0.45 * np.array(colour)
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-6)
    assert axes.get_title("left") == title
    assert [text.get_text() for text in axes.texts] == labels


def test_masks_boxes_and_labels(workspace):
    truth, found = rectangle(*BOX), rectangle(30, 10, 20, 30)
    polygons = [[0, 0, 9, 9], [5, 10, 25, 10, 25, 40, 5, 40]]  # the first has no area
    workspace.dataset["annotations"] = [item(1, 20, BOX, segmentation=polygons)]
    workspace.results = [
        item(1, 19, (30, 10, 20, 30), score=0.9, segmentation=encode(found)),
        item(1, 20, (1, 1, 9, 9), score=0.49),
    ]
    left, right = workspace.draw()
    dog, cat = (visualize._color(number) for number in range(2))  # ordered by id
    check(left, "ground truth: 1 object", ["cat"], (truth, cat))
    check(right, "predictions ≥ 0.5: 1 object", ["dog 0.90"], (found, dog))
    (box,) = right.patches
    assert box.get_bbox().bounds == (30, 10, 20, 30) and box.get_edgecolor()[:3] == dog
    _, right = workspace.draw(score_threshold=0.4)
    check(right, "predictions ≥ 0.4: 2 objects", ["dog 0.90", "cat 0.49"], (found, dog))
    workspace.dataset["categories"], workspace.results = [{"id": 20, "name": "cat"}], []
    left, _ = workspace.draw()
    check(left, "ground truth: 1 object", [], (truth, visualize._color(0)))  # of one class


def test_small_objects_are_on_top_and_a_crowd_is_below_and_gray(workspace):
    large, small, crowd = rectangle(5, 5, 30, 30), rectangle(10, 10, 5, 5), rectangle(30, 0, 9, 50)
    runs = {"size": [HEIGHT, WIDTH], "counts": [30 * HEIGHT, 9 * HEIGHT, 21 * HEIGHT]}
    workspace.dataset["annotations"] = [
        item(1, 19, (10, 10, 5, 5), segmentation=encode(small)),
        item(1, 20, (5, 5, 30, 30), segmentation=encode(large)),
        item(1, 20, (30, 0, 9, 50), segmentation=runs, iscrowd=1),
    ]
    left, _ = workspace.draw()
    areas = [(large, visualize._color(1)), (small, visualize._color(0))]
    title, labels = "ground truth: 2 objects", ["crowd", "cat", "dog"]
    check(left, title, labels, (crowd, visualize.CROWD_COLOR), *areas)


def test_many_objects_are_masks_alone(workspace):
    found = item(1, 20, BOX, score=1, segmentation=encode(rectangle(*BOX)))
    workspace.results = [found] * 30
    _, right = workspace.draw()
    assert len(right.patches) == len(right.texts) == 30
    workspace.results.append(item(1, 20, BOX, score=1))  # has no mask
    _, right = workspace.draw()
    assert (len(right.patches), len(right.texts)) == (1, 0)


def test_images_range_from_few_objects_to_many_with_one_empty(workspace):
    workspace.set_images(24)
    workspace.dataset["annotations"] = [
        item(i, 20, (10, 10, 5, 5)) for i in range(1, 21) for _ in range(i)
    ]
    for num_images, expected in ((1, [1]), (5, [1, 7, 13, 20, 0])):
        titles = [axes.get_title("left") for axes in workspace.draw(num_images=num_images)[::2]]
        assert [int(title.split()[2]) for title in titles if title] == expected
    workspace.dataset["annotations"] = workspace.dataset["annotations"][:1]
    assert len(workspace.draw(num_images=4)) == 8  # and three without objects


def test_exif_orientation(workspace):
    image = Image.new("RGB", (HEIGHT, WIDTH), (GRAY,) * 3)
    image.save(workspace.root / "1.png", exif=with_orientation(6))  # to be turned
    mask = rectangle(*BOX)
    workspace.results = [item(1, 20, BOX, score=1, segmentation=encode(mask))]
    _, right = workspace.draw()
    check(right, "predictions ≥ 0.5: 1 object", ["cat 1.00"], (mask, visualize._color(1)))


def test_more_than_8_bits_and_a_name_that_differs(workspace):
    pixels = np.full((HEIGHT, WIDTH), GRAY * 4095 // 255, np.uint16)
    Image.fromarray(pixels).save(workspace.root / "1.PNG")
    (workspace.root / "1.png").unlink()
    left, _ = workspace.draw(bit_depth_range=(0, 4095))
    check(left, "ground truth: 0 objects", [])


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
        draw_predictions(*paths, "out.png")


def test_a_name_of_a_class_is_no_formula(workspace):
    workspace.dataset["categories"][0]["name"] = r"$\frac$"
    workspace.results = [FOUND]
    _, right = workspace.draw()
    assert [text.get_text() for text in right.texts] == [r"$\frac$ 0.90"]
    workspace.figures[-1].savefig(workspace.root / "out.png")


def test_boxes_far_outside(workspace):
    boxes = [(1e30, 1, 5, 5), (-1e308, 1, 5, 5), (1, 1, 1e308, 1e308)]
    workspace.dataset["annotations"] = [item(1, 19, box) for box in boxes]
    workspace.results = [item(1, 19, box, score=0.9) for box in boxes]
    workspace.draw()
    workspace.figures[-1].savefig(workspace.root / "out.png")


def test_other_data_is_an_error(workspace):
    with pytest.raises(ValueError, match="num_images is 0"):
        workspace.draw(num_images=0)
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
        draw_curves(write_metrics(tmp_path, *lines), tmp_path / "curves.png")


def test_curves_show_losses_rate_and_ap_with_nan(tmp_path):
    metrics = write_metrics(
        tmp_path,
        {"iteration": 19, "total_loss": 3.0, "loss_cls": 1.0, "lr": 0.1, "time": 1.0},
        {"iteration": 39, "total_loss": float("nan"), "loss_cls": 0.5, "lr": 0.2, "bbox/AP50": 9},
        {"iteration": 39, "val_a/bbox/AP": 12.34, "val_b/bbox/AP": float("nan")},
    )
    panels = visualize._curves_figure(read_curves(metrics)).axes
    lines = [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in panels]
    assert [list(panel) for panel in lines] == [
        ["total_loss", "loss_cls"],
        ["lr"],
        ["val_a/bbox/AP (last: 12.3)", "val_b/bbox/AP (last: nan)"],
    ]
    assert lines[0]["loss_cls"] == [1.0, 0.5] and lines[1]["lr"] == [0.1, 0.2]
    assert [axes.get_yscale() for axes in panels] == ["log", "linear", "linear"]
    empty = visualize._curves_figure({"total_loss": ([1], [3.0])}).axes
    assert [axes.get_title() for axes in empty] == ["loss", "no learning rate", "no AP"]


def test_tool_writes_both_pictures_and_prints_their_paths(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        workspace = Workspace(tmp_path, patch)
    workspace.results = [item(1, 20, (10, 10, 5, 5), score=0.3)]
    dataset, images, results_json = map(str, workspace.write())
    metrics = str(write_metrics(tmp_path, {"iteration": 19, "total_loss": 3.0}))
    output, curves = (str(tmp_path / "new" / name) for name in ("predictions.png", "curves.png"))
    arguments = ["--json", dataset, "--images", images, "--results", results_json]
    arguments += ["--output", output, "--score-threshold", "0.2", "--num-images", "1"]
    assert tool([*arguments, "--metrics", metrics, "--curves", curves]) == 0
    assert capsys.readouterr().out.split() == [output, curves]
    for path in (output, curves):
        assert np.asarray(Image.open(path).convert("L")).std() > 0


def test_tool_explains_what_it_cannot_draw(tmp_path, capsys):
    for arguments, words in (
        ([], "nothing to draw"),
        (["--metrics", "a"], "curves need both --metrics and --curves"),
        (["--json", "a", "--images", "b", "--output", "c"], "predictions need all of --json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tool(arguments)
        assert words in capsys.readouterr().err
    assert tool(["--metrics", "none.json", "--curves", str(tmp_path / "curves.png")]) == 1
    assert capsys.readouterr().err.startswith("error: none.json cannot be read (")
