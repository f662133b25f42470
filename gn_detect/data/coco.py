"""COCO-format data: registered, and looked through before a run starts.

A file is read once (``coco_pack.py``): the check, Detectron2's loader and the evaluation see what
came out of that. What Detectron2 and pycocotools would report in the middle of a run, or never, is
found here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, register_coco_instances
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError

from . import DataError
from .cache import cache_file, write_cache
from .coco_boxes import check_boxes
from .coco_check import check_classes, check_keypoints, check_masks, check_objects
from .coco_data import CocoData
from .coco_pack import read_coco
from .image_check import check_images
from .keypoints import keypoint_metadata, keypoint_names, keypoint_warnings
from .paths import find_files

logger = logging.getLogger(__name__)

# Datasets with instances in a COCO JSON, by the evaluator that Detectron2 declares for them.
COCO_EVALUATORS = ("coco", "coco_panoptic_seg")

_KEYS = {  # of YAML configs
    "masks": "MODEL.MASK_ON",
    "keypoints": "MODEL.KEYPOINT_ON",
    "BOX_FORMAT": "GUARDS.BOX_FORMAT",
    "FILE_NAMES": "GUARDS.FILE_NAMES",
}
_LARGE = 1 << 20  # bytes of JSON from which on reading its packed form is worth writing it
_loaded: weakref.WeakValueDictionary[tuple, CocoData] = weakref.WeakValueDictionary()


@dataclass
class CocoSummary:
    """What :func:`check_coco_json` found.

    Attributes:
        classes: category id -> name, ordered by id, as Detectron2 orders its classes.
        num_images, num_annotations: as listed in the file.
        num_trained: of the images, those that are trained on, an epoch.
        num_crowds: annotations that are crowd regions: no objects to be trained on.
        has_rle: an object (not a crowd region) has its mask as RLE.
        keypoints: their names, where the model needs them.
        warnings: what was mended, left out, or looks wrong, one sentence each.
    """

    classes: dict[int | str, str]
    num_images: int
    num_trained: int = 0
    num_annotations: int = 0
    num_crowds: int = 0
    has_rle: bool = False
    keypoints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.num_images} images, {self.num_annotations} annotations"
        if self.num_crowds:
            text += f" ({self.num_crowds} of them crowds, which are not trained on)"
        return text


def load_coco(json_file: str) -> CocoData:
    """Read a COCO JSON, once on this machine: other processes, and later runs, find its packed form
    in the cache of Detectron2's downloads, by its path, size and time.

    Raises:
        DataError: see :func:`.coco_pack.read_coco`.
    """
    json_file = PathManager.get_local_path(json_file)
    try:
        status = os.stat(json_file)
    except OSError as error:
        raise DataError(f"cannot read {json_file}: {error.strerror or error}") from None
    key = (json_file, status.st_size, status.st_mtime_ns)
    if (data := _loaded.get(key)) is None:
        data = _read_packed(*key) if status.st_size >= _LARGE else read_coco(json_file)
        _loaded[key] = data
    return data


def _read_packed(json_file: str, size: int, time: int) -> CocoData:
    packed = cache_file("coco", json_file)
    stamp = f"{size} {time}"
    if os.path.isfile(packed):
        try:
            if (data := CocoData.load(packed, stamp)) is not None:
                return data
        except (OSError, SafetensorError, ValueError) as error:  # ValueError: of msgspec
            logger.warning(f"{packed} cannot be read ({error}): {json_file} is read again")
    data = read_coco(json_file)
    write_cache(packed, lambda path: data.save(path, stamp))
    return data


def register_coco_json(name: str, json_file: str, image_root: str) -> None:
    """Register a COCO JSON under ``name``, in place of what had that name before."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    _register(name, json_file, image_root)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def output_names(datasets: Sequence[str], keypoints: bool) -> dict[str, list[str]]:
    """The names of the ``"classes"`` and, for a model with ``keypoints``, the ``"keypoints"`` of
    registered datasets, which have the same ones, in order; without those that they do not tell."""
    if not datasets:
        return {}
    metadata = MetadataCatalog.get(datasets[0])
    names = {"classes": metadata.get("thing_classes")}
    if keypoints:
        names["keypoints"] = metadata.get("keypoint_names")
    in_coco_format = metadata.get("evaluator_type") in COCO_EVALUATORS
    if None in names.values() and in_coco_format and metadata.get("json_file"):
        data = load_coco(metadata.json_file)
        found = {"classes": data.classes.values(), "keypoints": keypoint_names(data)}
        names = {kind: known or found[kind] for kind, known in names.items()}
    return {kind: list(known) for kind, known in names.items() if known}


def read_canonical(*names: str, exact_names: bool = True) -> None:
    """Let what Detectron2 would read from a COCO JSON for these datasets come from
    :func:`load_coco`; datasets that a user's own function reads are left as they are.

    Args:
        exact_names: see :func:`.paths.find_files`.
    """
    readers = (__name__, register_coco_instances.__module__, merge_to_panoptic.__module__)
    for name in names:
        if name not in DatasetCatalog.list() or DatasetCatalog[name].__module__ not in readers:
            continue
        metadata = MetadataCatalog.get(name)
        if metadata.evaluator_type == "coco" or metadata.get("sem_seg_root"):
            DatasetCatalog.remove(name)
            files = metadata.json_file, metadata.image_root, metadata.get("sem_seg_root")
            _register(name, *files, exact_names=exact_names)


def _register(
    name: str,
    json_file: str,
    image_root: str,
    sem_seg_root: str | None = None,
    exact_names: bool = True,
) -> None:
    def load() -> list[dict]:
        data, metadata = load_coco(json_file), MetadataCatalog.get(name)
        order = {id_: i for i, id_ in enumerate(data.classes)}
        classes = list(data.classes.values())
        try:
            metadata.set(thing_classes=classes, thing_dataset_id_to_contiguous_id=order)
        except AssertionError:  # of Detectron2, for another value
            raise DataError(f"{json_file}: its categories were changed; start again") from None
        with contextlib.suppress(DataError):  # for a model with keypoints, they have been checked
            keypoints = keypoint_metadata(data).items()
            metadata.set(**{k: v for k, v in keypoints if metadata.get(k) is None})
        names = data.file_names
        if not exact_names:
            names, _ = find_files(json_file, image_root, names, exact=False)  # the check has warned
        dicts = data.dicts(image_root, names)
        if not sem_seg_root:
            return dicts
        return merge_to_panoptic(dicts, load_sem_seg(sem_seg_root, image_root))

    DatasetCatalog.register(name, load)


def check_coco_dataset(name: str, **needs: Any) -> CocoSummary | None:
    """Check a registered dataset, generating it first if it is a generated one.

    Args:
        **needs: of :func:`check_coco_json`.

    Returns:
        the summary, or None for a dataset that is not a COCO JSON.

    Raises:
        DataError: see :func:`check_coco_json`; or no dataset has this name.
    """
    if name not in DatasetCatalog.list():
        raise DataError(
            f"DATASETS names {name!r}, which is not registered. For data of your own, use "
            "--train-json, --train-images, --val-json and --val-images (or register_coco_json in a "
            "lazy config)"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in COCO_EVALUATORS:
        return None
    if metadata.get("generate"):
        metadata.generate()
    if not metadata.get("json_file"):
        return None  # its dicts are the ground truth, which Detectron2 converts
    if name.startswith("coco_") and not os.path.isfile(metadata.json_file):
        raise DataError(
            f"{name}: there is no {metadata.json_file}; set DETECTRON2_DATASETS to the directory "
            "of coco/"
        )
    names = list(load_coco(metadata.json_file).classes.values())
    if metadata.get("thing_classes", names) != names:
        raise DataError(
            f"{metadata.json_file} declares other categories than the dataset {name} of Detectron2 "
            "has; register it under a name of its own"
        )
    summary = check_coco_json(metadata.json_file, metadata.image_root, **needs)
    names = list(metadata.get("keypoint_names", summary.keypoints))
    if summary.keypoints and len(names) != len(summary.keypoints):
        raise DataError(
            f"{metadata.json_file} has {len(summary.keypoints)} keypoints, the metadata of the "
            f"dataset {name} name {len(names)}; register it under a name of its own"
        )
    summary.keypoints = names if summary.keypoints else []
    return summary


def check_coco_json(
    json_file: str,
    image_root: str,
    *,
    masks: bool,
    training: bool,
    evaluation: bool,
    keypoints: bool = False,
    box_format: bool = True,
    exact_names: bool = True,
    bit_depth_range: Sequence[float] = (),
    filter_empty: bool = True,
    min_keypoints: int = 0,
    keys: Mapping[str, str] = _KEYS,
) -> CocoSummary:
    """Look through a COCO JSON and the headers of its images.

    Args:
        masks: the model needs the masks of the objects.
        training: the file is trained on. If not, it may lack annotations altogether, as the test
            sets of COCO do: Detectron2 then writes predictions without scoring them.
        evaluation: pycocotools scores against the file: crowd regions need masks, too.
        keypoints: the model needs the keypoints of the objects.
        box_format: refuse boxes that seem to be in another format than COCO's.
        exact_names: see :func:`.paths.find_files`.
        bit_depth_range: see :func:`.images.value_range`.
        filter_empty, min_keypoints: see :meth:`.CocoData.num_trained`.
        keys: of the config, by their names in ``Settings.keys``, for messages.

    Raises:
        DataError: the file is missing, truncated or empty, an image is absent, or an annotation
            cannot be used; the message names the first such item.
    """
    data = load_coco(json_file)
    files, warnings = find_files(
        *(json_file, image_root, data.file_names), exact=exact_names, key=keys["FILE_NAMES"]
    )
    warnings += check_images(
        *(json_file, image_root, files, data.heights, data.widths), bit_depth_range=bit_depth_range
    )
    if data.has_annotations:
        if masks:
            needed = ~data.crowd | evaluation
            check_masks(data, needed, scored=evaluation, key=keys["masks"])
        if keypoints:
            check_keypoints(data, keys["keypoints"])
            warnings += keypoint_warnings(data)
        warnings += [*data.mended, *check_objects(data, masks)]
        warnings += check_boxes(data, masks, box_format, keys["BOX_FORMAT"])
        if training:
            warnings += check_classes(data)
    elif training:
        raise DataError(f"{json_file} is not in COCO format: it has no list 'annotations'")
    for warning in warnings:
        logger.warning(f"{json_file}: {warning}")
    return CocoSummary(
        classes=data.classes,
        num_images=len(data.image_ids),
        num_trained=data.num_trained(filter_empty, min_keypoints),
        num_annotations=len(data.image) + data.unknown_images[0],
        num_crowds=int(data.crowd.sum()),
        has_rle=any(not data.crowd[i] for i in data.rles),
        keypoints=keypoint_names(data) if keypoints else [],
        warnings=warnings,
    )
