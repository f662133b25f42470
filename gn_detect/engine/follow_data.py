"""What of a model follows from its data, or from its weights: classes, keypoints, form of masks."""

from __future__ import annotations

import logging
import textwrap

from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from torchvision.datasets.folder import find_classes

from gn_detect.checkpoint import Weights
from gn_detect.checkpoint.coverage import num_classes, num_keypoints
from gn_detect.config import ConfigError
from gn_detect.data.coco import CocoSummary, DataError
from gn_detect.data.keypoints import OKS_SIGMA, flip_indices, flip_pairs, mirrored
from gn_detect.distributed import on_each_machine
from gn_detect.settings import Settings

from .lazy_config import instantiate_key

logger = logging.getLogger(__name__)


def resolve_masks(run: Settings, train: tuple[str, ...], summaries: dict[str, CocoSummary]) -> None:
    """Take masks as bitmaps where one of the datasets ``train`` has them as RLE."""
    for name in train if run["masks"] else ():
        if name in summaries and summaries[name].has_rle and run["mask_format"] != "bitmask":
            reason = f"{name} has masks as RLE"
            run.derive("mask_format", "bitmask", reason, needed=True)
            logger.info(f"{run.keys['mask_format']} = bitmask: {reason}")


def resolve_classes(run: Settings, summaries: dict[str, CocoSummary]) -> None:
    """Set the number of classes, or check the one that is stated.

    Raises:
        ConfigError, DataError: it is not that of the data, or the datasets differ.
    """
    if "num_classes" not in run.keys:  # of a lazy config: a model of its own kind
        return
    if not summaries:
        _need(run, "num_classes")
        return
    (first, summary), *others = summaries.items()
    for name, other in others:
        if other.classes != summary.classes:
            differ = sorted(dict(other.classes.items() ^ summary.classes.items()), key=str)
            raise DataError(
                f"the datasets {first} and {name} declare different categories (ids "
                f"{', '.join(map(str, differ[:10]))}); ids and names must be the same in both"
            )
    _follow(run, "num_classes", first, "categories", list(summary.classes.values()))


def resolve_folders(run: Settings, *, training: bool) -> int | None:
    """Set the number of classes of a classifier from the folders of its images, or check the one
    that is stated.

    Returns:
        how many images there are to train on; None without such folders.

    Raises:
        ConfigError, DataError: a folder cannot be read, it is not that of the data, or the folders,
            or the machines, differ.
    """
    splits = [s for s in ("train", "test")[not training :] if run[f"{s}_folder"]]
    if not splits or "num_classes" not in run.keys:
        return None

    def look() -> list[tuple[str, int, list[str]]]:
        return [
            (root, len(instantiate_key(run.cfg, f"dataloader.{s}.dataset")), find_classes(root)[0])
            for s in splits
            for root in [run[f"{s}_folder"]]
        ]

    machines = on_each_machine(look)
    (root, count, classes), *others = found = next(iter(machines.values()))
    for name, theirs in machines.items():
        if other := [mine[0] for mine, its in zip(found, theirs, strict=True) if mine != its]:
            raise DataError(f"{name} has other images or classes in {other[0]}; copy them anew")
    for other, _, theirs in others:
        if theirs != classes:
            differ = ", ".join(sorted({*theirs} ^ {*classes})[:10])
            raise DataError(
                f"{root} and {other} differ in their classes ({differ}); make them equal"
            )
    _follow(run, "num_classes", root, "classes", classes)
    logger.info("; ".join(f"{root}: {count} images" for root, count, _ in found))
    return count if training else None


def resolve_keypoints(run: Settings, summaries: dict[str, CocoSummary], *, training: bool) -> None:
    """Set the number of keypoints, their tolerances in OKS, and what a flip exchanges, or check
    what is stated of them.

    Raises:
        ConfigError, DataError: it is not that of the data, or the datasets differ.
    """
    if not run["keypoints"] or "num_keypoints" not in run.keys:
        return
    named = {name: summary.keypoints for name, summary in summaries.items() if summary.keypoints}
    if not named:
        _need(run, "num_keypoints")
        return
    (first, names), *others = named.items()
    for name, other in others:
        if other != names:
            raise DataError(
                f"the datasets {first} and {name} have different keypoints ({', '.join(names)} and "
                f"{', '.join(other)}); names and order must be the same in both"
            )
    _follow(run, "num_keypoints", first, "keypoints", names)
    _resolve_sigmas(run, names)
    if training:
        _resolve_flip(run, names)


def _need(run: Settings, what: str) -> None:
    if run[what] is None:
        raise ConfigError(f"{run.keys[what]}: no dataset in COCO format declares it; set it")


def _follow(run: Settings, what: str, dataset: str, things: str, names: list[str]) -> None:
    key, stated, count = run.keys[what], run[what], len(names)
    if stated is not None and stated != count:
        raise ConfigError(
            f"{key} is {stated}, but the dataset {dataset} declares {count} {things}; set it to "
            f"{count}, or leave it out of a YAML config, and it follows the data"
        )
    run.derive(what, count, f"the dataset {dataset} declares {count} {things}", needed=True)
    shown = textwrap.shorten(", ".join(names), 2000, placeholder=" ...")  # ImageNet has 1000
    logger.info(f"{key} = {count}, from the dataset {dataset}: {shown}")


def _resolve_sigmas(run: Settings, names: list[str]) -> None:
    if "oks_sigmas" not in run.keys:  # of a lazy config: an evaluation of its own kind
        return
    key, sigmas = run.keys["oks_sigmas"], run["oks_sigmas"]
    if sigmas:
        numbers = all(isinstance(s, (int, float)) and s > 0 for s in sigmas)
        if not numbers or len(sigmas) != len(names):
            raise ConfigError(
                f"{key} is {list(sigmas)}; it must be {len(names)} positive numbers, one for each "
                f"keypoint ({', '.join(names)}), or empty"
            )
    elif names != list(COCO_PERSON_KEYPOINT_NAMES):
        reason = f"the data have {len(names)} keypoints of their own"
        run.derive("oks_sigmas", [OKS_SIGMA] * len(names), reason, needed=True)
        logger.info(
            f"{key} = {OKS_SIGMA} for each keypoint, the mean of COCO's: OKS has tolerances for "
            "COCO's own keypoints alone. The AP of keypoints depends on them; set them to compare "
            "with others"
        )


def _resolve_flip(run: Settings, names: list[str]) -> None:
    stated = run["flip_pairs"]
    pairs = flip_pairs(names, stated)
    if (run["flip"] or "horizontal") != "horizontal":
        return
    if "flip_indices" in run.keys:
        _resolve_flip_indices(run, names, flip_indices(names, pairs))
        return
    paired = {name for pair in pairs for name in pair}
    exchanged = ", ".join("/".join(pair) for pair in pairs) or "no keypoints"
    text = f"the horizontal flip exchanges {exchanged}"
    if kept := [name for name in names if name not in paired]:
        text += f"; {', '.join(kept)} {'keep their' if len(kept) > 1 else 'keeps its'} identity"
    if stated is None and (not pairs or any(mirrored(name) != name for name in kept)):
        logger.warning(f"{text}. If it should exchange more, set {run.keys['flip_pairs']}")
    else:
        logger.info(text)


def _resolve_flip_indices(run: Settings, names: list[str], derived: list[int]) -> None:
    key, stated = run.keys["flip_indices"], run["flip_indices"]
    if stated is None:
        reason = "a flip exchanges keypoints of the data by their names"
        run.derive("flip_indices", derived, reason, needed=True)
        logger.info(f"{key} = {derived}, from the names of the keypoints")
    elif sorted(stated) != list(range(len(names))):
        raise ConfigError(
            f"{key} is {list(stated)}, but the data have {len(names)} keypoints "
            f"({', '.join(names)}); by their names it is {derived}"
        )
    elif list(stated) != derived:
        logger.warning(f"{key} is {list(stated)}; by the names of the keypoints it is {derived}")


def outputs_from_weights(cfg: CfgNode, weights: Weights) -> None:
    """Set the numbers of classes and keypoints from the predictors in ``weights`` where ``cfg``
    leaves them open; to 1 and COCO's 17 where there are none."""
    run = Settings(cfg)
    if run["num_classes"] is None:
        run["num_classes"] = num_classes(weights.shapes) or 1
    if run["num_keypoints"] is None:
        run["num_keypoints"] = num_keypoints(weights.shapes) or 17
