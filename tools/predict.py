#!/usr/bin/env python3
"""Predict on images, folders, patterns and videos with trained weights, which need nothing else.

    python tools/predict.py output/model_final.safetensors photos 'more/*.jpg' clip.mp4 \\
        --output predictions

Writes drawn pictures and videos by the names of the inputs; predictions.json, all that the model
returns (COCO results); and annotations.json, what has at least --score, as a COCO dataset to
correct and to train on. docs/predict.md has more.
"""

import argparse
import logging
import sys
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from gn_detect.engine import errors_as_sentences
from gn_detect.predict import Predictor
from gn_detect.predict.inputs import find_inputs
from gn_detect.predict.outputs import plan_outputs
from gn_detect.predict.run import predict_files


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="WEIGHTS", help=".pth, .safetensors, .onnx, or a name")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="an image, a video, a folder (with all folders in it), or a quoted pattern",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--overwrite", action="store_true", help="it may hold files")
    parser.add_argument(
        "--score",
        type=number(0, 1),
        default=0.5,
        help="what is drawn, and is an annotation (default: %(default)s)",
    )
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help="these alone")
    parser.add_argument("--device", help="cpu, cuda, ... (default: CUDA where it is available)")
    parser.add_argument(
        "--batch",
        type=number(1, kind=int),
        default=1,
        metavar="N",
        help="images of one size at once (default: %(default)s)",
    )
    parser.add_argument("--no-pictures", action="store_true", help="results alone")
    parser.add_argument("--config-file", default="", metavar="F", help="of weights without one")
    parser.add_argument(
        "--opts", nargs="+", default=(), metavar="KEY VALUE", help="options of the config"
    )
    tiles = parser.add_argument_group("large images")
    tiles.add_argument("--tiles", type=number(1, kind=int), metavar="SIZE", help="of a tile")
    tiles.add_argument("--overlap", type=number(0, 1), metavar="X", help="of two tiles, a part")
    tiles.add_argument("--statistics", choices=["image", "tile"], help="of Group Normalization")
    args = parser.parse_args()
    if args.tiles is None and (args.overlap is not None or args.statistics):
        parser.error("--overlap and --statistics go with --tiles")
    if args.weights.endswith(".onnx") and (args.config_file or args.opts or args.batch > 1):
        parser.error(
            "an ONNX model has no config and takes one image: no --config-file, --opts, --batch"
        )
    return args


def number(lowest, highest=float("inf"), kind=float):
    def parse(text):
        if not lowest <= kind(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not from {lowest} to {highest}")
        return kind(text)

    parse.__name__ = "number"
    return parse


def build_predictor(args):
    if args.weights.endswith(".onnx"):
        from gn_detect.deploy.predictor import OnnxPredictor

        predictor = OnnxPredictor(args.weights, args.device)
    else:
        options = {"config_file": args.config_file, "opts": args.opts, "device": args.device}
        predictor = Predictor(args.weights, **options, batch_size=args.batch)
    if not args.tiles:
        return predictor
    from gn_detect.predict.tiles import TiledPredictor

    options = {name: getattr(args, name) for name in ("overlap", "statistics")}
    options = {name: value for name, value in options.items() if value is not None}
    return TiledPredictor(predictor, args.tiles, **options)


def main(args) -> None:
    root, inputs = find_inputs(args.inputs, args.output)
    targets = plan_outputs(inputs, args.output, args.overwrite)
    predictor = build_predictor(args)
    with logging_redirect_tqdm():
        summary = predict_files(
            predictor,
            inputs,
            targets,
            args.output,
            classes=args.classes,
            score=args.score,
            batch_size=args.batch,
            pictures=not args.no_pictures,
        )
    print(summary.text(args.score, args.output, root))
    if summary.failed:
        sys.exit(f"error: {len(summary.failed)} of {len(inputs)} inputs failed, named above")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with errors_as_sentences():
        main(parse_args())
