#!/usr/bin/env python3
"""Train, fine-tune or evaluate the model of a lazy config (configs/lazy, or one of your own).

Takes Detectron2's own arguments; at the end, overrides of the form train.max_iter=1000. Without
CUDA it runs on the CPU, in --num-gpus processes.
"""

from detectron2.engine import default_argument_parser, default_setup, launch

import gn_detect  # noqa: F401  # registers the generated dataset
from gn_detect.engine import errors_as_sentences, prepare_run
from gn_detect.engine.lazy import build_lazy_model, do_test, do_train
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.engine.prepare import check_num_gpus, start_log
from gn_detect.engine.trainer import load_to_evaluate
from gn_detect.settings import Settings


def main(args):
    # Loaded in each process: a lazy config is code, and may register its data.
    cfg = load_lazy_config(args.config_file, args.opts)
    start_log(cfg)
    prepare_run(
        cfg,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        eval_only=args.eval_only,
        resume=args.resume,
    )
    default_setup(cfg, args)
    if args.eval_only:
        model = build_lazy_model(cfg)
        load_to_evaluate(Settings(cfg), model, args.resume)
        return do_test(cfg, model)
    return do_train(cfg, resume=args.resume)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with errors_as_sentences():
        check_num_gpus(args.num_gpus)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
