"""COCO results: the detections that an evaluation writes, typed and held against its dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import msgspec

from . import DataError
from .coco_data import CocoData
from .coco_file import NULL, decode_json, shown, whole
from .coco_masks import MaskError, decode_mask


class Result(msgspec.Struct, gc=False):
    """A detection.

    Attributes:
        image_id, category_id: as in the dataset.
        bbox: x, y, width, height in pixels.
        segmentation: JSON; from :func:`read_results`, polygons, a compressed RLE, or None.
    """

    image_id: int | float | str
    category_id: int | float | str
    bbox: tuple[float, float, float, float]
    score: float
    segmentation: msgspec.Raw = NULL


_decode = msgspec.json.Decoder(list[Result]).decode


def read_results(
    results_json: str,
    data: CocoData,
    score_threshold: float = 0,
    images: Collection[int | str] | None = None,
) -> dict[int | str, list[Result]]:
    """Read what Detectron2's ``COCOEvaluator`` writes to ``coco_instances_results.json``.

    Args:
        data: the dataset that it was computed on.
        score_threshold: results below it are left out.
        images: ids of those whose results are wanted; None: of all.

    Returns:
        image id -> its results; none for an image without.

    Raises:
        DataError: the file cannot be read, or a result is of another dataset.
    """

    def decode(content: bytes | memoryview) -> list[Result]:
        try:
            return _decode(content)
        except msgspec.ValidationError as error:
            raise DataError(
                f"{results_json} is not a list of COCO results, each with bbox, category_id, "
                "image_id and score, such as Detectron2 writes to coco_instances_results.json: "
                f"{error}"
            ) from None

    results = decode_json(results_json, decode)
    sizes = zip(data.heights.tolist(), data.widths.tolist(), strict=True)
    known_sizes = dict(zip(data.image_ids, sizes, strict=True))
    wanted = known_sizes.keys() if images is None else set(images)
    found = defaultdict(list)
    for result in results:
        for key, known in (("image_id", known_sizes), ("category_id", data.classes)):
            id_ = getattr(result, key)
            if whole(id_) not in known:
                raise DataError(
                    f"{results_json} has an object with the {key} {shown(id_)}, which "
                    f"{data.json_file} does not list; give the dataset that the results were "
                    "computed on"
                )
            setattr(result, key, whole(id_))
        if result.score >= score_threshold and result.image_id in wanted:
            size = known_sizes[result.image_id]
            try:
                mask = decode_mask(result.segmentation, *size)
            except MaskError as error:
                raise DataError(
                    f"{results_json}: an object of image {result.image_id!r} {error}"
                ) from None
            rle = {"size": size, "counts": mask} if isinstance(mask, str) else None
            result.segmentation = rle or [p for p in mask or () if len(p) >= 6]
            found[result.image_id].append(result)
    return found
