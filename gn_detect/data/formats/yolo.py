"""YOLO: a text file for each image, a line for each object: its class, then a box or a polygon as
fractions of the image's width and height (https://docs.ultralytics.com/datasets/segment)."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import yaml
from supervision.dataset.formats.yolo import yolo_annotations_to_detections

from gn_detect.data import DataError

from .to_coco import LabeledObject, Notes, Size, read_text, to_coco


class Config(msgspec.Struct):  # data.yaml
    names: list[str | int | float] | dict[int, str | int | float]
    path: str | None = None
    train: str | None = None
    val: str | None = None
    test: str | None = None
    kpt_shape: None = None  # keypoints are not read


def read_yolo(
    source: Path, images: Path | None, split: str | None, classes: list[str] | None
) -> tuple[dict, Notes]:
    """``source`` is ``data.yaml`` or its folder; ``split`` train, val or test."""
    path, config = source / "data.yaml" if source.is_dir() else source, Config(classes or [])
    if path.is_file() or not classes:
        try:
            config = msgspec.convert(yaml.safe_load(read_text(path)), Config)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be used: {' '.join(str(error).split())}; it must name the classes "
                "(quote no and yes) and folders of images, and no keypoints (kpt_shape)"
            ) from None
    names = classes or config.names
    names = names if isinstance(names, dict) else dict(enumerate(names))
    names = {number: str(names[number]).strip() for number in sorted(names)}
    if images and split:
        raise DataError("--images names the images that --split would choose; give one of them")
    if images:
        folders = [path.parent, path.parent / "labels"]
    else:
        images = _find_images(config, path, split)
        # As Ultralytics finds them: the last "images" of the path is "labels".
        beside = "/labels/".join(f"{images.absolute()}/".rsplit("/images/", 1))
        folders = [Path(beside), images]
    return to_coco(images, folders, ".txt", _parse, names)


def _find_images(config: Config, path: Path, split: str | None) -> Path:
    """The folder of the images of ``split``, by ``data.yaml``; images, where it has none."""
    splits = {s: f for s in ("train", "val", "test") if (f := getattr(config, s))}
    if split not in splits and (split or len(set(splits.values())) > 1):
        raise DataError(f"{path} has the splits {', '.join(splits)}; choose one with --split")
    entry = splits[split] if split else next(iter(splits.values()), "images")
    # `path` is often of another machine, and Roboflow writes "../train/images" for "train/images".
    for name in (f"{config.path or '.'}/{entry}", entry, entry.removeprefix("../")):
        if (folder := path.parent / name).is_dir():
            return folder
    raise DataError(f"{path.parent / entry} is no folder of images; name one with --images")


def _parse(label_file: Path, size: Size, notes: Notes) -> Iterator[LabeledObject]:
    for number, line in enumerate(read_text(label_file).split("\n"), 1):
        values, where = line.split(), f"{label_file}, line {number}"
        if not values:
            continue
        if len(values) == 6:
            values.pop()
            notes.add("boxes with a sixth value (a confidence), which is left out", where)
        try:
            if len(values) % 2 == 0:  # supervision drops the last one
                raise ValueError(f"{len(values) - 1} coordinates, but x and y come in pairs")
            found = yolo_annotations_to_detections([" ".join(values)], size, with_masks=False)
            points = np.array(values[1:], np.float64).reshape(-1, 2)
            beyond = np.abs(points - 0.5) > 0.5 + 1 / np.array(size)  # by more than a pixel
            if beyond.any():
                raise ValueError(f"the value {points[beyond][0]:g} is not from 0 to 1")
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"{where} is {line[:80]!r}: {error}; it must be a class and x_center, y_center, "
                "width, height, or x1, y1, x2, y2, ..., as fractions of the width and the height"
            ) from None
        polygons = [points * size] if len(points) > 2 else []
        yield LabeledObject(int(found.class_id[0]), where, found.xyxy[0], polygons)
