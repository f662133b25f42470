"""Small configs and data for the tests."""

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils import logger as detectron2_logger
from PIL import Image

import gn_detect
from gn_detect.config import load_config

ROOT = Path(__file__).resolve().parents[1]
# Real photos, not part of the project: tests that use them are skipped where they are absent.
SHARED_DATA = ROOT.parent / "shared" / "data"

# The YAML configs that ship, as paths below configs/.
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if not path.name.startswith("Base-")
)


@functools.cache
def as_shipped(name: str):
    """One of ``CONFIGS``, for looking at."""
    return load_config(gn_detect.get_config_file(name))


def config(name: str = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml", *opts):
    """A config that ships with gn_detect, on the CPU, without weights, for COCO's 80 classes and 17
    keypoints."""
    base = [
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.RETINANET.NUM_CLASSES", 80),
        *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17),
    ]
    return load_config(gn_detect.get_config_file(name), [*base, *opts])


# Sizes of a ``State`` of the references of foreign detectors, and their keys.
SMALL = {"width": 8, "channels": 16, "fc": 32, "classes": 5}
SMALL_CONFIG = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.GN.NUM_GROUPS", 4),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 5),
]
# A Mask R-CNN of 0.6 M parameters, which trains an iteration on a CPU in a moment.
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.GN.NUM_GROUPS", "4", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TRAIN", "96"),
    *("INPUT.MAX_SIZE_TEST", "96", "SOLVER.WARMUP_ITERS", "2", "SEED", "3"),
    *("TEST.REPORT", "False"),
]


def run_tool(name: str, *args, check=True) -> subprocess.CompletedProcess:
    """Run ``tools/<name>`` as a user would, but in this process: imports take seconds."""
    named = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    before = {x: (x.handlers[:], x.propagate, x.level) for x in named}
    # So that the tool sets its loggers up anew, for these streams.
    detectron2_logger.setup_logger.cache_clear()
    detectron2_logger._cached_log_stream.cache_clear()
    out, err, code = io.StringIO(), io.StringIO(), None
    arguments = [str(ROOT / "tools" / name), *map(str, args)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch("sys.argv", arguments))
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as error:
            code = error.code
        finally:
            for logger in logging.root.manager.loggerDict.values():
                if isinstance(logger, logging.Logger):
                    state = before.get(logger, ([], True, logging.NOTSET))
                    logger.handlers[:], logger.propagate, level = state
                    logger.setLevel(level)
    if isinstance(code, str):  # as the interpreter does
        err.write(f"{code}\n")
        code = 1
    shown = out.getvalue(), err.getvalue()
    return _finished(subprocess.CompletedProcess(arguments, code or 0, *shown), check)


def refusal(name: str, *args) -> str:
    """The sentence, alone, with which ``tools/<name>`` ends."""
    result = run_tool(name, *args, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.count("error: ") == 1
    return result.stderr.splitlines()[-1]


def run_script(source: str, cwd: Path) -> None:
    """Run a script in a process of its own, which may start others."""
    (cwd / "script.py").write_text(source)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "script.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
    )
    _finished(result, check=True)


def _finished(result: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    if check and result.returncode:
        raise AssertionError(f"exit {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def coco_json(num_images: int = 3, size: int = 64) -> dict:
    """The content of a COCO JSON of two classes with ids 3 and 7; one square in each image."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": size, "width": size}
        for i in range(1, num_images + 1)
    ]
    annotations = [
        {
            "id": i * 10,
            "image_id": i,
            "category_id": 3 if i % 2 else 7,
            "bbox": [8, 8, 24, 24],
            "area": 576,
            "iscrowd": 0,
            "segmentation": [[8, 8, 32, 8, 32, 32, 8, 32]],
        }
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


# The square of coco_json as an uncompressed RLE.
SQUARE_RLE = {"size": [64, 64], "counts": [8 * 64 + 8, *[24, 40] * 23, 24, 32 * 64 + 32]}


class CocoFiles:
    def __init__(self, root: Path):
        self.json_file, self.image_root = root / "annotations.json", root / "images"
        self.image_root.mkdir(parents=True)
        self.content = coco_json()
        rng = np.random.default_rng(0)
        for image in self.content["images"]:
            pixels = rng.integers(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.image_root / image["file_name"])
        self.write()

    def write(self) -> None:
        self.json_file.write_text(json.dumps(self.content))

    def damage(self, name: str) -> None:
        """Let an image be whole for all that its header and its end tell."""
        path = self.image_root / name
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes(len(content) - 200) + content[-100:])

    def arguments(self, split: str = "train") -> list[str]:
        return [f"--{split}-json", str(self.json_file), f"--{split}-images", str(self.image_root)]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give gamma and beta of all norms values that matter; others have them from the start."""
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    return model


def training_image(height=64, width=96):
    """An image of two objects, with every kind of ground truth."""
    generator = torch.Generator().manual_seed(0)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 6, 40, 50], [20, 20, 60, 60]]))
    instances.gt_classes = torch.tensor([0, 0])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 6:50, 4:40] = masks[1, 30:60, 20:50] = True
    instances.gt_masks = BitMasks(masks)
    points = torch.rand(2, 17, 2, generator=generator) * 20 + 20  # in both boxes
    instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 17, 1), 2.0)], 2))
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    sem_seg = torch.randint(0, 54, (height, width), generator=generator)
    return {
        "image": image,
        "instances": instances,
        "sem_seg": sem_seg,
        "height": height,
        "width": width,
    }


def weights(trainer) -> dict[str, torch.Tensor]:
    """A copy of the weights of a trainer."""
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    different = [key for key, value in expected.items() if not torch.equal(actual[key], value)]
    assert not different


def differences(actual, expected, at="") -> list[str]:
    """Where two nested contents of checkpoints differ, in a bit."""
    if isinstance(expected, dict):
        keys = [f"{at}: {k}" for k in actual.keys() ^ expected.keys()]
        both = actual.keys() & expected.keys()
        return keys + [d for k in both for d in differences(actual[k], expected[k], f"{at}.{k}")]
    if isinstance(expected, list) and len(actual) == len(expected):
        pairs = enumerate(zip(actual, expected, strict=True))
        return [d for i, (a, e) in pairs for d in differences(a, e, f"{at}[{i}]")]
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(actual, expected) else [at]
    nans = expected != expected and actual != actual
    return [] if nans or actual == expected else [f"{at}: {actual!s:.80}, not {expected!s:.80}"]


def record_images(trainer) -> list[list[str]]:
    """The image files of each forward pass in training, from now on."""
    seen = []

    def record(model, inputs):
        if model.training:
            seen.append([image["file_name"] for image in inputs[0]])

    trainer.model.register_forward_pre_hook(record)
    return seen


def stream(trainer, start: int, stop: int) -> list[str]:
    """The image files of a training, from ``start`` on, as Detectron2 draws them."""
    files = [image["file_name"] for image in DatasetCatalog.get("own")]
    drawn = trainer.data_loader.dataset.sampler.state_dict()["drawn"]
    indices = TrainingSampler(len(files), seed=drawn["_seed"])
    return [files[i] for i in itertools.islice(indices, start, stop)]
