"""The analysis of results, against pycocotools and loops over planted errors and random ones."""

import copy
import json
import math
import re

import numpy as np
import pytest
import supervision as sv
from evaluation.generated import detections, ground_truth, reference_of, results
from pycocotools import mask as mask_util
from supervision.metrics import MetricTarget

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.evaluation.errors import IOU_TYPES, analyze

KINDS = ["classification", "localization", "both", "duplicate", "background", "missed"]


@pytest.fixture
def run(tmp_path):
    """``run(content, rows, **options)``: the analysis of results on the content of a COCO JSON."""

    def run(content, rows, **options):
        files = [tmp_path / "dataset.json", tmp_path / "results.json"]
        for path, value in zip(files, (content, rows), strict=True):
            path.write_text(json.dumps(value))
        return analyze(*files, **options)

    return run


def generated(task, seed, crowds=True, **options):
    """A dataset at random, and results with masks for "segm"."""
    content = ground_truth(seed=seed, **options)
    found = detections(content, seed=seed + 1)
    rows = results(content, found, "bbox")
    if task == "segm":
        for row, mask in zip(rows, results(content, found, "segm"), strict=True):
            row["segmentation"] = mask["segmentation"]
    for annotation in content["annotations"]:
        annotation["iscrowd"] *= crowds
    return content, rows


def matched(content, rows, task) -> tuple[dict[int, int], set[int]]:
    """By pycocotools at IoU .5: result, from 0 -> annotation; and results that are ignored."""
    right, ignored = {}, set()
    for image in filter(None, reference_of(content, rows, task).evalImgs):
        if image["aRng"] == [0, 1e10]:
            columns = (image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0])
            for id_, match, ignore in zip(*columns, strict=True):
                if ignore:
                    ignored.add(id_ - 1)
                elif match:
                    right[id_ - 1] = int(match)
    return right, ignored


def mean(values):
    values = values[values > -1]
    return 100 * values.mean() if values.size else math.nan


@pytest.mark.parametrize("task", IOU_TYPES)
@pytest.mark.parametrize("seed", [4, 7])
def test_scores_are_those_of_the_evaluation(run, task, seed):
    content, rows = generated(task, seed)
    found, scored = run(content, rows, score_threshold=0.35), reference_of(content, rows, task)
    scored.summarize()
    precision, recall = (scored.eval[key][..., -1] for key in ("precision", "recall"))
    close = {"abs": 1e-10, "nan_ok": True}  # of 100: the other package adds in another order
    stats = np.where(scored.stats < 0, np.nan, 100 * scored.stats)
    assert found.iou_type == task and list(found.scores.values()) == pytest.approx(stats, **close)
    for c, of_class in enumerate(found.per_class):
        ours = [getattr(of_class, key) for key in ("ap", "ap50", "ap75", "ar")]
        ours += [getattr(of_class, f"{k}_{s}") for k in ("ap", "ar") for s in _SIZES]
        theirs = [precision[t, :, c, 0] for t in (slice(None), 0, 5)] + [recall[:, c, 0]]
        theirs += [part[..., c, s] for part in (precision, recall) for s in (1, 2, 3)]
        assert ours == pytest.approx([mean(values) for values in theirs], **close)
        curve = np.where(precision < 0, np.nan, precision)[[0, 5], :, c, 0]
        np.testing.assert_allclose(found.curves[of_class.name], curve, atol=1e-12)
    for t, iou in enumerate(scored.params.iouThrs.round(2)):
        ours = found.by_iou[iou], found.recall_by_iou[iou]
        theirs = mean(precision[t, :, :, 0]), mean(recall[t, :, 0])
        assert ours == pytest.approx(theirs, **close)
    assert 100 * found.curve.mean(axis=1) == pytest.approx(stats[1:3], **close)
    right, ignored = matched(content, rows, task)
    confident = {i for i, row in enumerate(rows) if row["score"] >= 0.35}
    counts = len(confident & right.keys()), len(confident & ignored)
    assert ignored and (found.true_positives, found.ignored) == counts
    assert found.true_positives + found.false_positives + found.ignored == len(confident)
    assert found.num_objects == sum(not a["iscrowd"] for a in content["annotations"])
    assert found.num_results == len(rows) and found.per_class[-1].objects == 0


_SIZES = ("small", "medium", "large")


def rectangle(x, y, w, h):
    mask = np.zeros((120, 120), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {"size": [120, 120], "counts": rle["counts"].decode()}


# kind -> category (1: cat, 2: dog, 3: cow) and box of the results, whose first one is the mended
# or unwanted one; and of the objects, of which a third value makes a crowd region.
PLANTED = {
    "right": ([(1, (10, 10, 40, 40))], [(1, (10, 10, 40, 40))]),
    "classification": ([(2, (10, 10, 40, 40))], [(1, (10, 10, 40, 40))]),
    "localization": ([(1, (30, 10, 40, 40))], [(1, (10, 10, 40, 40))]),
    "both": ([(2, (30, 10, 40, 40))], [(1, (10, 10, 40, 40))]),
    "duplicate": (
        [(3, (10, 10, 40, 36)), (3, (10, 10, 40, 40))],
        [(3, (10, 10, 40, 40))],
    ),
    "background": ([(2, (70, 70, 40, 40))], []),
    "missed": ([], [(3, (10, 10, 40, 40))]),
    "ignored": ([(1, (10, 10, 20, 20))], [(1, (10, 10, 60, 60), 1)]),
}
NUMBER = dict(zip(PLANTED, (9, 5, 4, 3, 6, 7, 2, 3), strict=True))


def planted(numbers=NUMBER, low=1):
    """A dataset and results with errors of each kind, each in an image of its own, the results
    above .5; then ``low`` of each, whose results are below."""
    names = {1: "cat", 2: "dog", 3: "cow"}
    content = {"categories": [{"id": c, "name": name} for c, name in names.items()]}
    content |= {"images": [], "annotations": []}
    rows, kinds = [], [k for k, n in numbers.items() for _ in range(n)] + [*PLANTED] * low
    for i, kind in enumerate(kinds, 1):
        size = {"height": 120, "width": 120}
        content["images"].append({"id": i, "file_name": f"{kind}_{i}.png", **size})
        found, objects = PLANTED[kind]
        for category, box, *crowd in objects:
            item = {"image_id": i, "category_id": category, "bbox": box, "area": box[2] * box[3]}
            item |= {"iscrowd": len(crowd), "segmentation": rectangle(*box)}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **item})
        for n, (category, box) in enumerate(found):
            score = (0.1 if i > sum(numbers.values()) else 0.6) + n / 10 + i / 1000
            item = {"image_id": i, "category_id": category, "bbox": box, "score": score}
            rows.append({**item, "segmentation": rectangle(*box)})
    return content, rows


@pytest.mark.parametrize("task", IOU_TYPES)
def test_planted_errors_are_found_as_what_they_are(run, task):
    content, rows = planted()
    found = run(content, rows, iou_type=task)
    counts = {error.kind: error.count for error in found.errors}
    # Missed is also an object beside which there is a result that is wrong in both ways, and each
    # one whose results are all below the threshold.
    missed = NUMBER["missed"] + NUMBER["both"] + 6
    assert list(counts) == KINDS and counts.pop("missed") == missed
    assert counts == {kind: NUMBER[kind] for kind in KINDS[:-1]}
    total = sum(counts.values()) + missed
    assert [e.share for e in found.errors] == pytest.approx([e.count / total for e in found.errors])
    assert sum(error.share for error in found.errors) == pytest.approx(1)
    assert found.false_positives == sum(counts.values())
    assert found.true_positives == NUMBER["right"] + NUMBER["duplicate"]
    assert found.ignored == NUMBER["ignored"]
    seen = sum(row["score"] >= 0.5 for row in rows)
    assert found.true_positives + found.false_positives + found.ignored == seen
    expected = np.zeros((4, 4), int)  # cat, dog, cow, background
    cats = NUMBER["localization"] + NUMBER["both"]
    expected[0] = NUMBER["right"], NUMBER["classification"], 0, cats + 4
    expected[2] = 0, 0, NUMBER["duplicate"], NUMBER["missed"] + 2
    dogs = NUMBER["both"] + NUMBER["background"]
    expected[3] = NUMBER["localization"], dogs, NUMBER["duplicate"], 0
    assert found.confusion.tolist() == expected.tolist()


def kind_of(row, category, objects, iou) -> tuple[str, dict | None]:
    """By the words of the paper; the object that the result would be right about."""
    same, other = ([(0, 0, None)], [(0, 0, None)])
    for number, annotation in enumerate(objects):
        group = same if annotation["category_id"] == category else other
        group.append((iou(row, annotation), -number, annotation))
    (same_iou, _, same_object), (other_iou, _, other_object) = (
        max(group, key=lambda entry: entry[:2]) for group in (same, other)
    )
    if 0.1 <= same_iou < 0.5:
        return "localization", same_object
    if other_iou >= 0.5:
        return "classification", other_object
    if same_iou >= 0.5:
        return "duplicate", None
    return ("both" if other_iou > 0.1 else "background"), None


def mend(content, rows, task, kind):
    """The dataset and the results without errors of a kind; with their number."""
    key, shapes = ("bbox", "bbox") if task == "bbox" else ("segmentation", "rle")
    content, rows = copy.deepcopy(content), copy.deepcopy(rows)
    for a in content["annotations"]:
        polygons = a["segmentation"]
        a["rle"] = polygons
        if isinstance(polygons, list):
            a["rle"] = mask_util.merge(mask_util.frPyObjects(polygons, 160, 200))

    def iou(row, annotation):
        return mask_util.iou([row[key]], [annotation[shapes]], [0])[0, 0]

    right, ignored = matched(content, rows, task)
    taken, count = set(right.values()), 0
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    best, of_kind = {}, []
    for i in sorted(range(len(rows)), key=lambda i: (-rows[i]["score"], rows[i]["image_id"], i)):
        if i in right or i in ignored:
            continue
        row = rows[i]
        here = [a for a in objects if a["image_id"] == row["image_id"]]
        found, about = kind_of(row, row["category_id"], here, iou)
        if about and about["id"] not in taken:
            best.setdefault(about["id"], i)
        if found == kind:
            of_kind.append((i, about))
    if kind == "missed":
        missed = [a for a in objects if a["id"] not in taken and a["id"] not in best]
        content["annotations"] = [a for a in content["annotations"] if a not in missed]
        return content, rows, len(missed)
    for i, about in of_kind:
        count += 1
        if about and best.get(about["id"]) == i:
            rows[i] |= {"category_id": about["category_id"], "bbox": about["bbox"]}
            if task == "segm":
                rows[i]["segmentation"] = about["rle"]
        else:
            rows[i] = None
    return content, [row for row in rows if row], count


@pytest.mark.parametrize("task", IOU_TYPES)
@pytest.mark.parametrize("seed", [2, 4])
def test_what_mending_gives_is_what_pycocotools_finds_in_mended_results(run, task, seed):
    content, rows = generated(task, seed, num_images=20)
    found = run(content, rows, score_threshold=0)

    def ap50(content, rows):
        precision = reference_of(content, rows, task).eval["precision"][0, :, :, 0, -1]
        return mean(precision)

    before = ap50(content, rows)
    for error in found.errors:
        *mended, count = mend(content, rows, task, error.kind)
        gain = ap50(*mended) - before
        assert error.delta_ap == pytest.approx(max(gain, 0), abs=1e-9), error.kind
        assert error.count == count
    assert all(error.count for error in found.errors)
    assert sum(error.delta_ap > 0.1 for error in found.errors) >= 5


def test_counts_at_a_threshold_are_those_of_the_results_above(run):
    content, rows = generated("bbox", 4)
    above = run(content, [row for row in rows if row["score"] >= 0.45], score_threshold=0)
    found, everything = (run(content, rows, score_threshold=s) for s in (0.45, 0))
    for key in ("true_positives", "false_positives", "ignored", "worst"):
        assert getattr(found, key) == getattr(above, key) != getattr(everything, key)
    assert [e.count for e in found.errors] == [e.count for e in above.errors]
    assert np.array_equal(found.confusion, above.confusion)
    assert [e.delta_ap for e in found.errors] == [e.delta_ap for e in everything.errors]


@pytest.mark.parametrize("task", IOU_TYPES)
def test_confusion_as_supervision_counts_it(run, task):
    content, rows = generated(task, 4, crowds=False, num_images=30)
    truth, predicted = [], []
    for image in content["images"]:
        for items, into in ((content["annotations"], truth), (rows, predicted)):
            items = [i for i in items if i["image_id"] == image["id"]]
            boxes = np.array([i["bbox"] for i in items]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            made = sv.Detections(
                boxes, class_id=np.array([i["category_id"] // 10 - 1 for i in items], int)
            )
            if into is predicted:
                made.confidence = np.array([i["score"] for i in items])
            if task == "segm":
                made.mask = np.array([decode(i["segmentation"]) for i in items], bool).reshape(
                    -1, 160, 200
                )
            into.append(made)
    names = [c["name"] for c in content["categories"]]
    target = MetricTarget.MASKS if task == "segm" else MetricTarget.BOXES
    theirs = sv.ConfusionMatrix.from_detections(predicted, truth, names, 0.35, 0.5, target)
    found = run(content, rows, score_threshold=0.35)
    assert found.confusion.tolist() == theirs.matrix.tolist()
    assert np.count_nonzero(found.confusion) > 12


def decode(mask):
    if isinstance(mask, list):
        mask = mask_util.merge(mask_util.frPyObjects(mask, 160, 200))
    return mask_util.decode(mask)


def test_calibration_as_a_loop_finds_it(run):
    content, rows = generated("bbox", 4)
    rng = np.random.default_rng(0)
    for row in rows:
        row["score"] = float(rng.choice([0, 0.1, 0.3, 1, *rng.random(8)]))
    found = run(content, rows)
    right, ignored = matched(content, rows, "bbox")
    error, number = 0, len(rows) - len(ignored)
    assert [b.low for b in found.calibration] == [i / 10 for i in range(10)]
    for bin_ in found.calibration:
        inside = [
            i
            for i, row in enumerate(rows)
            if i not in ignored
            and (bin_.low <= row["score"] < bin_.high or (bin_.high == row["score"] == 1))
        ]
        assert bin_.count == len(inside)
        if inside:
            precision = sum(i in right for i in inside) / len(inside)
            confidence = sum(rows[i]["score"] for i in inside) / len(inside)
            assert (bin_.precision, bin_.confidence) == pytest.approx((precision, confidence))
            error += len(inside) / number * abs(precision - confidence)
    assert found.calibration_error == pytest.approx(error) and error > 0.1
    # A part without results has no mean.
    few = run(content, [rows[0]]).calibration
    assert sum(math.isnan(b.precision) and math.isnan(b.confidence) for b in few) == 9


def test_worst_images_and_why(run):
    content, rows = planted({"right": 2}, low=0)
    assert run(content, rows).worst == []
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    more = [(2, (10, 10, 40, 38)), (2, (70, 70, 40, 40)), (3, (75, 70, 40, 40))]
    more += [(2, (30, 10, 40, 40)), (1, (15, 10, 40, 40)), (1, (12, 12, 60, 60))]
    for n, (category, box) in enumerate(more):
        rows.append({**rows[1], "category_id": category, "bbox": box, "score": 0.59 - n / 100})
    rows[0]["score"] = 0.4
    for item in content["annotations"] + rows:
        item["image_id"] = f"image {item['image_id']}"
    many, one = run(content, rows, iou_type="bbox").worst
    assert (many.image_id, many.file_name, many.missed, many.false) == (
        "image 2",
        "right_2.png",
        0,
        6,
    )
    assert many.reason == (
        "6 of 7 results false: 1 cat taken for dog, 1 dog where nothing is, 1 cow where nothing "
        "is, 3 more"
    )
    assert (one.image_id, one.missed, one.false) == ("image 1", 1, 0)
    assert one.reason == "1 of 1 objects not found: 1 cat"


def test_in_words_and_as_json(run):
    content, rows = planted()
    found = run(content, rows)
    text = found.text()
    assert (
        f"{len(rows)} results (segm) on {len(content['images'])} images" in text
        and "expected calibration error" in text
    )
    for error in found.errors:
        assert re.search(rf"^{error.kind} +{error.count} ", text, re.MULTILINE)
    shown = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert shown["confusion"] == found.confusion.tolist()
    assert shown["by_iou"]["0.5"] == found.scores["AP50"]
    assert shown["errors"][0]["kind"] == "classification"
    assert shown["scores"]["APl"] is None and math.isnan(found.scores["APl"])
    assert np.array(shown["curves"]["cat"]).shape == (2, 101)


def test_classes_of_one_name_are_told_apart(run):
    content, rows = planted()
    content["categories"][1]["name"] = "cat"
    found = run(content, rows)
    assert found.classes == [*found.curves] == ["cat (1)", "cat (2)", "cow"]


def test_boxes_or_masks(run, caplog):
    content, rows = planted()
    assert run(content, rows).iou_type == "segm" and not caplog.records
    del content["annotations"][0]["segmentation"]
    assert run(content, rows).iou_type == "bbox"
    (record,) = caplog.records
    assert "boxes are analyzed in place of masks: " in record.message
    with pytest.raises(DataError, match="annotation 1 .* has no segmentation"):
        run(content, rows, iou_type="segm")
    for row in rows[2:]:
        del row["segmentation"]
    assert run(content, rows).iou_type == "bbox"
    with pytest.raises(DataError, match=f"{len(rows) - 2} of {len(rows)} results have no mask"):
        run(content, rows, iou_type="segm")


def test_what_cannot_be_analyzed(run):
    content, rows = planted()
    with pytest.raises(DataError, match="results.json holds no results: the model found nothing"):
        run(content, [])
    with pytest.raises(
        DataError, match="the image_id 99 .a number., which .*dataset.json does not list"
    ):
        run(content, [*rows, {**rows[0], "image_id": 99}])
    with pytest.raises(DataError, match="empty list of annotations"):
        run(content | {"annotations": []}, rows)
    with pytest.raises(ConfigError, match="the score threshold is 50; it must be from 0 to 1"):
        run(content, rows, score_threshold=50)
    with pytest.raises(ConfigError, match="iou_type is 'keypoints'; known: bbox, segm"):
        run(content, rows, iou_type="keypoints")
    with pytest.raises(DataError, match="the image directory absent .* does not exist"):
        run(content, rows, image_root="absent")
    del content["annotations"]
    with pytest.raises(DataError, match="dataset.json has no annotations, which results"):
        run(content, rows)
