"""Every command that reads a dataset in COCO format."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from helpers import ROOT, TINY, CocoFiles, run_tool

import gn_detect

YAML = ("--config-file", ROOT / "configs/quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml")
OPTIONS = [*TINY, "MODEL.WEIGHTS", "", "GUARDS.FEW_IMAGES", "False", "SOLVER.MAX_ITER", "1"]
LAZY = """
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from gn_detect.data.coco import register_coco_json

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load(
    {quick!r}, ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)
register_coco_json("lazy_train", {train[0]!r}, {train[1]!r})
register_coco_json("lazy_val", {val[0]!r}, {val[1]!r})
dataloader.train.dataset.names, dataloader.test.dataset.names = "lazy_train", "lazy_val"
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
model.proposal_generator.post_nms_topk = (50, 20)
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=1,
        stride_per_block=[2 if stage else 1],
        in_channels=32 * stage or 64,
        out_channels=32 * (stage + 1),
        norm=model.backbone.norm,
    )
    for stage in range(4)
]
model.roi_heads.num_classes = 2
train.max_iter = 1
train.report = False
"""
QUICK = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")


def lazy_config(path: Path, train: CocoFiles, val: CocoFiles) -> Path:
    files = [[str(f.json_file), str(f.image_root)] for f in (train, val)]
    path.write_text(LAZY.format(quick=QUICK, train=files[0], val=files[1]))
    return path


def train_both(root: Path) -> SimpleNamespace:
    """Valid data, and the output directories of a training of each tool on it."""
    files = CocoFiles(root / "data")
    data = [*files.arguments("train"), *files.arguments("val")]
    run_tool("train_net.py", *YAML, *data, *OPTIONS, "OUTPUT_DIR", root / "yaml")
    tool = ("lazyconfig_train_net.py", "--config-file", lazy_config(root / "good.py", files, files))
    run_tool(*tool, f"train.output_dir={root / 'lazy'}")
    return SimpleNamespace(files=files, yaml=root / "yaml", lazy=root / "lazy")


def steps(good, files, path, other=None) -> dict[str, tuple]:
    """Every command that reads ``files``, with ``other`` (valid data if None) where it needs data
    for training and for validation; each writes to a directory of its own below ``path``."""
    for name in ("yaml", "lazy"):
        shutil.copytree(getattr(good, name), path / f"{name} resume")
    other = other or good.files
    train, val = path / "train.py", path / "val.py"
    lazy_config(train, files, other)
    lazy_config(val, other, files)

    def net(name, train, val, *options, flags=()):
        data = [*train.arguments("train"), *val.arguments("val")]
        output = ("OUTPUT_DIR", path / name)
        return ("train_net.py", *flags, *YAML, *data, *OPTIONS, *output, *options)

    def lazy(name, config, *options, flags=()):
        tool = ("lazyconfig_train_net.py", *flags, "--config-file", config)
        return (*tool, f"train.output_dir={path / name}", *options)

    score, resume = {"flags": ["--eval-only"]}, {"flags": ["--resume"]}
    weights, lazy_weights = (root / "model_final.pth" for root in (good.yaml, good.lazy))
    init = f"train.init_checkpoint={lazy_weights}"
    return {
        "train": net("train", files, other),
        "val": net("val", other, files),
        "eval": net("eval", other, files, "MODEL.WEIGHTS", weights, **score),
        "resume": net("yaml resume", files, other, "SOLVER.MAX_ITER", 2, **resume),
        "lazy train": lazy("lazy train", train),
        "lazy val": lazy("lazy val", val),
        "lazy eval": lazy("lazy eval", val, init, **score),
        "lazy resume": lazy("lazy resume", train, "train.max_iter=2", **resume),
        "analysis": (
            *("analyze.py", "--json", files.json_file, "--images", files.image_root),
            *("--results", good.yaml / "inference/coco_instances_results.json"),
            *("--output", path / "analysis"),
        ),
    }


def exactly_the_truth(self, images, detected_instances=None, do_postprocess=True):
    """In place of a model's detections: the objects of ``CocoFiles``."""
    found = []
    for image in images:
        instances = Instances((64, 64))
        instances.pred_boxes = Boxes(torch.tensor([[8.0, 8, 32, 32]]))
        instances.scores = torch.ones(1)
        instances.pred_classes = torch.tensor([int(image["file_name"].endswith("2.png"))])
        instances.pred_masks = torch.ones(1, 1, 28, 28)
        found.append(instances)
    if not do_postprocess:
        return found
    return GeneralizedRCNN._postprocess(found, images, [(64, 64)] * len(images))
