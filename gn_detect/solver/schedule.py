"""The recipe of a config, for the images per iteration that the user can afford.

A file states its recipe once, for ``SOLVER.REFERENCE_BATCH_SIZE`` images per iteration. The linear
rule (Goyal et al., https://arxiv.org/abs/1706.02677, section 2.1) carries it over to others: the
learning rate grows with the images of an iteration, and all that counts iterations shrinks, so that
the same images are seen. GN has no batch statistics: nothing else depends on the batch. What is
typed on the command line is of this run, and stays.
"""

from __future__ import annotations

import logging
import math

from tabulate import tabulate

from gn_detect.config import ConfigError
from gn_detect.settings import Settings

logger = logging.getLogger(__name__)

# What counts iterations -> what states it in epochs of the data, or in parts of the run.
_RELATIVE = {
    "max_iter": "epochs",
    "steps": "steps_at",
    "warmup_iters": "warmup_epochs",
    "warmup_length": "warmup_epochs",
    "eval_period": "eval_epochs",
}
# A warm-up of a file takes no more of a run of another length, unless the file's own share is
# larger: it is for the first steps of a run, and must leave some that learn.
_WARMUP_SHARE = 0.1


def resolve_schedule(run: Settings, processes: int, num_images: int | None = None) -> None:
    """Settle images, learning rate and iterations of a run, in place, and log them as a table.

    With ``SOLVER.IMS_PER_GPU``, ``SOLVER.IMS_PER_BATCH`` becomes the images of one iteration:
    ``IMS_PER_GPU x processes x ACCUMULATE_STEPS``, and what files state follows from it by the
    linear rule. With ``SOLVER.EPOCHS``, ``SOLVER.MAX_ITER`` follows from the images of the data.
    Where the length is not that of the file, its steps keep their place in the run, its warm-up its
    images, but for a short run. Iterations are rounded up, so warm-up and training are never
    shorter than stated, in images. Without both, all is taken as stated.

    The result is a recipe for the new batch and length (``REFERENCE_BATCH_SIZE``,
    ``REFERENCE_MAX_ITER``), so resolving it again changes nothing.

    Args:
        run: of a YAML config, or of a lazy one, where drops and warm-up are relative to
            ``train.max_iter``.
        processes: on all machines.
        num_images: of an epoch; None where it is not known.

    Raises:
        ConfigError: a key that contradicts another, the number of processes, or ``num_images``.
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
    relative = _choose(run, num_images)
    if not run["ims_per_gpu"]:
        _check_stated(run, processes, accumulate)
        images = reference = run["ims_per_batch"]
        head = f"{images} images per iteration"
    else:
        reference = run["reference_batch_size"]
        images, accumulate = images_of_iteration(run, processes)
        per_gpu, passes = (keys[n].rpartition(".")[2] for n in ("ims_per_gpu", "accumulate_steps"))
        head = (
            f"{images} images per iteration = {processes} (processes) x {run['ims_per_gpu']} "
            f"({per_gpu}) x {accumulate} ({passes})"
        )
    run.derive("accumulate_steps", accumulate, "the images of an iteration")
    if run["ims_per_gpu"] or relative:
        rows = _derive(run, images, reference, num_images)
        headers = ["key", "recipe", "this run", "why"]
        logger.info(f"{head}:\n" + tabulate(rows, headers=headers, disable_numparse=True))


def _choose(run: Settings, num_images: int | None) -> bool:
    """Of iterations and epochs, let what was typed win. Returns whether there are epochs, or parts
    of the run, to resolve."""
    keys = run.keys
    for stated, relative in _RELATIVE.items():
        if stated not in keys or not run[relative]:
            continue
        key, value = keys[relative], run[relative]
        if run.is_typed(stated):
            if run.is_typed(relative):
                raise ConfigError(
                    f"{keys[stated]} and {key} are both on the command line, and state the same; "
                    "leave one of them out"
                )
            run.derive(relative, () if relative == "steps_at" else 0.0, f"{keys[stated]} is typed")
        elif relative == "steps_at":
            if sorted({0.0, *value, 1.0}) != [0.0, *value, 1.0]:
                raise ConfigError(
                    f"{key} is {tuple(value)}; it must be parts of the run, between 0 and 1, each "
                    "larger than the one before"
                )
            if "milestones" not in keys and run.is_typed(relative):
                raise ConfigError(
                    f"{key} is {tuple(value)}, but this SOLVER.LR_SCHEDULER_NAME has no steps; "
                    "set it to WarmupMultiStepLR"
                )
        elif type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(f"{key} is {value!r}; it must be a number of epochs, or 0")
        elif not num_images:
            raise ConfigError(
                f"{key} is {value:g}, but how many images an epoch has is not known: "
                f"{keys.get('train_data', 'what is trained on')} is no data in COCO format. Set "
                f"{keys[stated]}, and {key} to 0"
            )
    if run["warmup_epochs"] and not keys.keys() & {"warmup_iters", "warmup_length"}:
        raise ConfigError(
            f"{keys['warmup_epochs']} is {run['warmup_epochs']}, but lr_multiplier has no "
            "warmup_length (WarmupParamScheduler)"
        )
    return any(run[relative] for relative in _RELATIVE.values())


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


def images_of_iteration(run: Settings, processes: int) -> tuple[int, int]:
    """The images of an iteration and its forward passes, from those of a GPU.

    Raises:
        ConfigError: they contradict each other.
    """
    keys, reference, images = run.keys, run["reference_batch_size"], run["ims_per_batch"]
    accumulate = run["accumulate_steps"] or 1
    one_pass = run["ims_per_gpu"] * processes
    if run["reference_world_size"]:
        raise ConfigError(
            f"{keys['reference_world_size']} is {run['reference_world_size']} and "
            f"{keys['ims_per_gpu']} is {run['ims_per_gpu']}: both scale the recipe; set one of "
            "them to 0"
        )
    if run.is_typed("ims_per_batch"):
        passes = images // one_pass
        stated = accumulate if run.is_typed("accumulate_steps") else "auto"
        if images < 1 or passes * one_pass != images or stated not in ("auto", passes):
            raise ConfigError(
                f"{keys['ims_per_batch']} is {images}, the images of one iteration; with "
                f"{keys['ims_per_gpu']} {run['ims_per_gpu']} and {processes} process(es) a forward "
                f"pass has {one_pass}, of which {keys['accumulate_steps']} ({stated}) make an "
                f"iteration: let them agree, or leave one of the three out (where a file has "
                f"{keys['ims_per_gpu']}, set it to 0)"
            )
        return images, passes
    if images != reference:
        raise ConfigError(
            f"{keys['ims_per_batch']} is {images}, but {keys['reference_batch_size']}, for which "
            f"the recipe is stated, is {reference}: with {keys['ims_per_gpu']}, leave "
            f"{keys['ims_per_batch']} out; for a recipe of your own, set both to its images"
        )
    if accumulate == "auto":
        accumulate = -(-reference // one_pass)
    return one_pass * accumulate, accumulate


def _derive(run: Settings, images: int, reference: int, num_images: int | None) -> list[list]:
    """Set what counts iterations, and the rates. Returns the rows of the table."""
    keys, scale, rows = run.keys, reference / images, []
    same_images, same_part = "the same images", "the same part of the run"

    def settle(name: str, value, why: str, before=None) -> None:
        before = run[name] if before is None else before
        if run.is_typed(name):
            before = run["reference_max_iter"] if name == "max_iter" else ""
            value, why = run[name], "typed"
        elif value == before:
            why = "as stated"
        else:
            run.derive(name, value, why)
        if value or before:
            rows.append([keys[name], before, value, why])

    def epochs(name: str) -> tuple[int, str, str | None]:
        iterations, text = max(1, _up(run[name] * num_images / images)), f"{run[name]:g} epochs"
        return iterations, f"{text} of {num_images} images", None if run.is_typed(name) else text

    settle("ims_per_batch", images, "the images of a GPU")
    for name in ("base_lr", "base_lr_end"):
        if run[name] is not None:
            settle(name, run[name] * (images / reference), "the linear rule")

    typed = any(run[name] and run.is_typed(name) for name in ("max_iter", "epochs"))
    other = bool(run["epochs"]) or typed  # than the length of the file
    stated = (run["reference_max_iter"] if other else 0) or run["max_iter"]
    settle("max_iter", *(epochs("epochs") if run["epochs"] else (_up(stated * scale), same_images)))
    end = run["max_iter"]

    if run["steps"] or run["steps_at"]:
        steps, why = [_up(s * scale) for s in run["steps"]], same_images
        if run["steps_at"]:
            steps, why = [_up(part * end) for part in run["steps_at"]], keys["steps_at"]
        elif other:
            steps, why = [_up(s / max(stated, 1) * end) for s in run["steps"]], same_part
        # Large batches can round a step up to another, or to the end.
        settle("steps", tuple(sorted({step for step in steps if step < end})), why)

    lazy = "warmup_length" in keys  # there it is a part of the run
    name = "warmup_length" if lazy else "warmup_iters"
    warmup = (run[name] or 0) * (stated if lazy else 1)
    most, capped = max(_WARMUP_SHARE, warmup / max(stated, 1)), other
    warmup, why, before = _up(warmup * scale), same_images, None
    if run["warmup_epochs"]:
        warmup, why, before = epochs("warmup_epochs")
        most, capped = _WARMUP_SHARE, typed and not run.is_typed("warmup_epochs")
    if capped and warmup > _up(most * end):
        warmup, why = _up(most * end), f"at most {most:.0%} of the run"
        run.derive("warmup_epochs", 0.0, why)
    if name in keys and (other or run["warmup_epochs"] or not lazy):
        settle(name, warmup / max(end, 1) if lazy else warmup, why, before)

    if (period := run["checkpoint_period"]) > 0:
        every, half = max(1, round(period * scale)), max(1, _up(end / 2))
        shorter = other and half < every  # one on the way, at least
        why = "half of the run" if shorter else same_images
        settle("checkpoint_period", half if shorter else every, why)
    if run["eval_epochs"]:
        settle("eval_period", *epochs("eval_epochs"))
    elif (period := run["eval_period"]) > 0:
        every, part = max(1, round(period * scale)), _up(period / max(stated, 1) * end)
        shorter = other and 0 < part < every  # as many evaluations as in the run of the file
        settle("eval_period", part if shorter else every, same_part if shorter else same_images)

    if run["ims_per_gpu"]:
        reason = "it says for which images a file states its recipe, and what is typed is of a run "
        reason += f"of {images} images"
        run.derive("reference_batch_size", images, reason, needed=True)
    if "reference_max_iter" in keys:
        reason = f"it is of a file, and the run has {end} iterations"
        run.derive("reference_max_iter", end, reason, needed=True)
    return rows


def _up(value: float) -> int:
    """Rounded up, but for the error of floats."""
    return math.ceil(round(value, 6))
