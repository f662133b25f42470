"""Pictures are compared pixel by pixel with blends computed here, curves with hand-made logs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageDraw

from gn_detect import visualize
from gn_detect.visualize import Instance, draw_curves, draw_predictions, overlay, read_curves

TOOL = Path(__file__).resolve().parents[1] / "tools" / "visualize_predictions.py"
WIDTH, HEIGHT = visualize.PANEL  # images of this size are drawn without resizing
TOP = visualize.GAP + visualize.TITLE
GRAY = 90


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def rectangle(x, y, w, h, size=(WIDTH, HEIGHT)):
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def item(image_id, category_id, box, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), **more}


def result(image_id, category_id, box, score, mask=None):
    segmentation = {} if mask is None else {"segmentation": encode(mask)}
    return item(image_id, category_id, box, score=score, **segmentation)


class Workspace:
    """A dataset of plain gray images, written where `draw` finds it."""

    def __init__(self, root, images=1, classes=("cat", "dog"), size=(WIDTH, HEIGHT)):
        self.root, self.results = root, []
        self.dataset = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]}
                for i in range(1, images + 1)
            ],
            "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(classes)],
            "annotations": [],
        }
        for image in self.dataset["images"]:
            Image.new("RGB", size, (GRAY,) * 3).save(root / image["file_name"])

    def draw(self, **options):
        for name in ("dataset", "results"):
            (self.root / f"{name}.json").write_text(json.dumps(getattr(self, name)))
        return draw_predictions(*self.paths(), **options)

    def paths(self):
        files = [self.root / name for name in ("dataset.json", "", "results.json", "out.png")]
        return [str(file) for file in files]

    def panels(self, **options):
        """The images of the first pair, ground truth and predictions, without their titles."""
        sheet = np.asarray(Image.open(self.draw(**options)))
        height, width = sheet.shape[0] - TOP - visualize.GAP, (sheet.shape[1] - 30) // 2
        lefts = visualize.GAP, width + 2 * visualize.GAP
        return [sheet[TOP : TOP + height, left : left + width].astype(int) for left in lefts]


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture
def printed(monkeypatch):
    """All texts that are printed on pictures, in order."""
    texts, text = [], ImageDraw.ImageDraw.text

    def spy(self, position, string, *args, **kwargs):
        texts.append(string)
        return text(self, position, string, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return texts


def test_overlay_equals_a_blend_computed_pixel_by_pixel():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)
    before = image.copy()
    masks = [rectangle(0, 3, 9, 11, (17, 14)), rng.random((14, 17)) < 0.9]
    colors = [(255, 0, 40), (10, 200, 90)]

    expected = image.astype(float)
    for mask, color in zip(masks, colors, strict=True):
        for y, x in np.argwhere(mask):
            # On the contour if anything within two steps is outside the mask or the image.
            contour = any(
                not (0 <= y + dy < 14 and 0 <= x + dx < 17 and mask[y + dy, x + dx])
                for dy in range(-2, 3)
                for dx in range(-2, 3)
                if abs(dy) + abs(dx) <= 2
            )
            opacity = 1.0 if contour else 0.3
            expected[y, x] = (1 - opacity) * expected[y, x] + opacity * np.array(color)

    instances = [Instance((0, 0, 1, 1), m, c) for m, c in zip(masks, colors, strict=True)]
    instances.append(Instance((0, 0, 9, 9), None, (1, 2, 3)))  # without a mask: nothing to blend
    actual = overlay(image, instances, alpha=0.3)
    assert actual.dtype == np.uint8
    assert np.abs(actual - expected).max() <= 0.51
    assert np.array_equal(image, before)


def test_crowd_is_hatched_in_diagonal_stripes():
    image = np.full((60, 60, 3), GRAY, np.uint8)
    color = visualize.CROWD_COLOR
    crowd = Instance((10, 10, 50, 50), rectangle(10, 10, 40, 40, (60, 60)), color, crowd=True)
    inner = overlay(image, [crowd])[12:48, 12:48, 0].astype(int)
    filled = round(GRAY + visualize.ALPHA * (color[0] - GRAY))
    assert set(np.unique(inner)) == {GRAY, filled}
    assert 0.4 < (inner == filled).mean() < 0.6
    assert np.array_equal(inner[1:, :-1], inner[:-1, 1:])  # constant along a diagonal


def test_prediction_changes_its_region_of_the_right_panel_only(workspace):
    empty_left, empty_right = workspace.panels()
    assert (empty_left == GRAY).all() and (empty_right == GRAY).all()

    ellipse = np.hypot(*(np.indices((HEIGHT, WIDTH)) - np.array([200, 150])[:, None, None])) < 60
    workspace.results = [result(1, 10, (85, 135, 131, 131), 0.9, ellipse)]
    left, right = workspace.panels()
    assert np.array_equal(left, empty_left)

    changed = (right != GRAY).any(axis=2)
    allowed = rectangle(85, 135, 132, 132) | rectangle(85, 118, 131, 17)  # the box, its label
    assert ellipse[changed & rectangle(90, 140, 120, 120)].all()  # between mask and box: nothing
    assert changed[ellipse].all() and not changed[~allowed].any()
    color = np.array(visualize._color(0))
    blend = np.rint((1 - visualize.ALPHA) * GRAY + visualize.ALPHA * color)
    assert np.array_equal(right[200, 150], blend)
    assert np.array_equal(right[135, 200], color)  # the box


def test_enlarged_image_has_enlarged_masks_and_boxes(tmp_path):
    small = Workspace(tmp_path, classes=("cat",), size=(WIDTH // 10, HEIGHT // 10))
    mask = rectangle(8, 12, 16, 20, (WIDTH // 10, HEIGHT // 10))
    small.results = [result(1, 10, (8, 12, 16, 20), 0.9, mask)]
    left, right = small.panels()
    changed = (right != GRAY).any(axis=2)
    assert (left == GRAY).all()
    assert changed[125:315, 85:235].all()
    assert not changed[~rectangle(78, 103, 165, 220)].any()  # the label is above
    assert (right[120, 80:241] == visualize._color(0)).all()  # the box


@pytest.mark.parametrize("crowd", [0, 1])
def test_small_objects_are_on_top_of_large_ones_and_of_crowds(workspace, crowd):
    # A crowd is below even if it is smaller.
    sides = (40, 120) if crowd else (120, 40)
    below, above = (rectangle(200 - s // 2, 200 - s // 2, s, s) for s in sides)
    workspace.dataset["annotations"] = [
        item(1, class_id, (200 - s // 2, 200 - s // 2, s, s), segmentation=encode(m), iscrowd=c)
        for class_id, s, m, c in ((10, sides[1], above, 0), (20, sides[0], below, crowd))
    ]
    left, _ = workspace.panels()
    color = visualize.CROWD_COLOR if crowd else visualize._color(1)
    expected = np.full((HEIGHT, WIDTH, 3), GRAY, np.uint8)
    instances = [Instance((), below, color, crowd=crowd), Instance((), above, visualize._color(0))]
    center = slice(190, 210), slice(190, 210)
    assert np.array_equal(left[center], overlay(expected, instances)[center])


def test_same_class_has_the_same_color_in_both_panels(workspace):
    masks = [rectangle(50, 100, 100, 100), rectangle(250, 100, 100, 100)]
    boxes = [(50, 100, 100, 100), (250, 100, 100, 100)]
    polygon = [[250, 100, 350, 100, 350, 200, 250, 200]]
    workspace.dataset["annotations"] = [
        item(1, 10, boxes[0], segmentation=encode(masks[0])),
        item(1, 20, boxes[1], segmentation=polygon),
    ]
    workspace.results = [
        result(1, c, b, 0.9, m) for c, b, m in zip((10, 20), boxes, masks, strict=True)
    ]
    left, right = workspace.panels()
    cat, dog = (150, 100), (150, 300)
    assert np.array_equal(left[cat], right[cat]) and np.array_equal(left[dog], right[dog])
    assert np.abs(left[cat] - left[dog]).max() > 60 and np.abs(left[dog] - GRAY).max() > 20


def test_results_without_segmentation_are_boxes(workspace):
    workspace.results = [result(1, 10, (100, 100, 200, 150), 0.9)]
    _, right = workspace.panels()
    assert (right[102:249, 102:299] == GRAY).all()
    for edge in (right[100, 100:301], right[250, 100:301], right[100:251, 100]):
        assert (edge == visualize._color(0)).all()


def test_crowd_of_uncompressed_rle_is_gray_and_is_no_object(workspace, printed):
    runs = [WIDTH * HEIGHT // 2, WIDTH * HEIGHT // 4, WIDTH * HEIGHT // 4]  # column by column
    segmentation = {"size": [HEIGHT, WIDTH], "counts": runs}
    workspace.dataset["annotations"] = [
        item(1, 10, (240, 0, 120, HEIGHT), segmentation=segmentation, iscrowd=1)
    ]
    left, right = workspace.panels()
    assert (right == GRAY).all() and (left[:, :240] == GRAY).all() and (left[:, 360:] == GRAY).all()
    inner = left[50:-50, 245:355]
    assert len(np.unique(inner)) == 2 and (inner == inner[..., :1]).all()
    assert "ground truth: 0 objects" in printed and "crowd" in printed


def test_threshold_leaves_out_predictions_below_it(workspace, printed):
    workspace.results = [
        result(1, 10, (100, 100, 90, 90), 0.49),
        result(1, 10, (300, 100, 90, 90), 0.5),
    ]
    _, right = workspace.panels()
    assert (right[:, :250] == GRAY).all() and (right[:, 250:] != GRAY).any()
    assert "predictions ≥ 0.5: 1 object" in printed
    workspace.panels(score_threshold=0.4)
    assert "predictions ≥ 0.4: 2 objects" in printed


@pytest.mark.parametrize(
    "classes, labels", [(("cat",), ["0.90"]), (("cat", "dog"), ["cat", "cat 0.90"])]
)
def test_class_names_are_printed_only_if_there_are_several(tmp_path, printed, classes, labels):
    workspace = Workspace(tmp_path, classes=classes)
    workspace.dataset["annotations"] = [item(1, 10, (100, 100, 90, 90))]
    workspace.results = [result(1, 10, (100, 100, 90, 90), 0.9)]
    workspace.draw()
    assert [text for text in printed if "object" not in text] == labels


def test_many_objects_are_masks_without_boxes_and_labels(workspace, printed):
    # Boxes far wider than the masks, where labels would fit.
    boxes = [(20 + 40 * (i % 10), 20 + 60 * (i // 10), 60, 30) for i in range(50)]
    masks = [rectangle(x + 5, y + 5, 20, 20) for x, y, _, _ in boxes]
    workspace.results = [result(1, 10, b, 0.9, m) for b, m in zip(boxes, masks, strict=True)]
    _, right = workspace.panels()
    assert np.array_equal((right != GRAY).any(axis=2), np.any(masks, axis=0))
    assert [text for text in printed if "object" not in text] == []


def test_labels_do_not_hide_each_other(workspace, printed):
    workspace.results = [result(1, 10, (100, 200, 90, 90), 0.9) for _ in range(8)]
    workspace.draw()
    assert 1 <= printed.count("cat 0.90") <= 3


def test_images_range_from_few_objects_to_many_with_one_empty(tmp_path, printed):
    workspace = Workspace(tmp_path, images=24)
    workspace.dataset["annotations"] = [
        item(i, 10, (100, 100, 50, 50)) for i in range(1, 21) for _ in range(i)
    ]
    chosen = {}
    for seed in (0, 0, 1):
        printed.clear()
        workspace.draw(num_images=5, seed=seed)
        titles = [text for text in printed if text.startswith("ground truth")]
        counts = [int(title.split()[2]) for title in titles]
        assert chosen.setdefault(seed, counts) == counts
        # One from each quarter of the twenty with objects, then one of the four without.
        assert [(count - 1) // 5 for count in counts] == [0, 1, 2, 3, -1]
    assert chosen[0] != chosen[1]


def test_all_images_are_drawn_if_there_are_fewer_than_asked(tmp_path, printed):
    workspace = Workspace(tmp_path, images=3)
    workspace.dataset["annotations"] = [item(2, 10, (100, 100, 50, 50))]
    sheet = Image.open(workspace.draw(num_images=8, columns=3))
    titles = [text for text in printed if text.startswith("ground truth")]
    assert sorted(titles) == ["ground truth: 0 objects"] * 2 + ["ground truth: 1 object"]
    assert sheet.width > 6 * WIDTH and sheet.height < 2 * HEIGHT


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_that_of_detectron2(tmp_path, orientation):
    workspace = Workspace(tmp_path)
    stored = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
    ramp = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp.resize(stored).save(tmp_path / "1.png", exif=exif)
    left, _ = workspace.panels()
    assert np.array_equal(left, read_image(str(tmp_path / "1.png"), "RGB"))


def test_output_makes_folders_and_replaces_only_a_whole_picture(workspace, monkeypatch):
    *inputs, _ = workspace.paths()
    workspace.draw()
    output = workspace.root / "new" / "folder" / "a.png"
    assert draw_predictions(*inputs, output) == output
    before = output.read_bytes()

    def fail(self, file, **_):
        file.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_predictions(*inputs, output)
    assert output.read_bytes() == before and os.listdir(output.parent) == ["a.png"]


def remove(name):
    return lambda w: (w.root / name).unlink()


def write(name, text):
    return lambda w: (w.root / name).write_text(text)


def results(*entries):
    return write("results.json", json.dumps(entries))


@pytest.mark.parametrize(
    "damage, options, error, words",
    [
        (remove("dataset.json"), {}, FileNotFoundError, ["dataset.json does not exist"]),
        (remove("results.json"), {}, FileNotFoundError, ["results.json does not exist"]),
        (remove("1.png"), {}, FileNotFoundError, ["1.png does not exist", "dataset.json"]),
        (write("1.png", "GIF"), {}, ValueError, ["1.png cannot be read as an image"]),
        (
            write("dataset.json", '{"images": [{"id"'),
            {},
            ValueError,
            ["dataset.json is not complete"],
        ),
        (
            write("results.json", '[{"image_id": 1'),
            {},
            ValueError,
            ["results.json is not complete"],
        ),
        (write("dataset.json", "[]"), {}, ValueError, ["dataset.json", "'images'"]),
        (write("results.json", "{}"), {}, ValueError, ["results.json is not a list"]),
        (results({"image_id": 1}), {}, ValueError, ["results.json", "score"]),
        (
            results(result(77, 10, (0, 0, 9, 9), 0.1)),
            {},
            ValueError,
            ["image_id 77", "results.json", "dataset.json"],
        ),
        (
            results(result(1, 99, (0, 0, 9, 9), 0.1)),
            {},
            ValueError,
            ["category_id 99", "results.json", "dataset.json"],
        ),
        (
            results(result(1, 10, (0, 0, 9, 9), 0.9, np.ones((5, 6)))),
            {},
            ValueError,
            ["results.json", "[5, 6]", f"[{HEIGHT}, {WIDTH}]"],
        ),
        (
            lambda w: Image.new("RGB", (6, 5)).save(w.root / "1.png"),
            {},
            ValueError,
            ["1.png is 6x5", f"{WIDTH}x{HEIGHT}"],
        ),
        (lambda w: None, {"num_images": 0}, ValueError, ["num_images (0)"]),
    ],
)
def test_errors_name_the_file_and_write_nothing(workspace, damage, options, error, words):
    workspace.draw()
    os.remove(workspace.paths()[-1])
    damage(workspace)
    with pytest.raises(error) as caught:
        draw_predictions(*workspace.paths(), **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and not os.path.exists(workspace.paths()[-1])


def test_output_must_be_a_png(workspace):
    workspace.draw()
    with pytest.raises(ValueError, match=r"a\.jpg must end in \.png"):
        draw_predictions(*workspace.paths()[:3], workspace.root / "a.jpg")


def write_metrics(root, *lines):
    path = root / "metrics.json"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_resumed_run_replaces_the_iterations_that_it_repeats(tmp_path):
    first = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59, 79)]
    resumed = [{"iteration": i, "total_loss": -float(i)} for i in (39, 55)]
    metrics = write_metrics(tmp_path, *first, *resumed)
    assert read_curves(metrics) == {"total_loss": ([19, 39, 55], [19.0, -39.0, -55.0])}


def test_evaluation_written_after_later_losses_keeps_both(tmp_path):
    metrics = write_metrics(
        tmp_path,
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 59, "total_loss": 1.0},
        {"iteration": 49, "bbox/AP": 7.0},
        {"iteration": 79, "total_loss": 0.5},
    )
    expected = {"total_loss": ([39, 59, 79], [2.0, 1.0, 0.5]), "bbox/AP": ([49], [7.0])}
    assert read_curves(metrics) == expected


def test_truncated_last_line_is_ignored(tmp_path):
    metrics = write_metrics(tmp_path, {"iteration": 19, "lr": 0.1}, '{"iteration": 39, "l')
    assert read_curves(metrics) == {"lr": ([19], [0.1])}


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], ["metrics.json holds no complete line"]),
        (['{"iter'], ["metrics.json holds no complete line"]),
        (['{"iteration": 1, "lr": 1}', '{"it', '{"iteration": 2}'], ["metrics.json, line 2,"]),
        (['{"lr": 1}', '{"iteration": 2, "lr": 1}'], ["metrics.json, line 1,", "'iteration'"]),
        (["[1]", '{"iteration": 2, "lr": 1}'], ["metrics.json, line 1,"]),
    ],
)
def test_unreadable_metrics_are_named(tmp_path, lines, words):
    metrics = write_metrics(tmp_path, *lines)
    with pytest.raises(ValueError) as caught:
        draw_curves(metrics, tmp_path / "curves.png")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "curves.png").exists()


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        draw_curves(tmp_path / "none.json", tmp_path / "curves.png")


def test_curves_show_losses_rate_and_ap_with_nan(tmp_path):
    metrics = write_metrics(
        tmp_path,
        {"iteration": 19, "total_loss": 3.0, "loss_cls": 1.0, "lr": 0.1, "time": 1.0},
        {"iteration": 39, "total_loss": float("nan"), "loss_cls": 0.5, "lr": 0.2, "bbox/AP50": 9},
        {"iteration": 39, "val_a/bbox/AP": 12.34, "val_b/bbox/AP": float("nan")},
    )
    curves = read_curves(metrics)
    assert np.isnan(curves["total_loss"][1][1])
    panels = visualize._curves_figure(curves).axes
    lines = [{line.get_label(): line.get_ydata() for line in axes.lines} for axes in panels]
    assert [list(panel) for panel in lines] == [
        ["total_loss", "loss_cls"],
        ["lr"],
        ["val_a/bbox/AP (last: 12.3)", "val_b/bbox/AP (last: nan)"],
    ]
    assert list(lines[0]["loss_cls"]) == [1.0, 0.5] and list(lines[1]["lr"]) == [0.1, 0.2]
    assert [axes.get_yscale() for axes in panels] == ["log", "linear", "linear"]
    output = draw_curves(metrics, tmp_path / "new" / "curves.png")
    assert np.asarray(Image.open(output).convert("L")).min() < 50


def test_run_without_evaluation_says_so(tmp_path):
    curves = read_curves(write_metrics(tmp_path, {"iteration": 19, "total_loss": 3.0}))
    texts = [[text.get_text() for text in a.texts] for a in visualize._curves_figure(curves).axes]
    assert texts == [[], ["no learning rate"], ["no evaluation"]]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("visualize_predictions", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_tool_writes_both_pictures_and_prints_their_paths(workspace, tool, capsys):
    workspace.dataset["annotations"] = [item(1, 10, (100, 100, 50, 50))]
    workspace.results = [result(1, 10, (100, 100, 50, 50), 0.3)]
    expected = Path(workspace.draw(score_threshold=0.2)).read_bytes()
    dataset, images, results_json, output = workspace.paths()
    os.remove(output)
    metrics = str(write_metrics(workspace.root, {"iteration": 19, "total_loss": 3.0}))
    curves = str(workspace.root / "curves.png")
    arguments = ["--json", dataset, "--images", images, "--results", results_json]
    arguments += ["--output", output, "--score-threshold", "0.2", "--num-images", "1"]
    assert tool([*arguments, "--metrics", metrics, "--curves", curves]) == 0
    assert capsys.readouterr().out.split() == [output, curves]
    assert Path(output).read_bytes() == expected and os.path.exists(curves)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to draw"),
        (["--metrics", "a"], "curves need both --metrics and --curves"),
        (["--json", "a", "--images", "b", "--output", "c"], "predictions need all of --json"),
    ],
)
def test_tool_refuses_half_a_task(tool, capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        tool(arguments)
    assert words in capsys.readouterr().err


def test_tool_reports_an_error_without_a_traceback(tmp_path):
    arguments = ["--metrics", "none.json", "--curves", str(tmp_path / "curves.png")]
    done = subprocess.run(
        [sys.executable, TOOL, *arguments],
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "error: none.json does not exist; check the path\n" in done.stderr
