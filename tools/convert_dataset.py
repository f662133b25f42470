#!/usr/bin/env python3
"""Convert annotations of YOLO, Pascal VOC or LabelMe to a COCO JSON, or a COCO JSON back.

python tools/convert_dataset.py --from yolo data.yaml --split train --output train.json
python tools/convert_dataset.py --from voc VOC2012 --split Main/train --output train.json
python tools/convert_dataset.py --from labelme labels/ --images photos/ --output train.json
python tools/convert_dataset.py --to yolo train.json --output yolo/
"""

import argparse
import sys
from pathlib import Path

import msgspec

from gn_detect.data import DataError
from gn_detect.data.coco_pack import read_coco
from gn_detect.data.formats import READERS, from_coco


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", choices=READERS, dest="reader")
    direction.add_argument("--to", choices=("yolo", "voc"))
    parser.add_argument("input", type=Path, help="folder of the label files, data.yaml, or JSON")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--split", help="of data.yaml (train), or in ImageSets (Main/train)")
    parser.add_argument("--classes", metavar="A,B,...", help="names in the order of their ids")
    parser.add_argument("--output", type=Path, required=True, help="JSON, or folder with --to")
    args = parser.parse_args()
    if args.to and (args.images or args.split or args.classes):
        parser.error("--images, --split and --classes go with --from alone")
    return args


def main(args):
    if args.to:
        notes = from_coco(read_coco(str(args.input)), args.output, args.to)
        print(f"written: {args.output}; images are not copied")
    else:
        classes = args.classes and [name.strip() for name in args.classes.split(",")]
        content, notes = READERS[args.reader](args.input, args.images, args.split, classes)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_bytes(msgspec.json.encode(content))
        names = ",".join(category["name"] for category in content["categories"])
        counts = f"{len(content['images'])} images, {len(content['annotations'])} annotations"
        print(f"written: {args.output}: {counts}, classes {names}")
    print(f"lost or changed: {notes or 'nothing'}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
