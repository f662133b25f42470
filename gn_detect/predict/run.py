"""Prediction on files: what ``tools/predict.py`` does."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from gn_detect.config import ConfigError
from gn_detect.data import DataError

from .inputs import Input, open_video
from .outputs import (
    as_written,
    dataset_files,
    draw_results,
    results_file,
    to_results,
    video_file,
    write_picture,
)
from .predictor import Predictor

logger = logging.getLogger(__name__)

T = TypeVar("T")
FPS = 25.0  # of a video that does not tell


@dataclasses.dataclass
class Summary:
    """What was found.

    Attributes:
        images, frames: predicted on.
        found: objects in them.
        shown: of these, of at least the score asked for.
        highest: score of the others.
        failed: a sentence for each input that could not be used, or not to its end.
    """

    images: int = 0
    frames: int = 0
    found: int = 0
    shown: int = 0
    highest: float = 0.0
    failed: list[str] = dataclasses.field(default_factory=list)
    interrupted: bool = False

    def text(self, score: float, output: Path, root: Path) -> str:
        """For a person."""
        kinds = [(self.images, "image"), (self.frames, "frame")]
        where = [f"{count} {kind}{'s' * (count > 1)}" for count, kind in kinds if count]
        where = " and ".join(where) or "no image"
        text = f"{output}: {self.found} object{'s' * (self.found != 1)} in {where}, "
        text += f"{self.shown} of score >= {score:g}"
        if self.found and not self.shown:
            text += f": the highest score is {self.highest:.4f}, so nothing is drawn; lower --score"
        if self.images:
            text += f"\n{output / 'predictions.json'}: all of them"
            text += f"\n{output / 'annotations.json'}: those of score >= {score:g}, "
            text += f"of images whose file names are those below {root}"
        return text

    def fail(self, reason: str) -> None:
        logger.warning(reason)
        self.failed.append(reason)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    targets: Sequence[Path],
    output: Path,
    *,
    classes: Sequence[str] = (),
    score: float = 0.5,
    batch_size: int = 1,
    pictures: bool = True,
) -> Summary:
    """Predict on images and videos, one after the other.

    Args:
        predictor: or another kind of one, such as a ``TiledPredictor``.
        inputs, targets: of :func:`.inputs.find_inputs` and :func:`.outputs.plan_outputs`.
        output: the folder of ``predictions.json`` and ``annotations.json``.
        classes: those that are kept, by name; all where it is empty.
        score: from which on objects are drawn, and annotations.
        batch_size: images at once.
        pictures: draw; otherwise a video has its results alone.

    Raises:
        ConfigError: a class that the model does not have; or nothing can be written.
    """
    class_names = predictor.class_names
    if unknown := [name for name in classes if name not in class_names]:
        raise ConfigError(
            f"--classes: the model has no class {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(class_names)}"
        )
    kept = {i for i, name in enumerate(class_names) if name in classes or not classes}
    summary = Summary()

    def found_in(items: Iterable[tuple[Any, np.ndarray]]) -> Iterator[tuple]:
        """With each of some ``(key, pixels)``, all that is found, and what is shown of it."""
        for key, pixels, instances in _in_batches(predictor, items, batch_size, summary):
            found = [r for r in to_results(instances) if r["category_id"] in kept]
            shown = [r for r in found if r["score"] >= score]
            below = [r["score"] for r in found if r["score"] < score]
            summary.found += len(found)
            summary.shown += len(shown)
            summary.highest = max([summary.highest, *below])
            yield key, pixels, found, shown

    pairs = list(zip(inputs, targets, strict=True))
    stills = [pair for pair in pairs if not pair[0].is_video]
    with _until_interrupted(summary):
        if stills:
            names = class_names, predictor.keypoint_names
            with _written_so_far(dataset_files(output, *names, score), summary) as add:
                images = _read(predictor, stills, summary)
                for (item, target), pixels, found, shown in found_in(images):
                    add(item.name, pixels.shape[:2], found)
                    if pictures:
                        write_picture(target, draw_results(pixels, shown, class_names))
                    summary.images += 1
        for item, target in pairs:
            if item.is_video and not summary.interrupted:
                _predict_video(item, target, found_in, class_names, pictures, summary)
    return summary


def _in_batches(
    predictor: Predictor, items: Iterable[tuple[Any, np.ndarray]], size: int, summary: Summary
) -> Iterator[tuple[Any, np.ndarray, Instances]]:
    for _, group in itertools.groupby(items, lambda item: item[1].shape):
        while batch := list(itertools.islice(group, size)):
            try:
                found = list(predictor.stream([pixels for _, pixels in batch]))
            except DataError as error:  # of their size, which is one
                if isinstance(batch[0][0], int):
                    raise  # of a video, all frames of which are so
                for (item, _), _ in batch:
                    summary.fail(f"{item.path}: {error}")
                continue
            for (key, pixels), instances in zip(batch, found, strict=True):
                yield key, pixels, instances


def _read(predictor: Predictor, stills: Sequence[tuple[Input, Path]], summary: Summary) -> Iterator:
    for item, target in tqdm(stills, unit=" images", disable=None):
        try:
            yield (item, target), predictor.read(item.path)
        except DataError as error:
            summary.fail(str(error))
        except MemoryError:
            summary.fail(f"{item.path}: there is no memory for so many pixels")


def _predict_video(
    item: Input,
    target: Path,
    found_in: Callable,
    class_names: Sequence[str],
    pictures: bool,
    summary: Summary,
) -> None:
    """Writes the results beside the video, with the numbers of the frames, from 0, as image ids."""
    try:
        info, frames = open_video(item.path)
    except DataError as error:
        return summary.fail(str(error))
    count, total, name = 0, info.total_frames or 0, target.name
    results = results_file(target.with_name(f"{name}.json"))
    with _written_so_far(results, summary) as add, contextlib.ExitStack() as files:
        write = None
        bar = tqdm(frames, desc=item.name, total=total or None, unit=" frames", disable=None)
        with _until_interrupted(summary):
            try:
                for number, pixels, found, shown in found_in(enumerate(bar)):
                    add([as_written(result, number) for result in found])
                    if pictures:
                        write = write or files.enter_context(
                            video_file(target, *pixels.shape[:2], info.fps or FPS)
                        )
                        write(draw_results(pixels, shown, class_names))
                    count += 1
            except DataError as error:
                return summary.fail(f"{item.path}: {error}")
    summary.frames += count
    if count < total and not summary.interrupted:
        summary.fail(f"{item.path}: {count} of {total} frames can be decoded; it may be cut off")


@contextlib.contextmanager
def _written_so_far(results: AbstractContextManager[T], summary: Summary) -> Iterator[T]:
    """``results``, which come to their end with what is found until an interruption, or until a
    picture or a video cannot be written."""
    failure = None
    with results as add, _until_interrupted(summary):
        try:
            yield add
        except ConfigError as error:
            failure = error
    if failure:
        raise ConfigError(f"{failure}. What was predicted until now is written") from None


@contextlib.contextmanager
def _until_interrupted(summary: Summary) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if not summary.interrupted:
            summary.fail("interrupted: what was predicted until now is written")
        summary.interrupted = True
