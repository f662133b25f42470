"""YOLO: a text file for each image, a line for each object: its class, then a box or a polygon as
fractions of the image's width and height (https://docs.ultralytics.com/datasets/segment)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from supervision.dataset.formats.yolo import yolo_annotations_to_detections

from gn_detect.data import DataError

from .to_coco import (
    IMAGE_SUFFIXES,
    SPLITS,
    LabeledImages,
    LabeledObject,
    Notes,
    find_labels,
    read_text,
)

# Of darknet, LabelImg, CVAT and Roboflow: a name in each line.
NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels")


def read_yolo(
    source: Path, images: Path | None, split: str | None, classes: list[str] | None
) -> LabeledImages:
    """
    Args:
        source: ``data.yaml``, or a folder with it, or the folder of the label files below it.
        images: folder of the images; else as ``data.yaml`` or the usual folders have it.
        split: train, val or test, where there are several.
        classes: names in the order of their numbers, where no file has them.
    """
    names_file, config = find_names(source)
    if classes:
        names = dict(enumerate(classes))
    elif names_file is None:
        raise DataError(
            f"{source} has no data.yaml with the names of the classes (nor {', '.join(NAME_LISTS)})"
            "; add it, or name them with --classes"
        )
    else:
        names = _names(config.get("names"), names_file)
    folder = source if source.is_dir() else source.parent
    root = images or _find_images(config, folder, names_file or folder / "data.yaml", split)
    label_root, labels = find_labels(root, _usual_folders(folder, root, split), ".txt")
    files = {p for p in label_root.rglob("*.txt") if p.name not in NAME_LISTS}
    keypoints = config.get("kpt_shape") or [0, 0]
    try:
        num_values = keypoints[0] * keypoints[1] + 0
    except (TypeError, IndexError, KeyError):
        raise DataError(
            f"{names_file} has the kpt_shape {keypoints!r}; it must be two numbers, or absent"
        ) from None
    return LabeledImages(
        image_root=root,
        labels=labels,
        files=files,
        parse=functools.partial(_parse, num_keypoint_values=num_values),
        names=names,
    )


def find_names(source: Path) -> tuple[Path | None, dict[str, Any]]:
    """The file with the names of the classes, in ``source`` or up to two folders above it, and
    the content of ``data.yaml``."""
    if source.is_file():
        return source, _read_yaml(source)
    for folder in (source, *source.resolve().parents[:2]):
        for path in sorted(p for p in folder.glob("*") if p.suffix in (".yaml", ".yml")):
            config = _read_yaml(path)
            if "names" in config:
                return path, config
        for path in (folder / name for name in NAME_LISTS):
            if path.is_file():
                return path, {"names": read_text(path).rstrip().split("\n")}
    return None, {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from None
    return config if isinstance(config, dict) else {}


def _names(names: Any, path: Path) -> dict[int, str]:
    """Number -> name; supervision would count the keys of a dict anew, where some are absent."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        by_number = {int(k): v for k, v in names.items()}
    except (AttributeError, ValueError, TypeError):
        by_number = {}
    if not by_number:
        raise DataError(
            f"{path} has the names {names!r}; they must be a list, or a dict of number and name"
        )
    for number, name in by_number.items():
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            raise DataError(
                f"{path} names class {number} {name!r}, which is not text in YAML; put it in quotes"
            )
    return {number: str(name).strip() for number, name in by_number.items()}


def _find_images(config: dict[str, Any], source: Path, names_file: Path, split: str | None) -> Path:
    """The folder of the images of ``split``, by ``data.yaml`` or as they usually lie."""
    folder = names_file.parent
    # `path` is often that of another machine. Ultralytics takes "../train/images", as Roboflow
    # writes, for "train/images".
    bases = [folder / str(config.get("path") or ""), folder]
    found = {}
    for name in SPLITS:
        entry = config.get(name) or ""
        if not isinstance(entry, str) or entry.endswith(".txt"):
            raise DataError(
                f"{names_file} has a list of images for {name}; name the folder of the images with "
                "--images"
            )
        entries = [entry, entry.removeprefix("../")] if entry else []
        usual = [folder / "images" / name, folder / name / "images"]
        candidates = [*(base / e for base in bases for e in entries), *usual]
        if existing := [p for p in candidates if p.is_dir()]:
            found[name] = existing[0]
    if split is None and len(set(found.values())) > 1:
        raise DataError(f"{folder} has the splits {', '.join(found)}; choose one with --split")
    if split is None:
        usual = [*found.values(), source / "images", source, folder / "images"]
        return next((p for p in usual if _has_images(p)), usual[0])
    if split not in found:
        raise DataError(
            f"{folder} has no folder of images of the split {split!r} (found: "
            f"{', '.join(found) or 'none'}); name the folder of the images with --images"
        )
    return found[split]


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.rglob("*"))


def _usual_folders(source: Path, images: Path, split: str | None) -> list[Path]:
    """Where the label files may be."""
    folders = [source, source / "labels" / (split or ""), source / (split or "") / "labels", images]
    parts = images.absolute().parts
    if "images" in parts:  # as Ultralytics finds them: the last "images" of the path is "labels"
        at = len(parts) - 1 - parts[::-1].index("images")
        folders.insert(1, Path(*parts[:at], "labels", *parts[at + 1 :]))
    return folders


def _parse(
    label_file: Path, size: tuple[int, int], notes: Notes, *, num_keypoint_values: int
) -> list[LabeledObject]:
    objects = []
    for number, line in enumerate(read_text(label_file).split("\n"), 1):
        values, where = line.split(), f"{label_file}, line {number}"
        if not values:
            continue
        if num_keypoint_values and len(values) == 5 + num_keypoint_values:
            values = values[:5]
            notes.add("objects whose keypoints are left out", where)
        elif len(values) == 6:
            values = values[:5]
            notes.add("boxes with a sixth value (a confidence), which is left out", where)
        try:
            if len(values) > 5 and len(values) % 2 == 0:  # supervision drops the last one
                raise ValueError(f"{len(values) - 1} coordinates, but x and y come in pairs")
            found = yolo_annotations_to_detections([" ".join(values)], size, with_masks=False)
            coordinates = np.array(values[1:], np.float64).reshape(-1, 2)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"{where} is {line[:80]!r}: {error}; a line is a class and x_center, y_center, "
                "width, height of a box, or x1, y1, x2, y2, ... of a polygon"
            ) from None
        beyond = np.abs(coordinates - 0.5) > 0.5 + 1 / np.array(size)
        if beyond.any():
            raise DataError(
                f"{where} has the value {coordinates[beyond][0]:g}; x and width must be fractions "
                f"of the image's width, {size[0]}, and y and height of its height, {size[1]}: from "
                "0 to 1"
            )
        polygon = coordinates * size if len(values) > 5 else None
        objects.append(
            LabeledObject(
                label=int(found.class_id[0]),
                where=where,
                xyxy=found.xyxy[0].astype(np.float64)
                if polygon is None
                else np.concatenate([polygon.min(0), polygon.max(0)]),
                polygons=[] if polygon is None else [polygon],
            )
        )
    return objects
