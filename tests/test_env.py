"""A stock Detectron2 script, which has never heard of gn_detect, and our YAML."""

import json
import os
import subprocess
import sys

from helpers import ROOT, TINY

STOCK_SCRIPT = """
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    register_coco_instances("own", {}, "data/annotations.json", "data/images")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args=(args,))
"""


def test_stock_script_trains_our_config(coco_files, tmp_path):
    assert "gn_detect" not in STOCK_SCRIPT
    (tmp_path / "script.py").write_text(STOCK_SCRIPT)
    config = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml"
    options = [
        *(*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", "('own',)"),
        *("DATASETS.TEST", "('own',)", "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2),
        *("MODEL.GN.NUM_GROUPS", 16, "OUTPUT_DIR", tmp_path / "output"),
    ]

    def run(environment):
        return subprocess.run(
            [sys.executable, "script.py", "--config-file", str(config), *map(str, options)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **environment},
            capture_output=True,
            text=True,
        )

    without = run({"DETECTRON2_ENV_MODULE": ""})
    assert without.returncode and "Non-existent key: MODEL.GN" in without.stderr + without.stdout

    result = run({"DETECTRON2_ENV_MODULE": "gn_detect.env"})
    assert result.returncode == 0, result.stderr
    assert "GroupNorm(16, 64" in result.stdout
    last = json.loads((tmp_path / "output/metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 2 and "segm/AP" in last
    assert (tmp_path / "output/model_final.pth").is_file()


def test_hook_and_import_work_in_either_order():
    code = """
import {first}, {second}
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
assert get_cfg().MODEL.GN.NUM_GROUPS == 32
assert "build_gn_resnet_fpn_backbone" in BACKBONE_REGISTRY
import gn_detect, detectron2
assert gn_detect.detectron2 is detectron2 and detectron2.__version__
"""
    for first, second in (("gn_detect", "detectron2"), ("detectron2", "gn_detect")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(first=first, second=second)],
            env={**os.environ, "DETECTRON2_ENV_MODULE": "gn_detect.env", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
