"""Objects drawn on an image, readable at any size: no model, GPU, display or OpenCV is needed."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import supervision as sv
from matplotlib.font_manager import findfont, findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util
from supervision.key_points.skeletons import SKELETONS_BY_VERTEX_COUNT

MANY = 30  # objects, above which only masks are drawn, and boxes of those without
ALPHA = 0.45  # opacity of masks
CROWD_COLOR = sv.Color(153, 153, 153)
KEYPOINT_SCORE = 0.05  # or visibility, above which Detectron2 draws keypoints
XYWH_TO_XYXY = np.eye(4) + np.eye(4, k=2)  # x, y, width, height @ it: x, y, right, bottom
_log = logging.getLogger(__name__)


def draw(
    image: np.ndarray,
    detections: sv.Detections,
    names: Sequence[str],
    keypoints: np.ndarray | None = None,
) -> np.ndarray:
    """Draw masks, boxes, keypoints and labels, in sizes that fit the image.

    Args:
        image: (H, W, 3) uint8 RGB.
        detections: N objects with ``class_id``, such as those of `from_coco`. Masks and scores
            are drawn where it has them. ``data["crowd"]``, (N,) bool, says which are crowd regions:
            gray, and below the others.
        names: of the classes; that of a single one is not written.
        keypoints: x and y in pixels, score or visibility, (N, K, 3).

    Returns:
        A new image, (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    crowd = detections.data.get("crowd", np.zeros(len(detections), bool))
    order = np.lexsort((-detections.box_area, ~crowd))  # small ones on large ones, those on crowds
    found, crowd = detections[order], crowd[order]
    found.xyxy = np.sort(found.xyxy.reshape(-1, 2, 2), axis=1).reshape(-1, 4)  # as Pillow needs it
    found.class_id = np.where(crowd, len(names), found.class_id)
    colors, _ = _palettes(len(names))
    scale = sv.calculate_optimal_text_scale((width, height))
    line, font_size = max(1, round(4 * scale)), max(11, round(28 * scale))
    # Not by supervision's annotators, which take seconds for 12 megapixels.
    painted = image.copy()
    for i in range(len(found) if found.mask is not None else 0):
        compact = isinstance(found.mask, sv.CompactMask)
        mask = found.mask.crop(i) if compact else found.mask[i]
        left, top = found.mask.offsets[i] if compact else (0, 0)
        window = painted[top : top + mask.shape[0], left : left + mask.shape[1]]
        window[mask] = colors.by_idx(found.class_id[i]).as_rgb()
    picture = Image.blend(Image.fromarray(image), Image.fromarray(painted), ALPHA)
    for i in range(0 if keypoints is None else len(found)):
        color, points = colors.by_idx(found.class_id[i]), keypoints[order[i : i + 1]]
        points = sv.KeyPoints(xy=points[..., :2], visible=points[..., 2] > KEYPOINT_SCORE)
        if points.xy.shape[1] in SKELETONS_BY_VERTEX_COUNT:
            picture = sv.EdgeAnnotator(color, line).annotate(picture, points)
        picture = sv.VertexAnnotator(color, 2 * line).annotate(picture, points)
    objects = np.count_nonzero(~crowd)
    if objects > MANY and found.mask is not None:
        found = found[found.area == 0]
    for box, category in zip(found.xyxy, found.class_id, strict=True):
        color = colors.by_idx(category).as_rgb()
        ImageDraw.Draw(picture).rectangle(tuple(box), outline=color, width=line)
    # A label has some 8 x font_size^2 pixels; together at most a third of the image.
    if objects <= min(MANY, height * width / (24 * font_size**2)):
        words = [*names, "crowd"] if len(names) > 1 else ["", "crowd"]
        _write_labels(picture, found, words, font_size)
    return np.array(picture)


def from_coco(
    xyxy: np.ndarray,
    class_id: np.ndarray,
    masks: list[Any],
    image_size: tuple[int, int],
    **more: Any,
) -> sv.Detections:
    """Objects for `draw`, with ``more`` of ``sv.Detections``.

    Args:
        masks: of each object polygons, a compressed RLE, or nothing; [] if there are none at all.
        image_size: height, width.
    """
    rles = [
        mask
        if isinstance(mask, dict)
        else mask_util.merge(mask_util.frPyObjects(list(mask or [[0] * 6]), *image_size))
        for mask in masks
    ]
    boxes = mask_util.toBbox(rles) @ XYWH_TO_XYXY - [0, 0, 1, 1]  # here the last pixel is inside
    compact = sv.CompactMask.from_coco_rle(rles, boxes, image_size) if rles else None
    far = 2 * max(image_size)  # a box of a file may be anywhere
    return sv.Detections(xyxy.clip(-far, far), mask=compact, class_id=class_id, **more)


def _write_labels(
    picture: Image.Image, found: sv.Detections, words: Sequence[str], font_size: int
) -> None:
    """The word of its class, and the score, above each box; within the picture, and none on another
    as long as there is room below."""
    font = ImageFont.truetype(find_font("".join(words)), font_size)
    pen, height, margin = ImageDraw.Draw(picture), sum(font.getmetrics()), font_size // 4
    colors, text_colors = _palettes(len(words) - 1)
    scores = (
        itertools.repeat("") if found.confidence is None else map("{:.2f}".format, found.confidence)
    )
    taken: list[tuple[float, float, float]] = []  # top, left, right
    for (x, y, *_), category, score in zip(found.xyxy, found.class_id, scores, strict=False):
        if label := " ".join(f"{words[category]} {score}".split()):
            width = font.getlength(label) + 2 * margin
            x, y = max(0, min(x, picture.width - width)), max(0, min(y, picture.height) - height)
            for top, left, right in sorted(taken):
                if abs(top - y) < height and left < x + width and x < right:
                    y = top + height
            taken.append((y, x, x + width))
            pen.rectangle((x, y, x + width, y + height), colors.by_idx(category).as_rgb())
            pen.text((x + margin, y), label, text_colors.by_idx(category).as_rgb(), font)


@functools.lru_cache
def _palettes(count: int) -> tuple[sv.ColorPalette, sv.ColorPalette]:
    """Of ``count`` classes and of crowds; of the text on each. Steps of the golden ratio around the
    hues: each class is far from those before it."""
    hues = (0.53 + 0.618034 * np.arange(count)) % 1
    colors = np.uint8(255 * matplotlib.colormaps["hsv"](hues)[:, :3]).tolist()
    colors = [*(sv.Color(*color) for color in colors), CROWD_COLOR]
    dark = [0.299 * c.r + 0.587 * c.g + 0.114 * c.b < 128 for c in colors]
    texts = [sv.Color.WHITE if d else sv.Color.BLACK for d in dark]
    return sv.ColorPalette(colors), sv.ColorPalette(texts)


def missing(file: str, text: str) -> set[str]:
    """Characters of ``text`` that the font of a file has not."""
    return set(text) - {*map(chr, FT2Font(file).get_charmap())}


@functools.lru_cache
def find_font(text: str) -> str:
    """The file of Matplotlib's own font if it has the characters of ``text``, else of that of this
    machine which has the most of them."""
    font = findfont("DejaVu Sans")
    if missing(font, text):
        fonts = [font, *sorted(findSystemFonts(), key=lambda file: "Regular" not in file)]
        font = min(fonts, key=lambda file: len(missing(file, text)))
        if lacking := "".join(sorted(missing(font, text))):
            _log.warning(
                "no font of this machine has all characters of the class names; %s lacks %r. "
                "Install one, such as Debian's fonts-noto-cjk",
                *(font, lacking),
            )
    return font
