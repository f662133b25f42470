#!/usr/bin/env python3
"""Train, fine-tune or evaluate a detector with Group Normalization.

Takes Detectron2's own arguments, and --train-json, --train-images, --val-json, --val-images for
data of your own in COCO format; --val-fraction takes a part of the training set for validation.
Without CUDA it runs on the CPU, in --num-gpus processes. torchrun and srun can start it, too.
"""

import logging
import os
from pathlib import Path

from detectron2.engine import default_setup

from gn_detect.config import load_config
from gn_detect.data.coco import register_coco_json
from gn_detect.data.splits import split_coco
from gn_detect.engine import Trainer, prepare_run
from gn_detect.engine.agreement import check_same
from gn_detect.engine.launch import argument_parser, launch, parse_args
from gn_detect.engine.prepare import claim_output, start_log
from gn_detect.engine.report import report_run
from gn_detect.engine.trainer import load_to_evaluate
from gn_detect.settings import Settings

logger = logging.getLogger("gn_detect")


def parse_arguments():
    parser = argument_parser()
    group = parser.add_argument_group("data of your own, in COCO format")
    for split, which in (("train", "training"), ("val", "validation")):
        group.add_argument(f"--{split}-json", metavar="F", help=f"annotations for {which}")
        group.add_argument(f"--{split}-images", metavar="DIR", help=f"images for {which}")
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="take this part (such as 0.2) of the images of --train-json for validation",
    )
    group.add_argument(
        "--recipe",
        choices=("auto", "none"),
        help="derive image sizes, anchors and length of the run from --train-json, or leave what "
        "the config has; auto is the default with configs/finetune/",
    )
    args = parse_args(parser)
    for split in ("train", "val"):
        if bool(getattr(args, f"{split}_json")) != bool(getattr(args, f"{split}_images")):
            parser.error(f"--{split}-json and --{split}-images go together")
    if args.val_fraction is not None:
        if not 0 < args.val_fraction < 1:
            parser.error(f"--val-fraction is {args.val_fraction:g}; it must be between 0 and 1")
        if not args.train_json or args.val_json or args.eval_only:
            parser.error("--val-fraction splits --train-json: no --val-json, no --eval-only")
    if args.recipe == "auto" and args.eval_only:
        parser.error(
            "--recipe auto is of a training run, which writes what it derived as config.yaml: "
            "evaluate with that as --config-file"
        )
    if args.recipe is None:
        own = args.train_json and not args.eval_only
        args.recipe = "auto" if own and is_finetune(args) else "none"
    return args


def is_finetune(args):
    """Whether the config is one of configs/finetune/."""
    return Path(args.config_file).parent.name == "finetune"


def split_data(args, cfg):
    """Split the training data, so that ``args`` name the two parts."""
    claim_output(Settings(cfg), args.resume)  # of an earlier run the split is kept, too
    directory = os.path.join(cfg.OUTPUT_DIR, "split")
    options = {"seed": max(cfg.SEED, 0), "keep": args.resume}
    parts = split_coco(args.train_json, directory, args.val_fraction, **options)
    args.train_json, args.val_json = parts
    args.val_images = args.train_images


def register_data(args, run):
    """Register the data of the command line, and let DATASETS name them."""
    for split, name in (("train", "custom_train"), ("val", "custom_val")):
        json_file = getattr(args, f"{split}_json")
        if not json_file:
            continue
        register_coco_json(name, json_file, getattr(args, f"{split}_images"))
        key = "train_data" if split == "train" else "test_data"
        if name not in run[key]:
            reason = f"--{split}-json is {name}"
            run.derive(key, (name,), reason, needed=True)
    if args.train_json and not args.val_json:  # what the config names is other data
        run.derive("test_data", (), "there is no --val-json")


def main(args):
    cfg = load_config(args.config_file, args.opts)
    start_log(cfg)
    names = ("eval_only", "resume", "val_fraction", "train_json", "val_json", "recipe")
    typed = args.opts[::2]
    check_same(cfg, typed, **{name: getattr(args, name) for name in names})
    if args.eval_only and is_finetune(args):
        logger.warning(
            "sizes and anchors are the config's: to evaluate weights of a run that had a recipe, "
            "give the config.yaml of its OUTPUT_DIR as --config-file"
        )
    if args.val_fraction:
        split_data(args, cfg)
    register_data(args, Settings(cfg, typed))
    options = {"eval_only": args.eval_only, "resume": args.resume, "recipe": args.recipe == "auto"}
    prepare_run(cfg, typed=typed, **options)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_to_evaluate(Settings(cfg), model, args.resume)
        results = {**Trainer.test(cfg, model), **Trainer.test_with_tta(cfg, model)}
        report_run(Settings(cfg), training=False)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch(main, parse_arguments())
