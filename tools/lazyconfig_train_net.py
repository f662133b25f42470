#!/usr/bin/env python3
"""Train, fine-tune or evaluate the model of a lazy config (configs/lazy, or one of your own).

Takes Detectron2's own arguments; at the end, overrides of the form train.max_iter=1000. Without
CUDA it runs on the CPU, in --num-gpus processes. torchrun and srun can start it, too.
"""

from detectron2.engine import default_setup

import gn_detect  # noqa: F401  # registers the generated dataset
from gn_detect.engine import prepare_run
from gn_detect.engine.agreement import check_same
from gn_detect.engine.launch import argument_parser, launch, parse_args
from gn_detect.engine.lazy import build_lazy_model, do_test, do_train
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.engine.prepare import start_log
from gn_detect.engine.report import report_run
from gn_detect.engine.trainer import load_to_evaluate
from gn_detect.settings import Settings


def main(args):
    cfg = load_lazy_config(args.config_file, args.opts)
    start_log(cfg)
    typed = [override.partition("=")[0] for override in args.opts]
    check_same(cfg, typed, eval_only=args.eval_only, resume=args.resume)
    prepare_run(cfg, typed=typed, eval_only=args.eval_only, resume=args.resume)
    default_setup(cfg, args)
    if args.eval_only:
        model = build_lazy_model(cfg)
        load_to_evaluate(Settings(cfg), model, args.resume)
        results = do_test(cfg, model)
        report_run(Settings(cfg), training=False)
        return results
    return do_train(cfg, resume=args.resume)


if __name__ == "__main__":
    launch(main, parse_args(argument_parser()))
