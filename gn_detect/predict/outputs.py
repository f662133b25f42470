"""What is found in images, as files: pictures, videos, COCO results, and a COCO dataset."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import supervision as sv
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_util

from gn_detect.config import ConfigError
from gn_detect.data.formats.from_coco import outlines
from gn_detect.drawing import XYWH_TO_XYXY, draw, from_coco

from .inputs import Input

logger = logging.getLogger(__name__)
# Which logs a traceback of what it raises.
logging.getLogger("supervision.utils.video").setLevel(logging.CRITICAL)

_PICTURES = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}
_PICTURES |= {".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
SAME_MASK = 0.99  # IoU, from which on polygons stand for a mask
_RESERVED = ("annotations.json", "predictions.json")


def plan_outputs(inputs: Sequence[Input], folder: Path, overwrite: bool) -> list[Path]:
    """Where to draw each input: by its name below ``folder``, no two alike.

    Raises:
        ConfigError: the folder holds files, and ``overwrite`` is False; or an input would be
            replaced.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(
            f"--output: {folder} holds other files; name another folder, or say --overwrite to "
            "replace what has the names of the results"
        )
    targets = dict.fromkeys(folder / name for name in _RESERVED)
    for item in inputs:
        target = folder / item.name
        kept = {".mp4": ""} if item.is_video else _PICTURES
        while target.suffix.lower() not in kept or target in targets:
            target = target.with_name(target.name + (".mp4" if item.is_video else ".png"))
        targets[target] = None
    if replaced := {item.path.resolve() for item in inputs} & {t.resolve() for t in targets}:
        raise ConfigError(
            f"--output: {folder} holds {min(replaced)}, an input, which its own picture would "
            "replace; name another folder"
        )
    return list(targets)[len(_RESERVED) :]


@contextlib.contextmanager
def written_as(path: Path) -> Iterator[Path]:
    """The name to write a file under, which becomes ``path`` when it is whole.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = path.with_name(f".partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}); free space there, or name "
            "another folder with --output"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def results_file(
    path: Path, head: str = "[\n", tail: Callable[[], str] = lambda: "\n]\n"
) -> Iterator[Callable[[list[dict]], None]]:
    """What writes items of a JSON array into ``path``, one after another, so that they need no
    memory; ``head`` and ``tail`` are around them."""
    separators = itertools.chain([b""], itertools.repeat(b",\n"))
    with written_as(path) as partial, open(partial, "wb") as file:
        file.write(head.encode())
        yield lambda items: file.writelines(
            next(separators) + msgspec.json.encode(item) for item in items
        )
        file.write(tail().encode())


@contextlib.contextmanager
def dataset_files(
    folder: Path,
    class_names: Sequence[str],
    keypoint_names: Sequence[str] = (),
    score: float = 0.5,
) -> Iterator[Callable[[str, Sequence[int], list[dict]], None]]:
    """What writes ``predictions.json`` and ``annotations.json`` into a folder, image by image,
    given its file name, (height, width), and :func:`to_results`. The second file has what has at
    least ``score``, and a mask of at least one pixel where there are masks; the id of a class is
    its position from 1."""
    keypoints = {"keypoints": list(keypoint_names), "skeleton": []} if keypoint_names else {}
    categories = [{"id": i, "name": name, **keypoints} for i, name in enumerate(class_names, 1)]
    images, ids, empty = [], itertools.count(1), []

    def tail() -> str:
        rest = msgspec.json.encode({"images": images, "categories": categories})
        return "\n], " + rest.decode()[1:]

    with (
        results_file(folder / "predictions.json") as add_results,
        results_file(folder / "annotations.json", '{"annotations": [\n', tail) as annotate,
    ):

        def add(file_name: str, size: Sequence[int], results: list[dict]) -> None:
            image = {"id": len(images) + 1, "file_name": file_name}
            images.append({**image, "height": size[0], "width": size[1]})
            results = [as_written(result, image["id"]) for result in results]
            add_results(results)
            kept = [_annotation(result) for result in results if result["score"] >= score]
            annotate([{"id": next(ids), **annotation} for annotation in kept if annotation])
            empty.extend(file_name for annotation in kept if not annotation)

        yield add
    if empty:
        logger.warning(
            f"{folder / 'annotations.json'} lacks {len(empty)} objects whose masks have no pixel, "
            f"such as one in {empty[0]}; {folder / 'predictions.json'} has them"
        )


def to_results(instances: Instances) -> list[dict]:
    """COCO results as Detectron2's evaluation makes them, with classes of the model in place of
    ids."""
    masks = instances.get_fields().get("pred_masks")
    if not hasattr(masks, "rles"):
        return instances_to_coco_json(instances, 0)
    fields = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
    results = instances_to_coco_json(Instances(instances.image_size, **fields), 0)
    return [{**r, "segmentation": rle} for r, rle in zip(results, masks.rles(), strict=True)]


def as_written(result: dict, image_id: int) -> dict:
    return {**result, "image_id": image_id, "category_id": result["category_id"] + 1}


def _annotation(result: dict) -> dict | None:
    """For training; None where the mask is empty."""
    box = result["bbox"]
    annotation = {**result, "area": box[2] * box[3], "iscrowd": 0}
    if rle := result.get("segmentation"):
        if not (area := mask_util.area(rle).item()):
            return None
        box = mask_util.toBbox(rle).tolist()  # which a model's is not exactly
        annotation.update(segmentation=_polygons(rle) or rle, area=area, bbox=box)
    if keypoints := result.get("keypoints"):
        labeled = np.reshape(keypoints, (-1, 3))
        labeled[:, 2] = 2  # visible, in place of a score
        annotation.update(keypoints=labeled.ravel().tolist(), num_keypoints=len(labeled))
    return annotation


def _polygons(rle: dict) -> list[list[float]] | None:
    """A mask as tools for labelling have it; None where polygons are another mask, as with holes
    and single pixels."""
    polygons = [o[(o != np.roll(o, 1, axis=0)).any(axis=1)] for o in outlines(rle)]
    polygons = [polygon.ravel().tolist() for polygon in polygons if len(polygon) > 2]
    if not polygons:
        return None
    drawn = mask_util.merge(mask_util.frPyObjects(polygons, *rle["size"]))
    return polygons if mask_util.iou([drawn], [rle], [0])[0, 0] >= SAME_MASK else None


def draw_results(pixels: np.ndarray, results: list[dict], names: Sequence[str]) -> np.ndarray:
    """:func:`gn_detect.drawing.draw`, of :func:`to_results`."""
    if not results:
        return pixels
    keypoints = np.array([result.get("keypoints", ()) for result in results])
    keypoints = keypoints.reshape(len(results), -1, 3) + [0.5, 0.5, 0]  # COCO counts from 0
    detections = from_coco(
        np.array([result["bbox"] for result in results]) @ XYWH_TO_XYXY,
        np.array([result["category_id"] for result in results]),
        [result["segmentation"] for result in results if "segmentation" in result],
        pixels.shape[:2],
        confidence=np.array([result["score"] for result in results]),
    )
    return draw(pixels, detections, names, keypoints if keypoints.size else None)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    with written_as(path) as partial:
        try:
            Image.fromarray(pixels).save(partial, format=_PICTURES[path.suffix.lower()], quality=90)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None):
                raise
            # Of the encoder: more pixels on a side than the format has.
            raise ConfigError(f"{path} cannot be written ({error}); use --no-pictures") from None


@contextlib.contextmanager
def video_file(
    path: Path, height: int, width: int, fps: float
) -> Iterator[Callable[[np.ndarray], None]]:
    """What writes frames, (height, width, 3) uint8 RGB, into an MP4 (H.264) of that many frames per
    second; odd sides are made even, which the encoder needs, by repeating the last pixels."""
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    info = sv.VideoInfo(width + width % 2, height + height % 2, fps)
    with written_as(path) as partial, sv.VideoSink(str(partial), info, codec="avc1") as sink:
        yield lambda frame: sink.write_frame(np.pad(frame[..., ::-1], odd, mode="edge"))
