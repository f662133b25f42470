"""Other formats of annotations as COCO JSON, and back: ``tools/convert_dataset.py``."""

from __future__ import annotations

import warnings
from pathlib import Path

from gn_detect.data import DataError

with warnings.catch_warnings():  # supervision asks for OpenCV, which it does not need
    warnings.simplefilter("ignore")
    from .from_coco import write_voc, write_yolo
    from .labelme import is_labelme, read_labelme
    from .voc import read_voc
    from .yolo import find_names, read_yolo

from .to_coco import SPLITS, LabeledImages, Notes, to_coco

__all__ = ["FORMATS", "Notes", "guess_format", "read", "to_coco", "write_voc", "write_yolo"]
FORMATS = ("yolo", "voc", "labelme")


def guess_format(source: Path) -> str:
    """The format of the label files in ``source``.

    Raises:
        DataError: there are none, or of several formats.
    """
    if source.is_file():
        if source.suffix not in (".yaml", ".yml"):
            raise DataError(
                f"{source} is neither a folder nor data.yaml (a COCO JSON needs --to yolo or voc)"
            )
        found = ["yolo"]
    else:
        by_suffix: dict[str, Path] = {}
        for path in source.rglob("*"):
            by_suffix.setdefault(path.suffix.lower(), path)
        labelme = ".json" in by_suffix and any(map(is_labelme, source.rglob("*.json")))
        is_voc = ".xml" in by_suffix or (source / "SegmentationObject").is_dir()
        found = [kind for kind, fits in (("voc", is_voc), ("labelme", labelme)) if fits]
        names_file, _ = find_names(source)
        if names_file and names_file.parent == source or ".txt" in by_suffix and not found:
            found.append("yolo")
    if len(found) != 1:
        what = f"could be {' or '.join(found)}" if found else "holds no label files that are known"
        raise DataError(f"{source} {what}; name the format with --format ({', '.join(FORMATS)})")
    return found[0]


def read(
    source: Path,
    kind: str,
    images: Path | None = None,
    split: str | None = None,
    classes: list[str] | None = None,
) -> LabeledImages:
    """Find the images and label files of a dataset, for :func:`.to_coco.to_coco`.

    Args:
        source: its folder, or ``data.yaml``.
        kind: one of ``FORMATS``.
        images: folder of the images, where it is not found from ``source``.
        split: which part of the dataset, where it has several.
        classes: names in the order of their ids.

    Raises:
        DataError: files are missing.
    """
    if kind == "yolo":
        return read_yolo(source, images, split, classes)
    if not source.is_dir():
        raise DataError(f"{source} must be a folder, for --format {kind}")
    splits = [name for name in SPLITS if (source / name).is_dir()]
    if split is None and len(splits) > 1:
        raise DataError(f"{source} has the splits {', '.join(splits)}; choose one with --split")
    if split and (source / split).is_dir():
        source, split = source / split, None
    if kind == "voc":
        return read_voc(source, images, split)
    if split:
        raise DataError(f"--split: LabelMe has none, and there is no folder {source / split}")
    return read_labelme(source, images)
