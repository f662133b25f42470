#!/usr/bin/env python3
"""Write a trained detector as ONNX, to run where neither PyTorch nor Detectron2 is installed.

WEIGHTS is a checkpoint, .pth or .safetensors, of this project, or, with --config-file, any weights.
What runs the file is gn_detect/deploy/runtime.py, which can be copied beside it.

The file is compared with the model on an image of another size than it was made with, and is not
left behind where they differ.
"""

import argparse
import re

from detectron2.utils.logger import setup_logger

from gn_detect import Predictor
from gn_detect.deploy.onnx import GROUP_NORMS, export_onnx
from gn_detect.engine import errors_as_sentences


def size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 480x640, height x width")
    return int(match[1]), int(match[2])


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("output", metavar="MODEL.onnx")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes of the config")
    parser.add_argument("--config-file", metavar="F", default="", help="of weights without one")
    parser.add_argument(
        "--static", type=size, metavar="HxW", help="for images of this size alone: others are "
        "resized and padded to it"
    )  # fmt: skip
    parser.add_argument(
        "--group-norm", choices=GROUP_NORMS, default=GROUP_NORMS[0], help="by the operator "
        "GroupNormalization of opset 21, or by others that run anywhere (default)"
    )  # fmt: skip
    parser.add_argument("--image", metavar="F", help="to compare on, in place of a drawn one")
    return parser.parse_intermixed_args()


def main(args):
    predictor = Predictor(args.weights, config_file=args.config_file, opts=args.opts, device="cpu")
    agreement = export_onnx(
        predictor, args.output, static=args.static, group_norm=args.group_norm, image=args.image
    )
    print(f"the file compared with the model: {agreement}")
    if not agreement.count:
        print("nothing was found to compare: name a photo with --image")
    print(f"written: {args.output}")


if __name__ == "__main__":
    args = parse_args()
    setup_logger(name="gn_detect")
    with errors_as_sentences():
        main(args)
