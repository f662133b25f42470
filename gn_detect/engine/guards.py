"""Configurations that would waste a run, refused before it starts; each has a switch to pass it,
but for options of Detectron2's own that would end the run in its middle, or do nothing in it."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gn_detect.checkpoint import Origin, WeightGuards
from gn_detect.config import ConfigError
from gn_detect.evaluation import check_tta
from gn_detect.settings import Settings

from .errors import quiet
from .lazy_config import instantiate_key

logger = logging.getLogger(__name__)


def check_recipe(
    cfg: CfgNode | DictConfig, *, processes: int, num_images: int | None, resumes: bool = False
) -> None:
    """Check a training run whose schedule is resolved (``solver.resolve_schedule``).

    What can be seen in the model is looked for there, not in the config, so that it is found in
    components of any kind. The model is built for it, on the meta device where it can be.

    Args:
        cfg: of the run, a YAML config or a lazy one.
        processes: on all machines.
        num_images: to train on; None where the datasets do not tell.
        resumes: from a checkpoint, so that the weights are not read.

    Raises:
        ConfigError: names the keys or layers, their values, the evidence, the fix, and the switch.
    """
    run, model = Settings(cfg), _model_without_weights(cfg)
    if resumes:
        pass
    elif not run["weights"]:
        _check_scratch(run, model, num_images)
    elif origin := Origin.of_name(run["weights"]):
        WeightGuards.from_config(cfg).check_origin(origin, run["weights"])
    _check_single_value_groups(run, model)
    _check_learning_rate(run)
    _check_batch_norm(run, model, processes)


def _model_without_weights(cfg: CfgNode | DictConfig) -> nn.Module:
    def build(device: str) -> nn.Module:
        if isinstance(cfg, DictConfig):
            return instantiate_key(cfg, "model")
        here = cfg.clone()
        here.defrost()
        here.MODEL.DEVICE = device
        here.MODEL.GN.KERNEL = "torch"  # it does not run, so no kernel needs the device
        return build_model(here)

    return without_weights(build)


def without_weights(build: Callable[[str], nn.Module]) -> nn.Module:
    """What ``build`` returns for the device "meta", in no time and memory; for the CPU where a
    component computes while it is built."""
    with quiet():  # it is said when the model of the run is built
        try:
            with torch.device("meta"):
                return build("meta")
        except (NotImplementedError, RuntimeError):
            return build("cpu")


def _check_scratch(run: Settings, model: nn.Module, num_images: int | None) -> None:
    weights, freeze_at = run.keys["weights"], run["freeze_at"]
    if run["SCRATCH_FREEZE_AT"] and freeze_at:
        key = run.keys["freeze_at"]
        raise ConfigError(
            f"{weights} is empty and {key} is {freeze_at}: random weights would be frozen, which "
            "costs 3.3 box AP (Detectron projects/GN, R50: 36.2 against 39.5). Set "
            f"{weights}, or {key} 0; {_pass(run, 'SCRATCH_FREEZE_AT')}"
        )
    frozen = [n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    if run["SCRATCH_FROZEN_BN"] and frozen:
        raise ConfigError(
            f"{weights} is empty and {len(frozen)} layers are FrozenBN, such as {frozen[0]}: a "
            "mean of 0 and a variance of 1 that belong to no data normalize nothing (an R50's "
            "loss_cls then starts at 500, with GN at 4.6: docs/small_batches.md). Set "
            f"{weights}, or the norm of these layers to GN; {_pass(run, 'SCRATCH_FROZEN_BN')}"
        )
    if run["FEW_IMAGES"] and num_images is not None and num_images < 10_000:
        logger.warning(
            f"{weights} is empty and there are {num_images} images to train on: below 10000, "
            "pre-trained weights give a higher AP (He et al. 2018, section 5: with 3.5k images of "
            f"COCO 16.0 against 9.3). {_silence(run, 'FEW_IMAGES')}"
        )


def _pass(run: Settings, switch: str) -> str:
    return f"to train so all the same, set {run.keys[switch]} False"


def _silence(run: Settings, switch: str) -> str:
    return f"{run.keys[switch]} False silences this"


def _check_single_value_groups(run: Settings, model: nn.Module) -> None:
    if not run["SINGLE_VALUE_GROUPS"]:
        return
    sizes = run["image_size"]
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    size = min(sizes or (), default=0) or 1024  # 0 is the size of the file, which is not known here
    for name, layer, stride in _norms_of_small_maps(model):
        positions = max(-(-size // stride), 1) ** 2 if stride else 1
        if layer.num_channels * positions == layer.num_groups:
            of = f"of images of {size} pixels" if stride else "of a fully connected layer"
            raise ConfigError(
                f"{name} normalizes in {layer.num_groups} groups {layer.num_channels} channels at "
                f"a single position (the smallest output {of}): each group is one value, and its "
                f"output is beta whatever the image. Use fewer groups ({run.keys['num_groups']}, "
                f"or LN) or larger images; {_pass(run, 'SINGLE_VALUE_GROUPS')}"
            )


def _norms_of_small_maps(model: nn.Module) -> Iterator[tuple[str, nn.GroupNorm, int]]:
    """(name, layer, stride of its smallest map in the image; 0: a single position, whatever the
    image) of the norms whose maps can be that small. Those of RoIs are 7 pixels wide, or more."""
    shapes = model.backbone.output_shape().values() if hasattr(model, "backbone") else ()
    coarsest = max((shape.stride or 1 for shape in shapes), default=1)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.GroupNorm):
            continue
        level = re.search(r"\b(?:res|fpn_lateral|fpn_output|p)(\d)\.", name)
        if name.startswith("roi_heads."):
            if name.rpartition(".")[2].startswith("fc_"):
                yield name, layer, 0
        elif level:
            yield name, layer, 2 ** int(level[1])
        elif name.startswith(("proposal_generator.", "head.")):  # shared by all levels
            yield name, layer, coarsest


def _check_learning_rate(run: Settings) -> None:
    if not run["LEARNING_RATE"]:
        return
    keys, images = run.keys, run["ims_per_batch"]
    rule = 0.02 * images / 16
    if run["base_lr"] > 3 * rule:
        logger.warning(
            f"{keys['base_lr']} is {run['base_lr']:g} for {images} images per iteration, "
            f"{run['base_lr'] / rule:.3g} times the {rule:g} of the linear rule (0.02 for 16 "
            f"images). {keys['ims_per_gpu']} derives it, with the number of iterations; "
            f"{_silence(run, 'LEARNING_RATE')}"
        )
    end, drops = run["max_iter"], run["milestones"] or ()
    name, warmup = "warmup_iters", run["warmup_iters"]
    if warmup is None:  # those of a lazy config are relative to the end
        name, warmup = "warmup_length", (run["warmup_length"] or 0) * end
        drops = [end * drop / (run["num_updates"] or drops[-1]) for drop in drops]
    first_drop = min([*drops, end])
    if warmup >= first_drop:
        logger.warning(
            f"{keys[name]} is {run[name]}, but the rate drops, or training ends, at iteration "
            f"{first_drop:.0f}: {keys['base_lr']} is never reached. Lower {keys[name]}; "
            f"{_silence(run, 'LEARNING_RATE')}"
        )


def _check_batch_norm(run: Settings, model: nn.Module, processes: int) -> None:
    modules = reversed(list(model.named_modules()))  # the first of a kind is named
    kinds = {type(m): n for n, m in modules if isinstance(m, _BatchNorm)}
    images = run["ims_per_batch"] // run["accumulate_steps"]  # of one forward pass
    for kind, name in kinds.items():
        if kind is nn.SyncBatchNorm and run["device"] == "cpu" and processes > 1:
            raise ConfigError(
                f"{name} is SyncBN, which PyTorch synchronizes on CUDA only; on CPUs use GN"
            )
        synchronized = issubclass(kind, (nn.SyncBatchNorm, NaiveSyncBatchNorm))
        seen = images if synchronized else images // processes
        if run["SMALL_BATCH_BN"] and seen < 8:
            logger.warning(
                f"{name} is {kind.__name__}, and its statistics are of {seen} images: below 8 the "
                "error of BN grows, on ImageNet from 23.6 % to 34.7 % at 2 (GN paper, table 2; GN: "
                "24.1 %). Use GN, or SyncBN on more GPUs; "
                f"{_silence(run, 'SMALL_BATCH_BN')}"
            )


def check_options(cfg: CfgNode, *, training: bool) -> None:
    """
    Raises:
        ConfigError: the run would need what is not installed, or fail in Detectron2 itself.
    """
    check_tta(cfg)
    if not training:
        return
    if cfg.VIS_PERIOD > 0 and importlib.util.find_spec("cv2") is None:
        raise ConfigError(
            f"VIS_PERIOD is {cfg.VIS_PERIOD}, and Detectron2 draws with OpenCV, which is not "
            "installed: pip install opencv-python-headless, or set VIS_PERIOD 0"
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        raise ConfigError(
            "SOLVER.LR_SCHEDULER_NAME is WarmupStepWithFixedGammaLR, which fails at the last "
            "iteration (IndexError in fvcore's StepParamScheduler); use WarmupMultiStepLR with "
            "SOLVER.STEPS"
        )
