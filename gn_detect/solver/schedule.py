"""The recipe of a config, for the images per iteration that the user can afford.

A config states its recipe once, for ``SOLVER.REFERENCE_BATCH_SIZE`` images per iteration. The
linear rule (Goyal et al., https://arxiv.org/abs/1706.02677, section 2.1) carries it over to others:
the learning rate grows with the images of an iteration, and all that counts iterations shrinks, so
that the same images are seen. GN has no batch statistics: nothing else depends on the batch.
"""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from tabulate import tabulate

from gn_detect.config import ConfigError, locate

logger = logging.getLogger(__name__)

_LEARNING_RATES = ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END")
_ITERATIONS = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS")
_PERIODS = ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


def resolve_schedule(cfg: CfgNode, processes: int) -> None:
    """Settle images, learning rate and iterations of a run, in place, and log what was derived.

    With ``SOLVER.IMS_PER_GPU``, ``SOLVER.IMS_PER_BATCH`` becomes the images of one iteration:
    ``IMS_PER_GPU x processes x ACCUMULATE_STEPS``, and the recipe follows from it by the linear
    rule. Iterations are rounded up, so warm-up and training are never shorter than the recipe's, in
    images. Without, ``IMS_PER_BATCH`` and the recipe are taken as stated.

    The result is a recipe for the new batch: ``REFERENCE_BATCH_SIZE`` is then ``IMS_PER_BATCH``,
    so resolving it again changes nothing.

    Args:
        cfg: with the keys of ``add_gn_config``.
        processes: on all machines.

    Raises:
        ConfigError: a key that contradicts another, or the number of processes.
    """
    solver = cfg.SOLVER
    accumulate = 1 if solver.ACCUMULATE_STEPS is None else solver.ACCUMULATE_STEPS
    if accumulate != "auto" and (type(accumulate) is not int or accumulate < 1):
        raise ConfigError(
            f"SOLVER.ACCUMULATE_STEPS is {accumulate!r}; it must be a positive number or 'auto'"
        )
    if solver.IMS_PER_GPU < 0 or solver.REFERENCE_BATCH_SIZE < 1:
        raise ConfigError(
            f"SOLVER.IMS_PER_GPU is {solver.IMS_PER_GPU} and SOLVER.REFERENCE_BATCH_SIZE is "
            f"{solver.REFERENCE_BATCH_SIZE}; both count images"
        )
    if solver.IMS_PER_GPU:
        _derive(cfg, processes, accumulate)
    else:
        _check_stated(cfg, processes, accumulate)
        solver.ACCUMULATE_STEPS = accumulate


def _check_stated(cfg: CfgNode, processes: int, accumulate: int | str) -> None:
    if accumulate == "auto":
        raise ConfigError(
            "SOLVER.ACCUMULATE_STEPS is 'auto', which restores the reference batch from the "
            "images of one GPU: set SOLVER.IMS_PER_GPU"
        )
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        if accumulate > 1:
            raise ConfigError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {cfg.SOLVER.REFERENCE_WORLD_SIZE} and "
                f"SOLVER.ACCUMULATE_STEPS is {accumulate}: Detectron2's scaling knows nothing of "
                "accumulation; set the former to 0, and SOLVER.IMS_PER_GPU to the images of a GPU"
            )
        return  # Detectron2 scales IMS_PER_BATCH later, and checks it
    images = cfg.SOLVER.IMS_PER_BATCH
    if images < 1 or images % (processes * accumulate):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}, the images of one iteration; it must be a multiple "
            f"of {processes * accumulate}: the processes ({processes}) times "
            f"SOLVER.ACCUMULATE_STEPS ({accumulate})"
        )


def _derive(cfg: CfgNode, processes: int, accumulate: int | str) -> None:
    solver = cfg.SOLVER
    reference = solver.REFERENCE_BATCH_SIZE
    if solver.IMS_PER_BATCH != reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, but SOLVER.REFERENCE_BATCH_SIZE, for "
            f"which the recipe is stated, is {reference}: with SOLVER.IMS_PER_GPU, leave "
            "SOLVER.IMS_PER_BATCH out; for a recipe of your own, set both to its images"
        )
    if solver.REFERENCE_WORLD_SIZE:
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE} and SOLVER.IMS_PER_GPU "
            f"is {solver.IMS_PER_GPU}: both scale the recipe; set one of them to 0"
        )
    images = solver.IMS_PER_GPU * processes
    if accumulate == "auto":
        accumulate = -(-reference // images)
    images *= accumulate

    keys = (*_LEARNING_RATES, *_ITERATIONS, *_PERIODS)
    recipe = {key: _get(cfg, key) for key in keys}
    for key, value in recipe.items():
        if key in _LEARNING_RATES:
            value = value * images / reference
        elif key in _PERIODS:
            value = max(1, round(value * reference / images)) if value > 0 else value
        elif isinstance(value, int):
            value = -(-value * reference // images)
        else:
            value = tuple(-(-v * reference // images) for v in value)
        node, name = locate(cfg, key)
        setattr(node, name, value)
    # Large batches can round a step up to another, or to the end.
    solver.STEPS = tuple(sorted({step for step in solver.STEPS if step < solver.MAX_ITER}))
    solver.IMS_PER_BATCH = solver.REFERENCE_BATCH_SIZE = images
    solver.ACCUMULATE_STEPS = accumulate

    rows = [[key, value, _get(cfg, key)] for key, value in recipe.items() if value]
    rows.insert(0, ["SOLVER.IMS_PER_BATCH", reference, images])
    logger.info(
        f"{images} images per iteration = {processes} (processes) x {solver.IMS_PER_GPU} "
        f"(IMS_PER_GPU) x {accumulate} (ACCUMULATE_STEPS); by the linear rule:\n"
        + tabulate(rows, headers=["key", "recipe", "this run"], disable_numparse=True)
    )


def _get(cfg: CfgNode, key: str):
    node, name = locate(cfg, key)
    return node[name]
