#!/usr/bin/env python3
"""What reading and scoring data of COCO's size costs, against Detectron2: on generated data, each
row in a process of its own.

    python tools/benchmark_data.py read     train2017: 118,287 images, 860,001 annotations
    python tools/benchmark_data.py score    1,000 images with 100 detections each, boxes and masks
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from tabulate import tabulate

SIDE, POINTS, CLASSES = 480, 25, 80  # of an image, in pixels; of a polygon; in all


def write_objects(f, keys: list[str], images: np.ndarray, rng: np.random.Generator) -> None:
    """Write a JSON list of objects of random place and shape, one for each entry of ``images``."""
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    f.write(b"[")
    for start in range(0, len(images), 10_000):
        part = images[start : start + 10_000]
        radius = rng.uniform(8, 100, (len(part), 1, 1))
        centre = rng.uniform(radius, SIDE - radius, (len(part), 1, 2))
        shape = radius * circle * rng.uniform(0.7, 1, (len(part), POINTS, 1))
        points = (centre + shape).round(2)
        low, size = points.min(axis=1), np.ptp(points, axis=1)
        columns = {
            "id": range(start + 1, start + len(part) + 1),
            "image_id": part.tolist(),
            "category_id": rng.integers(1, CLASSES + 1, len(part)).tolist(),
            "bbox": np.concatenate([low, size], axis=1).round(2).tolist(),
            "segmentation": [[polygon] for polygon in points.reshape(len(part), -1).tolist()],
            "area": size.prod(axis=1).tolist(),
            "iscrowd": [0] * len(part),
            "score": rng.random(len(part)).tolist(),
        }
        rows = zip(*(columns[key] for key in keys), strict=True)
        objects = [dict(zip(keys, row, strict=True)) for row in rows]
        f.write(b"," * bool(start) + msgspec.json.encode(objects)[1:-1])
    f.write(b"]")


def generate(folder: Path, num_images: int, num_objects: int, num_detections: int) -> None:
    rng = np.random.default_rng(0)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "image.png")  # which all images are
    image = {"file_name": "image.png", "height": SIDE, "width": SIDE}
    images = [{**image, "id": i} for i in range(1, num_images + 1)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
    keys = ["image_id", "category_id", "bbox", "segmentation"]
    with open(folder / "truth.json", "wb") as f:
        lists = {"images": images, "categories": categories}
        f.write(msgspec.json.encode(lists)[:-1] + b',"annotations":')
        owners = rng.integers(1, num_images + 1, num_objects)
        write_objects(f, [*keys, "id", "area", "iscrowd"], owners, rng)
        f.write(b"}")
    with open(folder / "results.json", "wb") as f:
        owners = np.repeat(np.arange(1, num_images + 1), num_detections)
        write_objects(f, [*keys, "score"], owners, rng)


def measure(variant: str, folder: Path, answer) -> None:
    from detectron2.data import DatasetCatalog, datasets

    from gn_detect.data.coco import check_coco_json, register_coco_json
    from gn_detect.evaluation import build_evaluator

    truth = str(folder / "truth.json"), str(folder)
    if variant in ("pycocotools", "fast"):
        register_coco_json("generated", *truth)
        DatasetCatalog.get("generated")
        evaluator = build_evaluator("generated", str(folder), coco_eval=variant)
        results = msgspec.json.decode((folder / "results.json").read_bytes())
        for result in results:
            rle = mask_util.frPyObjects(result["segmentation"], SIDE, SIDE)[0]
            result["segmentation"] = {**rle, "counts": rle["counts"].decode()}
            result["category_id"] -= 1  # as a model predicts them
        evaluator._predictions = [{"image_id": 1, "instances": results}]
        run = evaluator.evaluate
    elif variant == "check and load":

        def run():
            check_coco_json(*truth, masks=True, training=True, evaluation=True)
            register_coco_json("generated", *truth)
            DatasetCatalog.get("generated")
    else:

        def run():
            datasets.load_coco_json(*truth, "generated")

    start = time.process_time()
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    answer.put([variant, f"{time.process_time() - start:.1f}", f"{peak:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=["read", "score"])
    parser.add_argument("--images", type=int, help="how many")
    args = parser.parse_args()
    variants, size = ["Detectron2's load_coco_json", "check and load"], (118_287, 860_001, 0)
    if args.question == "score":
        variants, size = ["pycocotools", "fast"], (1000, 7000, 100)
    if args.images:
        size = (args.images, args.images * size[1] // size[0], size[2])
    context = multiprocessing.get_context("spawn")
    answer, rows = context.Queue(), []
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), *size)
        for variant in variants:
            process = context.Process(target=measure, args=(variant, Path(folder), answer))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"error: {variant} ended with exit code {process.exitcode}")
            rows.append(answer.get())
    print(tabulate(rows, ["", "CPU seconds", "peak GiB of memory"], tablefmt="pipe"))


if __name__ == "__main__":
    main()
