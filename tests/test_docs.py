"""What README.md and docs/ say holds: commands run, links lead somewhere, tables are of today."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
import shutil
import string
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from helpers import CONFIGS, ROOT, TINY, CocoFiles, as_shipped, coco_json, config, run_tool
from omegaconf import OmegaConf

from gn_detect import get_config_file
from gn_detect.checkpoint import Checkpointer, WeightGuards, sources
from gn_detect.config import load_config, locate
from gn_detect.data import shapes
from gn_detect.data.classes import write_classes
from gn_detect.engine.lazy_config import load_lazy_config

pytestmark = pytest.mark.slow

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PHOTOS = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
GUARDS = re.findall(
    r"^\| `(\w+)`( \(warns\))? \| `(.+?)`(?: after `(.+?)`)? \|",
    (ROOT / "docs/small_batches.md").read_text(),
    flags=re.MULTILINE,
)


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [text for name, text in fenced if name == language]


def shell_lines(page: str) -> list[list[str]]:
    """The words of each command in a page, with the variables that the page sets."""
    commands, variables = [], {}
    for line in "".join(blocks(page, "")).replace("\\\n", " ").splitlines():
        if assignment := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            variables[assignment[1]] = assignment[2]
        elif words := shlex.split(string.Template(line).substitute(variables), comments=True):
            commands.append(words)
    return commands


def with_options(args: list[str], before: list, after: list) -> list[str]:
    """Put options in front of the KEY VALUE of a command, which win over them, and behind."""
    keys = (i for i, arg in enumerate(args) if re.fullmatch(r"[A-Z][A-Z_.\d]+\.[A-Z_]+", arg))
    start = next(keys, len(args))
    return [*args[:start], *map(str, before), *args[start:], *map(str, after)]


@pytest.fixture(scope="module")
def downloads():
    """The detectors that configs/finetune/ starts from, smaller, where downloads are kept."""
    starts = {as_shipped(n).MODEL.WEIGHTS: n for n in CONFIGS if re.match("finetune/mask.*coco", n)}
    for weights, name in starts.items():
        model = weights.removeprefix("detectron://")
        path = Path(sources._cached(weights if model == weights else sources._detectron(model)))
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg = config(name, *TINY)
        loader = Checkpointer(build_model(cfg), guards=WeightGuards.from_config(cfg))
        content = {"model": loader.model.state_dict(), "origin": dataclasses.asdict(loader.origin)}
        torch.save(content, path)


@pytest.fixture
def user(tmp_path, monkeypatch, downloads):
    """The directory of a user, with a checkout, photos, COCO, and the weights that pages name."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    files = CocoFiles(tmp_path)
    for name in ("train.json", "val.json"):
        shutil.copy(files.json_file, name)
    shutil.copy("images/1.png", "photo.jpg")
    for name in ("train_images", "DIR"):
        Path(name).symlink_to("images")
    content = coco_json(1) | {"categories": [c for c in COCO_CATEGORIES if c["isthing"]]}
    content["annotations"][0]["category_id"] = 1
    for split in ("train", "val"):
        path = Path(f"datasets/coco/annotations/instances_{split}2017.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        path.parents[1].joinpath(f"{split}2017").symlink_to(tmp_path / "images")
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        path = Path("datasets/imagenet", folder)
        path.mkdir(parents=True)
        shutil.copy("photo.jpg", path)
    few = functools.partial(shapes.write_shapes, num_train=8, num_val=2)
    monkeypatch.setattr(shapes, "write_shapes", few)
    few = functools.partial(write_classes, num_train=10, num_val=10)
    monkeypatch.setattr("gn_detect.data.classes.write_classes", few)
    Path("GN.yaml").write_text(f"_BASE_: configs/{PHOTOS}\n")
    Path("output/quickstart").mkdir(parents=True)
    for folder, name, norm in (("output/quickstart", "model_final", "GN"), (".", "bn", "BN")):
        classes = {"classes": ["ellipse", "triangle", "cross"]}
        options = ("MODEL.RESNETS.NORM", norm, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
        cfg = config(PHOTOS, *TINY, *options)
        saved = {"guards": WeightGuards.from_config(cfg), "config": cfg.dump(), "names": classes}
        Checkpointer(build_model(cfg), str(tmp_path / folder), **saved).save(name)
    for folder in ("resnet_18_gn", "classes"):  # a detector will do
        Path("output", folder).mkdir()
        shutil.copy("output/quickstart/model_final.pth", f"output/{folder}")
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if shell_lines(page) and page != "docs/benchmarks.md"]
)
def test_commands(page, user, monkeypatch):
    """Own data is trained on, for an iteration; for COCO all is checked that comes before that."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *args in shell_lines(page):
        if program == "make":
            assert args[0] in targets
        if program in ("make", "export", "python3", ".venv/bin/pip"):  # what they install is there
            continue
        assert program == "python"
        path, *args = args
        tool = path.removeprefix("tools/")
        with monkeypatch.context() as patch:
            if any(arg.startswith(("configs/COCO-", "configs/tensorpack/")) for arg in args):
                patch.setattr("detectron2.engine.default_setup", end)
            elif any(arg.startswith("configs/lazy/") for arg in args):
                patch.setattr("gn_detect.engine.launch.launch", load_lazy)
            elif tool in ("compare_norms.py", "compare_libraries.py"):
                args.append("--report")  # their own tests train
                told = dict(itertools.pairwise(args))
                run = f"gn_detect-{told.get('--minutes')}min-seed0"
                run = Path(told["--output"], Path(told.get("--data", "")).name, run)
                run.mkdir(parents=True, exist_ok=True)  # one that was begun
            elif tool in ("train_net.py", "bn_to_gn.py"):
                length = ("EPOCHS", 0.01) if "SOLVER.EPOCHS" in args else ("MAX_ITER", 1)
                args = with_options(args, TINY, [f"SOLVER.{length[0]}", length[1]])
            run_tool(tool, *args)
    for block in blocks(page, "python"):
        exec(block, {})


def test_what_commands_type_holds(user, monkeypatch):
    """In the config of the run, as on a machine with CUDA."""
    held = []

    def check(cfg, args):
        if isinstance(cfg, CfgNode):
            typed = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
            told = load_config("", [word for pair in typed.items() for word in pair])
            for key in typed:
                (node, name), (theirs, _) = locate(cfg, key), locate(told, key)
                assert theirs[name] in (node[name], "auto"), key
            held.extend(typed)
        else:
            for key, _, text in (override.partition("=") for override in args.opts):
                assert str(OmegaConf.select(cfg, key)) == text
                held.append(key)
        raise SystemExit(0)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**35, 2**35))
    monkeypatch.setattr("detectron2.engine.default_setup", check)
    monkeypatch.setattr("gn_detect.engine.launch._start", lambda main, args: main(args))
    for name in ("check_recipe", "describe_data"):  # which take long, and derive nothing
        monkeypatch.setattr(f"gn_detect.engine.prepare.{name}", lambda *_, **__: None)
    Path("output/run.pth").touch()
    Path("output/mine").mkdir()
    mine = load_config(get_config_file("finetune/mask_rcnn_R_50_FPN_gn_coco.yaml"))
    Path("output/mine/config.yaml").write_text(mine.dump())  # also of another command
    for path, *args in [words[1:] for page in PAGES for words in shell_lines(page) if words[1:]]:
        if path in ("tools/train_net.py", "tools/lazyconfig_train_net.py"):
            weights = [i for i, arg in enumerate(args) if arg == "MODEL.WEIGHTS"]
            for i in weights:  # of another command
                args[i + 1] = "output/run.pth"
            run_tool(path.removeprefix("tools/"), *args)
    assert {"SOLVER.IMS_PER_GPU", "SOLVER.MAX_ITER", "train.amp.enabled"} <= set(held)


def end(*_) -> None:
    """In place of what follows the preparation of a run."""
    raise SystemExit(0)


def load_lazy(main, args) -> None:
    """In place of the run."""
    load_lazy_config(args.config_file, args.opts)


def test_links():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), (page, link)
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
            # As GitHub makes them: lower case, no punctuation, hyphens for spaces.
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, (page, link)


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 130 and len(text) <= 10 * 1024
    missing = [p for p in PAGES if p.startswith("docs/") and p.encode() not in text]
    assert missing == []


def test_every_guard_has_a_command():
    assert {guard[0] for guard in GUARDS} == set(config().GUARDS)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory in which the commands run; they share the generated data."""
    directory = tmp_path_factory.mktemp("docs")
    files = CocoFiles(directory / "xyxy")
    for annotation in files.content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]
    files.write()
    files = CocoFiles(directory / "names")
    for image in files.content["images"]:
        image["file_name"] = f"C:\\data\\{image['file_name'].upper()}"
    files.write()
    files = CocoFiles(directory / "animals")
    files.content["categories"].append({"id": 9, "name": "cow"})
    files.write()
    return directory


@pytest.mark.parametrize("switch, warns, options, before", GUARDS, ids=[g[0] for g in GUARDS])
def test_guards(switch, warns, options, before, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    few = functools.partial(shapes.write_shapes, num_train=8, num_val=2)
    monkeypatch.setattr(shapes, "write_shapes", few)
    (name, *opts), earlier = shlex.split(options), shlex.split(before)
    if earlier and not Path(earlier[-1]).is_dir():
        earlier = ["--config-file", ROOT / "configs" / earlier[0], *earlier[1:]]
        earlier += ["DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 0]
        run_tool("train_net.py", *earlier)
    if not earlier:  # weights are looked at when they are loaded; all else before
        monkeypatch.setattr("detectron2.engine.default_setup", end)
    arguments = ("--config-file", ROOT / "configs" / name, *opts)
    result = run_tool("train_net.py", *arguments, check=False)
    assert f"GUARDS.{switch} False" in (result.stdout if warns else result.stderr)
    assert bool(result.returncode) != bool(warns)
