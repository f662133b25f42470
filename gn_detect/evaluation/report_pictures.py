"""The pictures of a report: ground truth beside predictions, of the worst images and of others."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gn_detect.data.coco import load_coco
from gn_detect.visualize import TITLE, draw_pairs

from .analysis import Analysis


def draw_report_pictures(
    dataset_json: str,
    image_root: str | os.PathLike,
    results_json: str,
    analysis: Analysis | None,
    *,
    others: int = 0,
    score_threshold: float = 0.5,
    bit_depth_range: Sequence[float] = (),
) -> list[tuple[str, bytes]]:
    """
    Args:
        dataset_json, image_root, results_json, score_threshold, bit_depth_range: of
            :func:`gn_detect.visualize.draw_pairs`.
        analysis: its worst images come first.
        others: so many other images, spread over the dataset.

    Returns:
        (caption, content of a WebP file), some 1300 pixels wide.

    Raises:
        DataError: of :func:`gn_detect.visualize.draw_pairs`.
    """
    data = load_coco(dataset_json)
    names = dict(zip(data.image_ids, data.file_names, strict=True))
    reasons = {w.image_id: w.reason for w in analysis.worst} if analysis else {}
    rest = [image_id for image_id in names if image_id not in reasons]
    spread = np.linspace(0, len(rest) - 1, min(others, len(rest))).astype(int)
    chosen = [*reasons, *(rest[i] for i in spread)]
    pictures = []
    options = {"score_threshold": score_threshold, "bit_depth_range": bit_depth_range}
    for image_id, picture in draw_pairs(dataset_json, image_root, results_json, chosen, **options):
        picture = picture[TITLE:]  # what it says is too small on a phone, and in the captions
        Image.fromarray(picture).save(file := io.BytesIO(), "WebP", quality=80, method=1)
        reason = f": {reasons[image_id]}" if image_id in reasons else ""
        pictures.append((f"{names[image_id]}{reason}", file.getvalue()))
    return pictures
