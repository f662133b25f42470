"""Generated images for classification: one shape of ten on a textured background with clutter, in a
folder of its name (``ImageFolder``). Small enough to compare norms in minutes without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import DataError
from .image_folder import read_image_folder
from .shapes import OUTLINES, photograph, regular, shape_mask, texture, write_once

VERSION = 1  # of what is drawn


def _star(points: int, depth: float) -> np.ndarray:
    return regular(2 * points) * np.where(np.arange(2 * points) % 2, depth, 1.0)[:, None]


_FIGURES = OUTLINES | {
    "square": regular(4) @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2),
    "diamond": regular(4) * [0.6, 1],
    "pentagon": regular(5),
    "star": _star(5, 0.45),
    "burst": _star(8, 0.6),
    "arrow": np.array([(0, -1), (0.8, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.8, 0)]),
    "half": regular(60)[15:46],
}
CLASSES = tuple(sorted(_FIGURES))


def write_classes(
    root: str | Path,
    *,
    num_train: int = 5000,
    num_val: int = 2000,
    image_size: int = 64,
    radii: Sequence[float] = (0.3, 0.4),
    clutter: int = 2,
    noise: float = 4,
    seed: int = 0,
) -> Path:
    """Write the images ``train/CLASS/`` and ``val/CLASS/`` of ``CLASSES`` under ``root``, once.

    The images depend on the arguments alone. ``root`` appears complete or not at all, also when
    several processes write it at the same time.

    Args:
        root: directory of the dataset; its parents are made.
        num_train, num_val: images of each split, of each class the same number but for one.
        image_size: height and width in pixels.
        radii: of the smallest and the largest shape, in parts of the image.
        clutter: so many triangles and bars, smaller and duller than the shape, lie around and
            behind it.
        noise: deviation of the noise of each pixel.
        seed: another one gives other images.

    Returns:
        ``root`` as a Path.

    Raises:
        DataError: ``root`` holds a dataset of other arguments, or something else.
    """
    info = {"generator": VERSION, "counts": [num_train, num_val], "size": image_size}
    drawn = {"radii": list(radii), "clutter": clutter, "noise": noise}
    info |= drawn | {"seed": seed}
    if min(num_train, num_val) < len(CLASSES) or image_size < 32:
        raise DataError("shapes need an image of each class in each split, and 32 pixels")

    def write(directory: Path) -> None:
        for i, (split, count) in enumerate((("train", num_train), ("val", num_val))):
            for name in CLASSES:
                (directory / split / name).mkdir(parents=True)
            for number in range(count):
                name, rng = CLASSES[number % len(CLASSES)], np.random.default_rng([seed, i, number])
                image = draw_class(rng, name, image_size, **drawn)
                image.save(directory / split / name / f"{number:06d}.jpg", quality=95)
        (directory / "info.json").write_text(json.dumps({"info": info}))

    return write_once(Path(root), write, "info.json", info)


def draw_class(
    rng: np.random.Generator,
    name: str,
    size: int,
    radii: Sequence[float],
    clutter: int,
    noise: float,
) -> Image.Image:
    """Draw an RGB image of the class ``name``, in which the shape is the brightest; for the rest
    see :func:`write_classes`."""
    canvas = texture(rng, size, rng.uniform(30, 110, 3), contrast=24)
    small = [(regular(3), regular(4) * [0.25, 1])[rng.integers(2)] for _ in range(clutter)]
    pieces = [(shape_mask(rng, outline, size, (0.05, 0.12)), 30, 150) for outline in small]
    for mask, *colours in [*pieces, (shape_mask(rng, _FIGURES[name], size, radii), 150, 240)]:
        canvas[mask] = texture(rng, size, rng.uniform(*colours, 3), contrast=24)[mask]
    return photograph(rng, canvas, noise)


def read_classes(root: str, **arguments) -> list[dict]:
    """:func:`.image_folder.read_image_folder` of ``root``, which is ``train`` or ``val`` of
    :func:`write_classes` with these ``arguments``, and is written where it is not there."""
    write_classes(Path(root).parent, **arguments)
    return read_image_folder(root)
