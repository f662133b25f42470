"""A stock Detectron2 script, which has never heard of gn_detect, and our YAML."""

import collections
import json
import logging
import os
import subprocess
import sys

import pytest
from detectron2.config import get_cfg
from helpers import ROOT, TINY, config

from gn_detect import env
from gn_detect.modeling.norm import norm_from_config

pytestmark = pytest.mark.slow

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
GN = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml"
IGNORED = "INPUT.LSJ.ENABLED True, SOLVER.IMS_PER_GPU 4, SOLVER.ACCUMULATE_STEPS 2"
IGNORED += ", TEST.COCO_EVAL fast"


def run_hooked(*args, cwd) -> subprocess.CompletedProcess:
    environment = {"DETECTRON2_ENV_MODULE": "gn_detect.env", "OMP_NUM_THREADS": "2"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_stock_script_trains_our_config(coco_files, tmp_path):
    assert "gn_detect" not in STOCK_SCRIPT
    assert "GN" not in get_cfg().MODEL  # without the hook, our keys are unknown
    (tmp_path / "script.py").write_text(STOCK_SCRIPT)
    result = run_hooked(
        *("script.py", "--config-file", ROOT / "configs" / GN, *TINY),
        *("DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", "SOLVER.IMS_PER_BATCH", 1),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 2),
        *("SOLVER.MAX_ITER", 2, "MODEL.GN.NUM_GROUPS", 8, "OUTPUT_DIR", tmp_path / "output"),
        *("INPUT.LSJ.ENABLED", True, "SOLVER.IMS_PER_GPU", 4, "SOLVER.ACCUMULATE_STEPS", 2),
        *("TEST.COCO_EVAL", "fast"),
        cwd=tmp_path,
    )
    assert "GroupNorm(8, " in result.stdout
    last = json.loads((tmp_path / "output/metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 2 and "segm/AP" in last
    assert (tmp_path / "output/model_final.pth").is_file()
    assert (result.stdout + result.stderr).count(f"{IGNORED}: Detectron2's own trainer") == 1


def test_hook_works_when_gn_detect_comes_first(tmp_path):
    code = """
import gn_detect, detectron2
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
assert get_cfg().MODEL.GN.NUM_GROUPS == 32
assert "build_gn_resnet_fpn_backbone" in BACKBONE_REGISTRY
assert gn_detect.detectron2 is detectron2 and detectron2.__version__
"""
    run_hooked("-c", code, cwd=tmp_path)


@pytest.mark.parametrize(
    "hooked, ours, options, warned",
    [
        (True, False, ["SOLVER.AMP.DTYPE", "bfloat16"], True),
        (True, True, ["SOLVER.AMP.DTYPE", "bfloat16"], False),  # our trainer may be the one
        (False, False, ["SOLVER.AMP.DTYPE", "bfloat16"], False),  # a script that knows our keys
        (True, False, ["SOLVER.IMS_PER_BATCH", 4, "MODEL.GN.NUM_GROUPS", 16], False),
    ],
)
def test_only_what_is_ignored_is_warned_of(hooked, ours, options, warned, monkeypatch, caplog):
    monkeypatch.setattr(env, "_defaults", config() if hooked else None)
    if ours:
        monkeypatch.setitem(sys.modules, "gn_detect.engine", env)
    else:
        monkeypatch.delitem(sys.modules, "gn_detect.engine", raising=False)
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", collections.Counter())
    monkeypatch.setattr(logging.getLogger("gn_detect"), "propagate", True)  # if a tool set it up
    for key in ("MODEL.FPN.NORM", "MODEL.RESNETS.NORM"):
        norm_from_config(config(GN, *options), key)
    assert [r.name for r in caplog.records] == ["gn_detect.env"] * warned
