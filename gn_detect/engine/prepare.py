"""Before a run: settle what follows from the machine and the data, refuse what cannot work."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from gn_detect.checkpoint import lock_output, newest_checkpoint
from gn_detect.checkpoint.sources import split_name
from gn_detect.config import ConfigError
from gn_detect.data.coco import CocoSummary, check_coco_dataset
from gn_detect.data.same_files import check_same_files
from gn_detect.data.splits import describe_overlap
from gn_detect.distributed import from_first_process, on_each_machine
from gn_detect.evaluation import EVALUATORS, check_evaluator
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

from .best import check_best
from .describe_data import describe_data
from .errors import set_run_directory
from .follow_data import resolve_classes, resolve_folders, resolve_keypoints, resolve_masks
from .guards import check_options, check_recipe
from .lazy_config import check_lazy_config
from .memory import resolve_memory
from .recipe import resolve_recipe
from .train_loop import AMP_DTYPES

logger = logging.getLogger(__name__)


def start_log(cfg: CfgNode | DictConfig) -> None:
    """Log what gn_detect says, on the terminal and in the output directory.

    Raises:
        ConfigError: nothing can be written there.
    """
    run = Settings(cfg)
    set_run_directory(run["output_dir"])
    try:
        setup_logger(run["output_dir"], distributed_rank=comm.get_rank(), name="gn_detect")
    except OSError as error:
        raise ConfigError(
            f"{run.keys['output_dir']} is {run['output_dir']}, where nothing can be written "
            f"({error.strerror}); name another directory"
        ) from None


def prepare_run(
    cfg: CfgNode | DictConfig,
    *,
    typed: Iterable[str] = (),
    processes: int | None = None,
    eval_only: bool = False,
    resume: bool = False,
    recipe: bool = False,
) -> None:
    """Complete ``cfg`` in place for this machine and its datasets, and check it.

    Sets the device (and AMP) where there is no CUDA, classes, keypoints and format of the masks
    from the data, what fits into the memory (:mod:`.memory`), and the schedule from the images of a
    GPU (``solver/schedule.py``), and logs each with the reason. What the user typed stays, or is
    refused where it cannot work (:meth:`.Settings.derive`). Looks through the annotations of the
    COCO-format datasets, and says what there is to train on.

    All processes of a run call it, once they know that they were told the same
    (:func:`.agreement.check_same`). The first one decides for all. The first of each machine looks
    through the data there, which must be the same.

    Args:
        cfg: of :func:`gn_detect.config.load_config` or :func:`.lazy_config.load_lazy_config`.
        typed: the keys of ``cfg`` that the user typed.
        processes: that train, on all machines; those that there are where it is None.
        eval_only: evaluate, do not train.
        resume: continue from the last checkpoint in the output directory.
        recipe: derive sizes, anchors and length of the run from its data (:mod:`.recipe`).

    Raises:
        CheckpointError, ConfigError, DataError: the run could not work.
    """
    run, processes = Settings(cfg, typed), processes or comm.get_world_size()
    resolve_device(run, processes)
    _resolve_amp(run)
    checkpoint = from_first_process(lambda: _check_weights(run, eval_only, resume))
    if not eval_only:
        claim_output(run, resume)
    if isinstance(cfg, DictConfig):
        check_lazy_config(cfg)
    else:
        check_options(cfg, training=not eval_only)
    summaries = _prepare_datasets(run, eval_only)
    resolve_masks(run, () if eval_only else dataset_names(run, "train"), summaries)
    classified = resolve_folders(run, training=not eval_only)
    resolve_classes(run, summaries)
    resolve_keypoints(run, summaries, training=not eval_only)
    if eval_only:
        return
    keep = run["keep"] or 0
    if type(keep) is not int or keep < 0:
        raise ConfigError(
            f"{run.keys['keep']} is {keep!r}; it must be how many periodic checkpoints to keep, or "
            "0 for all"
        )
    seconds = run["checkpoint_seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
        raise ConfigError(
            f"{run.keys['checkpoint_seconds']} is {seconds!r}; it must be the seconds from one "
            "save to the next, or 0 to save by iterations alone"
        )
    train = dataset_names(run, "train")
    if recipe:
        resolve_recipe(run, train, processes)
    counts = [summaries[n].num_images if n in summaries else None for n in train]
    num_images = sum(counts) if counts and None not in counts else None
    resolve_memory(run, processes, [n for n in train if n in summaries], bool(checkpoint))
    trained = num_images and sum(summaries[n].num_trained for n in train)
    resolve_schedule(run, processes, trained or classified)
    check_best(run, dataset_names(run, "test"))

    def check() -> None:
        check_recipe(cfg, processes=processes, num_images=num_images, resumes=bool(checkpoint))
        describe_data(cfg, [n for n in train if n in summaries])

    from_first_process(check)


def check_num_gpus(num_gpus: int) -> None:
    """
    Raises:
        ConfigError: this machine has GPUs, but fewer than ``num_gpus``.
    """
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()}"
        )


def resolve_device(run: Settings, processes: int = 1) -> None:
    """Take the CPU where there is no CUDA.

    Raises:
        ConfigError: CUDA was typed, and there is none; or several processes are to train on the
            CPU, but there is CUDA.
    """
    key, device = run.keys["device"], run["device"]
    if torch.cuda.is_available():
        if processes > 1 and device == "cpu":
            raise ConfigError(
                f"{key} is cpu, but Detectron2 connects {processes} processes through CUDA "
                "where it is available; hide it with CUDA_VISIBLE_DEVICES=''"
            )
    elif device.startswith("cuda"):
        run.derive("device", "cpu", "no CUDA device is available", needed=True)
        logger.warning(f"no CUDA device is available: {key} = cpu")


def _resolve_amp(run: Settings) -> None:
    keys, dtype = run.keys, run["amp_dtype"]
    if dtype not in AMP_DTYPES:
        raise ConfigError(f"{keys['amp_dtype']} is {dtype!r}; known: {', '.join(AMP_DTYPES)}")
    if run["device"] == "cpu" and run["amp"] and dtype == "float16":
        reason = f"float16 needs CUDA ({keys['amp_dtype']} bfloat16 does not)"
        run.derive("amp", False, f"mixed precision in {reason}", needed=True)
        logger.warning(f"mixed precision in {reason}: {keys['amp']} = False")


def _check_weights(run: Settings, eval_only: bool, resume: bool) -> str:
    """Check that there is what a run starts from: a checkpoint, whose path is returned, or weights.

    Raises:
        CheckpointError, ConfigError: there is not.
    """
    key, weights, output_dir = run.keys["weights"], run["weights"], run["output_dir"]
    if resume:
        if checkpoint := newest_checkpoint(output_dir):
            return checkpoint
        logger.warning(f"--resume: no checkpoint in {output_dir}, starting at iteration 0")
    if not weights and eval_only:
        raise ConfigError(f"{key} is empty: with --eval-only, name the weights to evaluate")
    path, _, _ = split_name(weights)
    if weights and "://" not in weights and not os.path.isfile(path):
        raise ConfigError(f"{key}: there is no file {path}")
    return ""


def claim_output(run: Settings, resume: bool = False) -> None:
    """Keep other runs out of where this one will write, and look for an earlier one there, unless
    it is to be resumed.

    Raises:
        ConfigError: another run is writing there, or an earlier one has.
    """
    from_first_process(lambda: _claim_output(run, resume))


def _claim_output(run: Settings, resume: bool) -> None:
    directory = run["output_dir"]
    lock_output(directory)
    paths = (os.path.join(directory, n) for n in ("last_checkpoint", "metrics.json"))
    earlier = [path for path in paths if os.path.isfile(path) and os.path.getsize(path)]
    if run["OVERWRITE_OUTPUT"] and earlier and not resume:
        raise ConfigError(
            f"{run.keys['output_dir']} holds a run already ({earlier[0]}), whose final weights "
            "would be replaced and whose metrics would be mixed with this run's. Continue it with "
            "--resume, name another directory, or delete it; to write there all the same, set "
            f"{run.keys['OVERWRITE_OUTPUT']} False"
        )


def dataset_names(run: Settings, split: str) -> tuple[str, ...]:
    """Of the datasets; empty where a lazy config has a loader that takes none."""
    names = run[f"{split}_data"] or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _prepare_datasets(run: Settings, eval_only: bool) -> dict[str, CocoSummary]:
    """Have the data on each machine, the same, and look through it there, once."""
    train, test = () if eval_only else dataset_names(run, "train"), dataset_names(run, "test")
    registered = [name for name in dict.fromkeys([*train, *test]) if name in DatasetCatalog.list()]
    metadata = {name: MetadataCatalog.get(name) for name in registered}

    def generate() -> None:
        for generated in filter(None, (m.get("generate") for m in metadata.values())):
            generated()

    on_each_machine(generate)
    check_same_files({name: m.json_file for name, m in metadata.items() if m.get("json_file")})
    checked = on_each_machine(lambda: _check_datasets(run, train, test, eval_only))
    return next(iter(checked.values()))


def _check_datasets(
    run: Settings, train: tuple[str, ...], test: tuple[str, ...], eval_only: bool
) -> dict[str, CocoSummary]:
    of_yaml = isinstance(run.cfg, CfgNode)  # a lazy config may have loaders of its own
    if of_yaml and eval_only and not test:
        raise ConfigError("DATASETS.TEST is empty: with --eval-only, name the data to evaluate on")
    if of_yaml and not eval_only and not train:
        raise ConfigError("DATASETS.TRAIN is empty: name the data to train on (--train-json ...)")
    if of_yaml and not test:
        logger.warning("DATASETS.TEST is empty (no --val-json): nothing will be evaluated")
    summaries = {}
    for name in dict.fromkeys([*train, *test]):
        summary = check_coco_dataset(
            name,
            masks=bool(run["masks"]),
            keypoints=bool(run["keypoints"]),
            box_format=run["BOX_FORMAT"],
            exact_names=run["FILE_NAMES"],
            bit_depth_range=run["bit_depth_range"] or (),
            filter_empty=run["filter_empty"] is not False,
            min_keypoints=(run["keypoints"] and run["min_keypoints"]) or 0,
            keys=run.keys,
            training=name in train,
            evaluation=name in test,
        )
        # A lazy config may have an evaluator of its own.
        known = MetadataCatalog.get(name).get("evaluator_type") in EVALUATORS
        if name in test and (of_yaml or known):
            key = run.keys.get("coco_eval", "an evaluator's coco_eval")
            check_evaluator(name, run["coco_eval"] or "auto", key)
        if summary is None:
            continue
        summaries[name] = summary
        logger.info(f"{name}: {summary}")
    files = {n: (m.json_file, m.image_root) for n in summaries for m in [MetadataCatalog.get(n)]}
    for name, other in itertools.product(train, test):
        if name in files and other in files:
            if overlap := describe_overlap(files[name], files[other]):
                logger.warning(overlap)
    return summaries
