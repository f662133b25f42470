"""The recipe of a config, for the images per iteration that the user can afford.

A config states its recipe once, for ``SOLVER.REFERENCE_BATCH_SIZE`` images per iteration. The
linear rule (Goyal et al., https://arxiv.org/abs/1706.02677, section 2.1) carries it over to others:
the learning rate grows with the images of an iteration, and all that counts iterations shrinks, so
that the same images are seen. GN has no batch statistics: nothing else depends on the batch.
"""

from __future__ import annotations

import logging

from tabulate import tabulate

from gn_detect.config import ConfigError
from gn_detect.settings import Settings

logger = logging.getLogger(__name__)

_LEARNING_RATES = ("base_lr", "base_lr_end")
_ITERATIONS = ("max_iter", "steps", "warmup_iters")
_PERIODS = ("checkpoint_period", "eval_period")


def resolve_schedule(run: Settings, processes: int, num_images: int | None = None) -> None:
    """Settle images, learning rate and iterations of a run, in place, and log what was derived.

    With ``SOLVER.IMS_PER_GPU``, ``SOLVER.IMS_PER_BATCH`` becomes the images of one iteration:
    ``IMS_PER_GPU x processes x ACCUMULATE_STEPS``, and the recipe follows from it by the linear
    rule. Iterations are rounded up, so warm-up and training are never shorter than the recipe's, in
    images. Without, ``IMS_PER_BATCH`` and the recipe are taken as stated.

    The result is a recipe for the new batch: ``REFERENCE_BATCH_SIZE`` is then ``IMS_PER_BATCH``,
    so resolving it again changes nothing.

    Args:
        run: of a YAML config, or of a lazy one, where drops and warm-up are relative to
            ``train.max_iter``, and follow it.
        processes: on all machines.
        num_images: that are trained on; None where it is not known.

    Raises:
        ConfigError: a key that contradicts another, or the number of processes.
    """
    keys, steps = run.keys, run["accumulate_steps"]
    accumulate = 1 if steps is None else steps
    if accumulate != "auto" and (type(accumulate) is not int or accumulate < 1):
        raise ConfigError(
            f"{keys['accumulate_steps']} is {accumulate!r}; it must be a positive number or 'auto'"
        )
    if run["ims_per_gpu"] < 0 or run["reference_batch_size"] < 1:
        raise ConfigError(
            f"{keys['ims_per_gpu']} is {run['ims_per_gpu']} and {keys['reference_batch_size']} is "
            f"{run['reference_batch_size']}; both count images"
        )
    if run["ims_per_gpu"]:
        _derive(run, processes, accumulate)
    else:
        _check_stated(run, processes, accumulate)
        run["accumulate_steps"] = accumulate


def _check_stated(run: Settings, processes: int, accumulate: int | str) -> None:
    keys = run.keys
    if accumulate == "auto":
        raise ConfigError(
            f"{keys['accumulate_steps']} is 'auto', which restores the reference batch from the "
            f"images of one GPU: set {keys['ims_per_gpu']}"
        )
    if run["reference_world_size"]:
        if accumulate > 1:
            raise ConfigError(
                f"{keys['reference_world_size']} is {run['reference_world_size']} and "
                f"{keys['accumulate_steps']} is {accumulate}: Detectron2's scaling knows nothing "
                f"of accumulation; set the former to 0, and {keys['ims_per_gpu']} to the images of "
                "a GPU"
            )
        return  # Detectron2 scales the batch later, and checks it
    images = run["ims_per_batch"]
    if images < 1 or images % (processes * accumulate):
        raise ConfigError(
            f"{keys['ims_per_batch']} is {images}, the images of one iteration; it must be a "
            f"multiple of {processes * accumulate}: the processes ({processes}) times "
            f"{keys['accumulate_steps']} ({accumulate})"
        )


def _derive(run: Settings, processes: int, accumulate: int | str) -> None:
    keys, reference = run.keys, run["reference_batch_size"]
    if run["ims_per_batch"] != reference:
        raise ConfigError(
            f"{keys['ims_per_batch']} is {run['ims_per_batch']}, but "
            f"{keys['reference_batch_size']}, for which the recipe is stated, is {reference}: with "
            f"{keys['ims_per_gpu']}, leave {keys['ims_per_batch']} out; for a recipe of your own, "
            "set both to its images"
        )
    if run["reference_world_size"]:
        raise ConfigError(
            f"{keys['reference_world_size']} is {run['reference_world_size']} and "
            f"{keys['ims_per_gpu']} is {run['ims_per_gpu']}: both scale the recipe; set one of "
            "them to 0"
        )
    images = run["ims_per_gpu"] * processes
    if accumulate == "auto":
        accumulate = -(-reference // images)
    images *= accumulate

    stated = [n for n in (*_LEARNING_RATES, *_ITERATIONS, *_PERIODS) if run[n] is not None]
    recipe = {name: run[name] for name in stated}
    for name, value in recipe.items():
        if name in _LEARNING_RATES:
            value = value * images / reference
        elif name in _PERIODS:
            value = max(1, round(value * reference / images)) if value > 0 else value
        elif isinstance(value, int):
            value = -(-value * reference // images)
        else:
            value = tuple(-(-v * reference // images) for v in value)
        run[name] = value
    if run["steps"]:  # large batches can round a step up to another, or to the end
        run["steps"] = tuple(sorted({step for step in run["steps"] if step < run["max_iter"]}))
    run["ims_per_batch"] = run["reference_batch_size"] = images
    run["accumulate_steps"] = accumulate

    rows = [[keys[name], value, run[name]] for name, value in recipe.items() if value]
    rows.insert(0, [keys["ims_per_batch"], reference, images])
    per_gpu, steps = (keys[n].rpartition(".")[2] for n in ("ims_per_gpu", "accumulate_steps"))
    logger.info(
        f"{images} images per iteration = {processes} (processes) x {run['ims_per_gpu']} "
        f"({per_gpu}) x {accumulate} ({steps}); by the linear rule:\n"
        + tabulate(rows, headers=["key", "recipe", "this run"], disable_numparse=True)
    )
