#!/usr/bin/env python
"""Draw the predictions of an evaluation, the curves of a training, or both, as PNG files.

    python tools/visualize_predictions.py --json val.json --images val \\
        --results output/inference/coco_instances_results.json --output predictions.png
    python tools/visualize_predictions.py --metrics output/metrics.json --curves curves.png
"""

import argparse
import sys

from gn_detect.visualize import draw_curves, draw_predictions


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error in a file that was given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    predictions = parser.add_argument_group("predictions")
    predictions.add_argument("--json", help="dataset in COCO format")
    predictions.add_argument("--images", help="folder of its images")
    predictions.add_argument("--results", help="COCO results, coco_instances_results.json")
    predictions.add_argument("--output", help="PNG to write")
    predictions.add_argument("--num-images", type=int, default=8, help="default: %(default)s")
    predictions.add_argument(
        "--score-threshold", type=float, default=0.5, help="default: %(default)s"
    )
    predictions.add_argument(
        "--bit-depth-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=(),
        help="INPUT.BIT_DEPTH_RANGE of the training",
    )
    curves = parser.add_argument_group("curves")
    curves.add_argument("--metrics", help="metrics.json of a training")
    curves.add_argument("--curves", help="PNG to write")
    args = parser.parse_args(argv)

    for_predictions = (args.json, args.images, args.results, args.output)
    for_curves = (args.metrics, args.curves)
    if any(for_predictions) and not all(for_predictions):
        parser.error("predictions need all of --json, --images, --results and --output")
    if any(for_curves) and not all(for_curves):
        parser.error("curves need both --metrics and --curves")
    if not any(for_predictions + for_curves):
        parser.error(
            "nothing to draw: give --json and what belongs to it, or --metrics and --curves"
        )

    try:
        if args.json:
            print(
                draw_predictions(
                    *for_predictions,
                    num_images=args.num_images,
                    score_threshold=args.score_threshold,
                    bit_depth_range=args.bit_depth_range,
                )
            )
        if args.metrics:
            print(draw_curves(*for_curves))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
