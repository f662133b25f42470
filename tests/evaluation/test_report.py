"""The page of a run: one file, with the numbers of the analysis; what a user names is text."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import config
from PIL import Image

from gn_detect.evaluation.analysis import Analysis, Bin, ClassScores, ErrorKind, WorstImage
from gn_detect.evaluation.report import MAX_CLASSES, TestSet, write_report
from gn_detect.evaluation.run_facts import RunFacts, metric_name, read_run
from gn_detect.settings import Settings

NAN = math.nan
EVIL = "<script>alert('class')</script>"
EVIL_FILE = '"><img src="http://example.com/x.png" onerror="alert(1)">.jpg'
VOID = {"meta", "img", "br", "link", "input", "hr", "use", "path"}


class Page(HTMLParser):
    """What a browser would make of a file: elements, ids, texts by element, and rows of tables."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.rows, self.open = [], {}, [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.texts.setdefault(tag, [])
        if tag in ("title", "h1", "h2", "h3", "figcaption", "summary", "style", "li", "dd", "pre"):
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            if self.texts[tag]:
                self.texts[tag][-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, first):
        """Of the first table that has it."""
        return next(row[1:] for row in self.rows if row and row[0] == first)


def picture():
    Image.new("RGB", (8, 6), "red").save(file := io.BytesIO(), "WebP")
    return file.getvalue()


def analysis(names=("cat", EVIL), **changed):
    number, recall = len(names), np.linspace(0, 1, 101)
    confusion = np.arange((number + 1) ** 2, dtype=np.int64).reshape(number + 1, -1) * 1000
    confusion[-1, -1] = 0
    per_class = [
        ClassScores(name, 10 * i, *(value if i else NAN for value in 11.04 * i + np.arange(10)))
        for i, name in enumerate(names)
    ]
    fields = {
        "iou_type": "segm",
        **{"num_images": 4321, "num_objects": 98765, "num_results": 123456},
        **{"score_threshold": 0.5, "true_positives": 7, "false_positives": 8, "ignored": 0},
        "classes": list(names),
        "scores": dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 31.26)
        | dict.fromkeys(("AR1", "AR10", "AR100", "ARs", "ARm"), 41.5)
        | {"APl": NAN, "ARl": NAN},
        "per_class": per_class,
        "by_iou": {0.5 + i / 20: 90 - 9 * i for i in range(10)},
        "recall_by_iou": {0.5 + i / 20: 95 - 9 * i for i in range(10)},
        "curve": np.stack([1 - recall, np.zeros(101)]),
        "curves": {
            n: np.stack([1 - recall, recall]) if i else np.full((2, 101), NAN)
            for i, n in enumerate(names)
        },
        "confusion": confusion,
        "errors": [ErrorKind("classification", 3, 0.75, 4.24), ErrorKind("missed", 1, 0.25, NAN)],
        "worst": [WorstImage(1, EVIL_FILE, 2, 3, f"2 {EVIL} not found")],
        "calibration": [Bin(i / 10, (i + 1) / 10, NAN, NAN, 0) for i in range(9)]
        + [Bin(0.9, 1.0, 0.95, 0.5, 20)],
        "calibration_error": 0.45,
    }
    return Analysis(**fields | changed)


CURVES = {
    "total_loss": ([0, 1, 2], [3.0, NAN, 1.0]),
    "loss_cls": ([0, 1, 2], [1.0, 1.0, 0.5]),
    "lr": ([0, 1, 2], [0.01, 0.02, 0.02]),
    "bbox/AP": ([1, 3], [12.34, 9.87]),
    "bbox/AP50": ([1, 3], [25.0, 26.54]),
    "bbox/APl": ([1, 3], [NAN, NAN]),
}
RUN = RunFacts(
    curves=CURVES,
    max_iter=3,
    best=("box AP", 2),
    schedule=[("learning rate", "0.02")],
    environment=[("command", f"train.py {EVIL}")],
    data=[(EVIL, f"of {EVIL}")],
    config=f"A: {EVIL}\n",
    notes=[f"No {EVIL}."],
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    test = TestSet("val", analysis(), [(EVIL_FILE, picture())])
    assert write_report(path, title=f"run {EVIL}", tests=[test], run=RUN) == path
    return path


@pytest.fixture(scope="module")
def page(path):
    return Page(path)


def test_page_loads_nothing(page, path):
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    sources = [a[k] for _, a in page.elements for k in ("src", "href", "srcset", "data") if k in a]
    assert sources and all(s.startswith(("data:image/", "#")) for s in sources)
    style = "".join(page.texts["style"]) + "".join(a.get("style") or "" for _, a in page.elements)
    assert not re.search(r"@import|url\((?!#)", style)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}


def test_what_users_name_is_text(page):
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert page.texts["h1"] == [f"run {EVIL}"] and page.texts["title"] == [f"run {EVIL}"]
    (image,) = page.of("img")
    assert image["alt"] == EVIL_FILE and page.texts["figcaption"][-1] == EVIL_FILE
    assert image["src"] == f"data:image/webp;base64,{base64.b64encode(picture()).decode()}"
    assert f"2 {EVIL} not found" in next(r[0] for r in page.rows if r and EVIL_FILE in r[0])
    assert f"No {EVIL}." in page.texts["li"] and f"A: {EVIL}\n" in page.texts["pre"]
    assert f"train.py {EVIL}" in page.texts["dd"]


def test_page_has_an_outline(page):
    assert page.open == []  # every element is closed
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.of("a") + page.of("use")}
    assert targets and targets <= set(ids)
    assert page.texts["h2"] == [
        *("Scores", "Training", "Where it errs: val", "Pictures: val"),
        *("Schedule", "Training data", "Environment", "Config"),
    ]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    assert "prefers-color-scheme: dark" in page.texts["style"][0]
    figures = [a for a in page.of("figure") if "aria-label" in a]
    assert len(page.of("svg")) == len(figures) == 6


def test_figures_take_colors_from_the_page(page):
    """So that they are readable in both themes; and no text of theirs is a user's."""
    svg = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    colors = set(re.findall(r"(?:fill|stroke|color): *([^;\"']+)", "".join(svg)))
    assert colors <= {"none", "currentColor", "var(--line)"} | {f"var(--c{i})" for i in range(8)}
    assert {"var(--c0)", "currentColor"} <= colors
    assert not any(
        "script" in drawn or "#" in re.sub(r"#[mp][0-9a-f]{8,}", "", drawn) for drawn in svg
    )


def test_numbers_are_those_of_the_analysis(page):
    a = analysis()
    for c in a.per_class:
        values = (c.ap, c.ap50, c.ap75, c.ar, c.ap_small, c.ap_medium, c.ap_large)
        expected = ["–" if v != v else f"{v:.1f}" for v in values]
        assert page.row(c.name) == [f"{c.objects:,}", *expected]
    assert page.row("cat") == ["0", *["–"] * 7]
    assert page.row("all") == ["98,765", "31.3", "31.3", "31.3", "41.5", "31.3", "31.3", "–"]
    (kind,) = (row[1:] for row in page.rows if row and row[0].startswith("classification"))
    assert kind == ["3", "75 %", "4.2"]
    matrix = page.rows.index(["object", "cat", EVIL, "background"])
    shown = [row[1:] for row in page.rows[matrix + 1 : matrix + 4]]
    assert shown == [["0", "1,000", "2,000"], ["3,000", "4,000", "5,000"], ["6,000", "7,000", ""]]
    found = "\n".join(page.texts["li"])
    assert f"{EVIL} is taken for cat, 3,000 of 12,000 times" in found
    assert "Classification errors cost most" in found and "AP50 would be 4.2 higher" in found
    assert "Scores are too high on average, by 0.45" in found


def test_what_stands_out_is_what_the_tables_show(tmp_path):
    """Also of a detector whose scores are all low: what costs most is then not what is counted."""
    kinds = [ErrorKind("missed", 9, 1.0, 0.0), ErrorKind("localization", 0, 0.0, 6.6)]
    same = analysis(
        errors=kinds,
        per_class=[ClassScores(name, 1, *[0.0] * 10) for name in ("cat", "dog")],
        scores=dict.fromkeys(analysis().scores, 0.0),
    )
    found = Page(write_report(tmp_path / "a.html", title="t", tests=[TestSet("", same)])).texts[
        "li"
    ]
    assert found[0] == (
        "Localization errors cost most: the right class, but IoU between 0.1 and 0.5. Without them "
        "AP50 would be 6.6 higher."
    )
    assert "lowest" not in "".join(found)  # all are equal


def test_evaluations_and_the_best_of_them(page):
    assert page.row("2") == ["12.3"] and page.row("3") == ["9.9"]  # after so many iterations
    cards = re.findall(r'class="card score[^"]*"><b>(.*?)</b><span>(.*?)</span>', page.source)
    assert cards[:2] == [("9.9", "box AP"), ("26.5", "box AP50")]
    assert cards[2] == ("2", "iteration of the best of 2 evaluations, by box AP")


@pytest.mark.parametrize(
    "key, name",
    [
        ("bbox/AP", "box AP"),
        ("ema/photos/segm/AP", "photos: mask AP (EMA)"),
        ("segm_TTA/AP", "mask AP (TTA)"),
        ("photos_TTA/bbox/AP", "photos: box AP (TTA)"),
        ("bbox_TTA/AP50", ""),
        ("lr", ""),
    ],
)
def test_what_metrics_are_called(key, name):
    assert metric_name(key) == name


def test_what_there_is_is_shown(tmp_path):
    page = Page(write_report(tmp_path / "a.html", title="t"))
    assert page.texts["h1"] == ["t"] and "h2" not in page.texts
    kinds = [ErrorKind("missed", 0, NAN, NAN)]
    nothing = analysis(
        **{"per_class": [], "classes": [], "curves": {}, "confusion": np.zeros((1, 1), np.int64)},
        **{"errors": kinds, "worst": [], "scores": dict.fromkeys(analysis().scores, NAN)},
        **{"calibration": [], "calibration_error": NAN, "curve": np.full((2, 101), NAN)},
    )
    page = Page(write_report(tmp_path / "b.html", title="t", tests=[TestSet("", nothing)]))
    assert page.texts["h2"] == ["Scores", "Where it errs"]
    assert page.row("all")[1:] == ["–"] * 7
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page.source, flags=re.DOTALL)


def test_several_test_sets_and_many_classes(tmp_path):
    names = [f"class {i}" for i in range(100)]
    tests = [TestSet("one", analysis(["a"])), TestSet("many", analysis(names, worst=[]))]
    page = Page(write_report(tmp_path / "a.html", title="t", tests=tests))
    assert "Where it errs: one" in page.texts["h2"] and "Where it errs: many" in page.texts["h2"]
    assert "one: mask AP" in page.source and "many: mask AP" in page.source
    matrix = next(row for row in page.rows if "class 99" in row and row[0] == "object")
    assert len(matrix) == MAX_CLASSES + 2
    assert f"{100 - MAX_CLASSES} others are left out" in page.source
    assert len(page.source) < 500_000


LOG = """\
[01/02 10:00:00] gn_detect.engine.describe_data INFO: data of mine: a.json: 3 images
old
[01/02 10:00:01] detectron2 INFO: Environment info:
-------  -------
Python   1.0
-------  -------
[01/02 11:00:00] gn_detect.engine.describe_data INFO: data of mine: b.json: 4 images

class    objects
-----  ---------
cat            4
[01/02 11:00:01] detectron2 INFO: Environment info:
---------------  ------------------------
sys.platform     linux
Python           3.11.7 (main) [GCC 12]
PyTorch          2.14 @/usr/lib/torch
GPU available    Yes
GPU 0            NVIDIA H100
---------------  ------------------------
PyTorch built with:
  - GCC 13.3
[01/02 11:00:02] d2.utils.events INFO:  eta: 0  \x1b[32miter: 19\x1b[0m  max_mem: 1234M
[01/02 11:00:03] d2.engine.hooks INFO: Overall training speed: 18 iterations in 0:00:09 (0.5 s / it)
[01/02 11:00:03] d2.engine.hooks INFO: Total training time: 0:00:10 (0:00:01 on hooks)
"""


def test_run_is_read_from_its_files(tmp_path):
    cfg = config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", "SOLVER.MAX_ITER", 20)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "log.txt").write_text(LOG)
    rows = [{"iteration": 9, "total_loss": 2.0}, {"iteration": 20, "bbox/AP": 1.5, "lr": 0.1}]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = read_run(tmp_path, Settings(cfg))
    assert facts.notes == []
    assert facts.evaluations() == [(20, {"bbox/AP": 1.5})]  # not after 21
    expected = {
        **{"iterations": "20", "images per iteration": "2", "learning rate": "0.02"},
        **{"trained on": "shapes_train", "evaluated on": "shapes_val", "precision": "float32"},
        **{"took, since its last start": "0:00:10", "GPU memory, at most, MB": "1234"},
        **{"seconds per iteration": "0.5", "started from": "random weights"},
    }
    assert expected.items() <= dict(facts.schedule).items()
    early = "ended early, after iteration"
    assert early not in dict(facts.schedule)
    with open(tmp_path / "log.txt", "a") as file:
        file.write("gn_detect.engine.hooks INFO: the run ends early, after iteration 10 of 20: x")
    assert dict(read_run(tmp_path, Settings(cfg)).schedule)[early] == "10"
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 19, "total_loss": 1.0}\n')  # it was resumed
    assert early not in dict(read_run(tmp_path, Settings(cfg)).schedule)
    ((name, text),) = facts.data
    assert name == "mine" and text.splitlines()[0] == "b.json: 4 images" and "cat" in text
    assert facts.environment == [
        *(("Python", "3.11.7 (main) [GCC 12]"), ("PyTorch", "2.14"), ("GPU available", "Yes")),
        ("GPU 0", "NVIDIA H100"),
    ]
    evaluated = read_run(tmp_path, Settings(cfg), training=False)
    assert not evaluated.curves and not evaluated.schedule and not evaluated.data
    assert evaluated.config == cfg.dump() and evaluated.environment == facts.environment


def test_files_that_are_not_there_are_named(tmp_path):
    facts = read_run(tmp_path, Settings(config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml")))
    assert len(facts.notes) == 3
    for name in ("config.yaml", "log.txt", "metrics.json"):
        assert sum(name in note for note in facts.notes) == 1
