#!/usr/bin/env python3
"""Say where a detector errs: AP and recall by class, size and IoU, kinds of errors, confusion,
calibration, and the worst images, as a page (report.html) and as numbers (analysis.json).

    python tools/analyze.py --json val.json --images val --output analysis \\
        --results output/inference/coco_instances_results.json

Needs no model. docs/report.md says what each figure means.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from gn_detect.config import ConfigError
from gn_detect.engine import errors_as_sentences
from gn_detect.evaluation.errors import IOU_TYPES, analyze
from gn_detect.evaluation.report import TestSet, write_report
from gn_detect.evaluation.report_pictures import draw_report_pictures


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="F", help="dataset in COCO format")
    parser.add_argument("--images", required=True, metavar="DIR", help="its images")
    parser.add_argument(
        "--results", required=True, metavar="F", help="COCO results, coco_instances_results.json"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="new folder")
    parser.add_argument("--overwrite", action="store_true", help="DIR may hold files")
    parser.add_argument(
        "--iou-type", choices=IOU_TYPES, help="default: segm if all results and objects have masks"
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="of confusion, counts of errors and images; default: %(default)s",
    )
    parser.add_argument(
        "--bit-depth-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=(),
        help="INPUT.BIT_DEPTH_RANGE of the training",
    )
    return parser.parse_args()


def main(args) -> None:
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        if any(args.output.iterdir()) and not args.overwrite:
            raise ConfigError(
                f"the folder {args.output} holds files; choose another one, or add --overwrite"
            )
    analysis = analyze(
        *(args.json, args.results),
        image_root=args.images,
        iou_type=args.iou_type,
        score_threshold=args.score_threshold,
    )
    print(analysis.text())
    title = f"{Path(args.results).name} on {Path(args.json).name}"
    pictures = draw_report_pictures(
        *(args.json, args.images, args.results, analysis),
        score_threshold=args.score_threshold,
        bit_depth_range=args.bit_depth_range,
    )
    numbers, page = args.output / "analysis.json", args.output / "report.html"
    with writing(args.output):
        numbers.write_text(json.dumps(analysis.to_dict(), indent=1, allow_nan=False))
        write_report(page, title=title, tests=[TestSet("", analysis, pictures)])
    print(f"written: {numbers}, {page}")


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    with errors_as_sentences():
        main(parse_args())
