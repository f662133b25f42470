#!/usr/bin/env python3
"""Say what a dataset in COCO format holds: classes, sizes, shapes, what was mended or looks wrong.

    python tools/inspect_dataset.py --json train.json --images train_images \\
        --config-file configs/quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml --output report.png

With a config, also how large the objects are after its resizing, and how well its anchors cover
them.
"""

import argparse
import logging
from pathlib import Path

import gn_detect  # noqa: F401  # registers the components that a config names
from gn_detect.config import ConfigError, load_config
from gn_detect.data.coco import check_coco_json, load_coco
from gn_detect.data.model_input import ModelInput
from gn_detect.data.summary import summarize
from gn_detect.data.summary_figure import draw_summary, html_page
from gn_detect.engine import errors_as_sentences
from gn_detect.engine.describe_data import model_input
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.settings import Settings


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="F", help="annotations")
    parser.add_argument("--images", required=True, metavar="DIR", help="images")
    parser.add_argument("--config-file", metavar="F", help="YAML or lazy config")
    parser.add_argument("--output", type=Path, metavar="PNG", help="picture to write")
    parser.add_argument("--html", type=Path, metavar="F", help="page to write: text and picture")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="options of the config: KEY VALUE, or key=value"
    )
    args = parser.parse_args()
    if args.opts and not args.config_file:
        parser.error(f"{' '.join(args.opts)}: options of a config, but there is no --config-file")
    return args


def main(args) -> None:
    logging.getLogger("gn_detect").setLevel(logging.ERROR)  # the summary has the warnings
    given, uses = ModelInput(), {"masks": False, "keypoints": False}
    if args.config_file:
        load = load_lazy_config if args.config_file.endswith(".py") else load_config
        cfg = load(args.config_file, args.opts)
        run, given = Settings(cfg), model_input(cfg)
        uses = {name: bool(run[name]) for name in uses}
        uses |= {"exact_names": run["FILE_NAMES"], "bit_depth_range": run["bit_depth_range"] or ()}
        uses["keys"] = run.keys
    data = load_coco(args.json)
    checks = {"training": data.has_annotations, "evaluation": False, "box_format": False}
    checked = check_coco_json(args.json, args.images, **uses, **checks)
    summary = summarize(data, given, checked.warnings)
    print(summary.text())
    if args.output or args.html:
        png = draw_summary(summary)
        for path, content in ((args.output, png), (args.html, html_page(summary, png).encode())):
            if path:
                write(path, content)


def write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    print(f"written: {path}")


if __name__ == "__main__":
    with errors_as_sentences():
        main(parse_args())
