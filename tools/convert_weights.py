#!/usr/bin/env python3
"""Convert weights of any source to Detectron2's names, or a trained backbone to a classifier's.

IN is a path, a URL or a name of tools/list_weights.py, with #sha256=... if it is to be checked, of
a file with the names of a library of docs/weights.md. OUT ends in .pth or .safetensors.

With --config-file, what the weights give to that model is shown as a table, they are held to the
same checks as in training, and OUT has the full names of the model.
"""

import argparse
import dataclasses

from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from gn_detect.checkpoint import Checkpointer, WeightGuards, read_weights
from gn_detect.checkpoint.export import (
    check_output,
    export_backbone,
    write_state_dict,
    write_weights,
)
from gn_detect.config import load_config
from gn_detect.engine import errors_as_sentences
from gn_detect.engine.follow_data import outputs_from_weights


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes of the config")
    parser.add_argument("--config-file", metavar="F", help="of the model that is to load them")
    parser.add_argument(
        "--allow-bn-conv-only",
        action="store_true",
        help="of BN weights for a model with GN, take the convolutions",
    )
    parser.add_argument(
        "--export", choices=("timm", "torchvision"), help="write the backbone in their names"
    )
    args = parser.parse_intermixed_args()
    if not args.config_file and (args.allow_bn_conv_only or args.opts):
        parser.error("--allow-bn-conv-only and KEY VALUE need --config-file")
    if args.allow_bn_conv_only and args.export:
        parser.error("--allow-bn-conv-only leaves out what --export needs")
    return args


def main(args):
    check_output(args.output)
    if not args.config_file:
        weights = read_weights(args.weights)
        print(f"{args.weights} has the names of {weights.format}, {len(weights.state)} tensors")
    else:
        cfg = load_config(args.config_file, args.opts)
        cfg.MODEL.DEVICE = "cpu"
        cfg.GUARDS.BN_WEIGHTS_INTO_GN &= not args.allow_bn_conv_only
        weights = read_weights(args.weights)
        outputs_from_weights(cfg, weights)
        guards = WeightGuards.from_config(cfg)
        checkpointer = Checkpointer(build_model(cfg), guards=guards)
        coverage = checkpointer.check(weights, args.weights)
        weights = dataclasses.replace(
            weights,
            state=coverage.loaded,
            partial=False,
            batch_norms=coverage.batch_norms,
            origin=weights.origin.completed_by(
                guards.ours if weights.batch_norms else checkpointer.origin
            ),
        )
    if args.export:
        write_state_dict(args.output, export_backbone(weights, args.weights))
    else:
        write_weights(args.output, weights)
    print(f"written: {args.output}")


if __name__ == "__main__":
    args = parse_args()
    setup_logger(name="gn_detect")
    with errors_as_sentences():
        main(args)
