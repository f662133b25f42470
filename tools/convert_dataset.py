#!/usr/bin/env python3
"""Convert annotations of YOLO, Pascal VOC or LabelMe to a COCO JSON, or a COCO JSON back.

python tools/convert_dataset.py data.yaml --split train --output train.json
python tools/convert_dataset.py VOC2012 --split train --output train.json
python tools/convert_dataset.py labelme/ --images photos/ --output train.json
python tools/convert_dataset.py train.json --to yolo --output yolo/
"""

import argparse
import sys
from pathlib import Path

import msgspec

from gn_detect.data import DataError
from gn_detect.data.coco_pack import read_coco
from gn_detect.data.formats import FORMATS, guess_format, read, to_coco, write_voc, write_yolo


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help="folder of the label files, data.yaml, or JSON"
    )
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="of INPUT")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--split", help="train, val or test, where INPUT has several")
    parser.add_argument(
        "--classes",
        type=lambda names: [name.strip() for name in names.split(",")],
        metavar="A,B,...",
        help="names in the order of their ids; else those of data.yaml, or all labels, sorted",
    )
    parser.add_argument(
        "--to", choices=("coco", "yolo", "voc"), default="coco", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="OUT", help="JSON, or folder with --to"
    )
    args = parser.parse_args()
    if args.to != "coco" and (args.images or args.split or args.classes or args.format != "auto"):
        parser.error(f"--to {args.to} takes a COCO JSON, and none of its options are needed")
    return args


def main(args):
    if not args.input.exists():
        raise DataError(f"there is no {args.input}")
    if args.to != "coco":
        data = read_coco(str(args.input))
        notes = (write_yolo if args.to == "yolo" else write_voc)(data, args.output)
        counts, names = (len(data.file_names), len(data.image)), data.classes.values()
        where = f"of {args.input}; images are not copied"
    else:
        kind = args.format
        if kind == "auto":
            kind = guess_format(args.input)
            print(f"format: {kind} (--format names another)")
        source = read(args.input, kind, args.images, args.split, args.classes)
        content, notes = to_coco(source, args.classes)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_bytes(msgspec.json.encode(content))
        counts = len(content["images"]), len(content["annotations"])
        names = [category["name"] for category in content["categories"]]
        where = f"images in {source.image_root}"
    print(
        f"written: {args.output}: {counts[0]} images, {counts[1]} annotations, {len(names)} "
        f"classes ({','.join(names)}); {where}"
    )
    print(f"lost or changed: {notes or 'nothing'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
