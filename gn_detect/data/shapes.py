"""A generated instance segmentation dataset: rotated, overlapping shapes on textured backgrounds.

Small enough to train on in minutes without a GPU, and on disk in COCO format, so that it takes the
same path through the code as COCO does. Importing this module registers ``shapes_train`` and
``shapes_val``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as mask_util

from .coco import DataError

CLASSES = ("ellipse", "triangle", "cross")
SPLITS = ("train", "val")
VERSION = 1  # of what is drawn; another one, and a directory of older images is refused
# No object is drawn that would leave less than this part of another visible.
MIN_VISIBLE = 0.4


def write_shapes(
    root: str | Path,
    *,
    num_train: int = 600,
    num_val: int = 100,
    image_size: int = 128,
    mixed: bool = False,
    seed: int = 0,
) -> Path:
    """Write ``train.json``, ``val.json`` and the images ``train/``, ``val/`` under ``root``, once.

    The images depend on the arguments alone. ``root`` appears complete or not at all, also when
    several processes write it at the same time.

    Args:
        root: directory of the dataset; its parents are made.
        num_train, num_val: images of each split.
        image_size: height and width in pixels.
        mixed: landscapes and portraits in turn, of 4:3, whose longer side is ``image_size``.
        seed: another one gives other images.

    Returns:
        ``root`` as a Path.

    Raises:
        DataError: ``root`` holds a dataset of other arguments, or something else.
    """
    root = Path(root)
    counts = dict(zip(SPLITS, (num_train, num_val), strict=True))
    info = {"generator": VERSION, "counts": counts, "size": image_size, "seed": seed}
    info |= {"mixed": True} if mixed else {}
    if min(*counts.values(), image_size - 31) < 1:
        raise DataError("shapes need at least 1 image in each split, and images of 32 pixels")

    def write(directory: Path) -> None:
        for i, (split, count) in enumerate(counts.items()):
            _write_split(directory, split, count, image_size, (seed, i), info)

    return write_once(root, write, "train.json", info)


def write_once(root: Path, write: Callable[[Path], None], file: str, info: dict) -> Path:
    """Have what ``write`` writes to a directory at ``root``, all of it or nothing.

    Args:
        file: JSON in the directory, which has ``info`` under "info".

    Raises:
        DataError: ``root`` holds something else.
    """
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            write(temporary)
            temporary.chmod(0o755)
            temporary.rename(root)
        except OSError:
            if not root.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        found = json.loads((root / file).read_text())["info"]
    except (OSError, ValueError, KeyError):
        found = None
    if found != info:
        other = f"{root} exists and holds something else than shapes of {info}"
        raise DataError(f"{other}: delete it, or choose another directory")
    return root


def _write_split(root: Path, split: str, count: int, size: int, seed: tuple, info: dict) -> None:
    (root / split).mkdir()
    images, annotations = [], []
    for image_id in range(1, count + 1):
        short = size * 3 // 4 if "mixed" in info else size
        shape = (short, size) if image_id % 2 else (size, short)
        image, objects = draw_image(np.random.default_rng([*seed, image_id]), shape)
        name = f"{image_id:06d}.jpg"
        image.save(root / split / name, quality=95)
        images.append({"id": image_id, "file_name": name, "height": shape[0], "width": shape[1]})
        for category_id, mask in objects:
            rle = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask_util.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(content))


def draw_image(
    rng: np.random.Generator, size: int | tuple[int, int]
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """Draw one image.

    Args:
        size: (height, width), or both.

    Returns:
        the RGB image, and for each object its category id (from 1, see ``CLASSES``) and the mask of
        its visible part, (height, width) uint8.
    """
    canvas = texture(rng, size, rng.uniform(40, 215, 3), contrast=24)
    count = 0 if rng.random() < 0.06 else int(rng.integers(1, 7))
    categories, whole, visible = [], [], []
    for _ in range(count):
        category = int(rng.integers(len(CLASSES)))
        mask = shape_mask(rng, OUTLINES[CLASSES[category]], size)
        covered = [v & ~mask for v in visible]
        if any(c.sum() < MIN_VISIBLE * w.sum() for c, w in zip(covered, whole, strict=True)):
            continue  # it would hide another object
        categories.append(category + 1)
        whole.append(mask)
        visible = [*covered, mask]
        colour = rng.uniform(0, 255, 3)
        while np.abs(colour - canvas[mask].mean(0)).sum() < 180:  # to be seen well
            colour = rng.uniform(0, 255, 3)
        canvas[mask] = texture(rng, size, colour, contrast=14)[mask]
    image = photograph(rng, canvas, noise=4)
    return image, [(k, v.astype(np.uint8)) for k, v in zip(categories, visible, strict=True)]


def photograph(rng: np.random.Generator, canvas: np.ndarray, noise: float) -> Image.Image:
    """(height, width, 3) float as an image, with noise of that deviation, a little out of focus."""
    pixels = canvas + rng.normal(0, noise, canvas.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.5))


def texture(
    rng: np.random.Generator, size: int | tuple[int, int], colour: np.ndarray, contrast: float
) -> np.ndarray:
    """Noise of three scales around a colour, (height, width, 3) float."""
    height, width = np.broadcast_to(size, 2).tolist()
    out = np.tile(colour, (height, width, 1))
    for cells in (2, 8, 32):
        noise = rng.normal(128, 48, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        noise = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        out += (np.asarray(noise, dtype=float) - 128) / 48 * contrast / 2
    return out


def regular(corners: int) -> np.ndarray:
    """The corners of a regular polygon around the origin, one of them at the top, at distance 1."""
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([np.sin(t), -np.cos(t)], 1)


_ARM = [(3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1)]
OUTLINES = {  # (points, 2), x and y
    "ellipse": regular(60),
    "triangle": regular(3),
    # Two bars, a third as wide as they are long.
    "cross": np.array(_ARM + [(-x, -y) for x, y in _ARM]) / np.hypot(3, 1),
}


def shape_mask(
    rng: np.random.Generator,
    outline: np.ndarray,
    size: int | tuple[int, int],
    radii: Sequence[float] = (0.12, 0.25),
) -> np.ndarray:
    """The mask of one shape of random place, size, proportions and rotation, (height, width)
    bool.

    Args:
        outline: its points, (N, 2), about 1 from the origin.
        radii: of the smallest and the largest, in parts of the longer side.
    """
    height, width = np.broadcast_to(size, 2).tolist()
    radius = max(height, width) * rng.uniform(*radii)
    squeeze = rng.uniform(0.7, 1.0)
    points = outline * [radius, radius * squeeze]
    angle = np.radians(rng.uniform(-30, 30))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = points @ rotation.T + rng.uniform(
        radius * 0.6, np.array([width, height]) - radius * 0.6
    )
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in points], fill=1)
    return np.array(mask)


def _register(root: Path) -> None:
    for split in SPLITS:
        name = f"shapes_{split}"
        if name in DatasetCatalog.list():
            continue
        json_file, image_root = str(root / f"{split}.json"), str(root / split)

        def load(name=name, json_file=json_file, image_root=image_root):
            if not os.path.exists(json_file):
                write_shapes(root)
            return load_coco_json(json_file, image_root, name)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            generate=lambda: write_shapes(root),
        )


_register(Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))) / "shapes")
