"""A tiny detector, not trained, as a run saves it."""

from detectron2.modeling import build_model
from helpers import randomize

from gn_detect.checkpoint import Checkpointer, WeightGuards

NAMES = ["dog", "cat"]
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"


def save(directory, cfg, **names):
    model = randomize(build_model(cfg))
    guards = WeightGuards.from_config(cfg)
    Checkpointer(model, str(directory), guards=guards, config=cfg.dump(), names=names).save(
        "model_final"
    )
    return directory / "model_final.safetensors"
