#!/usr/bin/env python3
"""Turn the weights of a detector with BatchNorm into weights for the same detector with GN.

    python tools/bn_to_gn.py --weights bn.pth --config-file GN.yaml --images DIR --output gn.pth

Keeps the convolutions, and sets gamma and beta of each GN layer so that its output has BN's mean
and variance on a few images. Prints the error of the features on images that were held out. The
result is a start for training (MODEL.WEIGHTS of tools/train_net.py): see docs/bn_to_gn.md.
"""

import argparse

from tabulate import tabulate

from gn_detect.checkpoint import Weights
from gn_detect.checkpoint.export import check_output, write_weights
from gn_detect.config import load_config
from gn_detect.engine import errors_as_sentences
from gn_detect.engine.bn_to_gn import METHODS, convert, read_images
from gn_detect.engine.prepare import resolve_device
from gn_detect.settings import Settings


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="F", required=True, help="with BN, or FrozenBN")
    parser.add_argument("--config-file", metavar="F", required=True, help="of the GN network")
    parser.add_argument("--images", metavar="DIR", required=True, help="some of your data")
    parser.add_argument("--num-images", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--output", metavar="F.pth", required=True, help="weights with GN")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="gamma, beta; default: %(default)s"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="more of the config")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with errors_as_sentences():
        check_output(args.output)
        cfg = load_config(args.config_file, args.opts)
        resolve_device(Settings(cfg, args.opts[::2]))
        images = read_images(args.images, args.num_images, cfg)
        result = convert(cfg, args.weights, images, args.method)
        write_weights(args.output, Weights("Detectron2", result.weights, False, result.origin))
    used, held_out = result.num_images
    size = "x".join(map(str, images[0].shape[1:]))
    print(
        f"{len(result.calibrated)} layers calibrated on {used} images of {size} pixels; error of "
        f"the features on {held_out} others, |GN - BN| / |BN|:"
    )
    rows = [{"gamma, beta": name} | errors for name, errors in result.errors.items()]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if result.fresh:
        print(f"Starts afresh (not written): {', '.join(result.fresh)}")
    print(f"Wrote {args.output}, gamma and beta {args.method}")


if __name__ == "__main__":
    main()
