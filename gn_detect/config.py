"""The keys that gn_detect adds to a Detectron2 config, and the configs that it ships."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

_PACKAGE = Path(__file__).resolve().parent
_EPOCHS = ("SOLVER.EPOCHS", "SOLVER.WARMUP_EPOCHS", "TEST.EVAL_EPOCHS")
_OR_AUTO = ("SOLVER.ACCUMULATE_STEPS", "SOLVER.IMS_PER_GPU")


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key, the value, and the fix."""


def add_gn_config(cfg: CfgNode) -> None:
    """Add the keys of gn_detect, with their defaults, to ``cfg`` in place.

    Keys that ``cfg`` has already (through the ``DETECTRON2_ENV_MODULE`` hook, or by an earlier
    call) keep their values.
    """
    gn = cfg.MODEL.setdefault("GN", CfgNode())
    # Groups of every GroupNorm layer (GN paper, table 3: 32 is best), or channels of every group.
    # Exactly one of the two is positive, the other 0. It must divide the channels of each layer.
    gn.setdefault("NUM_GROUPS", 32)
    gn.setdefault("CHANNELS_PER_GROUP", 0)
    # Where this does not divide the channels of a layer, take the nearest number that does (the
    # smaller of two), and log the layer.
    gn.setdefault("NEAREST_DIVISOR", False)
    # Added to the variance of a group before the square root (GN paper, eq. 3).
    gn.setdefault("EPS", 1e-5)
    # Gamma of the last norm of each residual block starts at 0 (GN paper, section 4.1).
    gn.setdefault("ZERO_INIT_RESIDUAL", False)
    # Weight Standardization of each convolution that a GN, LN or IN follows: "authors" or "timm"
    # (layers/weight_std.py), "" for none. "auto" is "authors" for ResNeXt with GN, which collapses
    # without (open-mmlab/mmdetection PR #521: mask AP 33.1 against 37.7), and none for others.
    gn.setdefault("WEIGHT_STANDARDIZATION", "auto")
    # "triton": fused kernels for CUDA; "torch": PyTorch's own operations. "auto" takes the first
    # where they can run and agree with float64, and says once which it took and why.
    gn.setdefault("KERNEL", "auto")
    # What the backward pass keeps. "fast": everything. "balanced" rebuilds the outputs of GN+ReLU;
    # "lean" also runs the last 1x1 convolution of each residual block, and its shortcut's, again,
    # where a norm follows (not in the pre-activation ResNet);
    # "checkpoint" keeps the inputs of blocks alone and runs them twice. Same gradients;
    # docs/memory.md has the bytes and the time. "auto": the first of "fast", "lean" and
    # "checkpoint" that fits into the memory.
    gn.setdefault("MEMORY", "fast")

    # Images of one batch are padded to one size. Leave the padding out of the statistics of every
    # GN, LN and IN, keep it 0, and propose nothing in it: an image's features and losses are then
    # those of the image alone (docs/small_batches.md). False as in published weights.
    gn.setdefault("MASK_PADDING", False)

    # The weights of the convolutions of our components, and so the maps from the stem to the heads,
    # in torch.channels_last. Same keys, same numbers; not measured to be faster on a CPU.
    cfg.MODEL.setdefault("CHANNELS_LAST", False)

    # Of the pre-activation ResNet (modeling/resnetv2.py); MODEL.RESNETS has its depth and widths.
    # "BiT": Big Transfer's, with a 7x7 convolution as stem; "D": the stem of three convolutions and
    # the shortcuts of ResNet-D, as in timm's resnetv2_50d_gn.
    cfg.MODEL.setdefault("RESNETV2", CfgNode()).setdefault("VARIANT", "BiT")

    # What the mask loss, and that of RetinaNet, is divided by. "batch": what the images of a pass
    # have, as in Detectron2. "running": a running mean per image, which an iteration leaves as it
    # is, so that several passes (ACCUMULATE_STEPS, processes) are one of all their images.
    cfg.MODEL.ROI_MASK_HEAD.setdefault("LOSS_NORMALIZER", "batch")
    cfg.MODEL.RETINANET.setdefault("LOSS_NORMALIZER", "batch")

    # Norms where Detectron2 has none: GN, LN, IN, LN2d, BN, SyncBN, FrozenBN, or "" as published.
    cfg.MODEL.RPN.setdefault("NORM", "")
    cfg.MODEL.ROI_KEYPOINT_HEAD.setdefault("NORM", "")
    cfg.MODEL.ROI_MASK_HEAD.setdefault("DECONV_NORM", "")
    cfg.MODEL.ROI_BOX_HEAD.setdefault("FC_NORM", "")  # GN, LN or ""

    # The recipe of a file (BASE_LR, BASE_LR_END, MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD
    # and TEST.EVAL_PERIOD) is stated for this many images per iteration. What is typed on the
    # command line is of the run itself.
    cfg.SOLVER.setdefault("REFERENCE_BATCH_SIZE", 16)
    # MAX_ITER of the file, for which it states STEPS, WARMUP_ITERS and TEST.EVAL_PERIOD. Set when
    # the file is loaded: MAX_ITER may then be typed, or follow from EPOCHS.
    cfg.SOLVER.setdefault("REFERENCE_MAX_ITER", 0)
    # Images of a forward pass of one GPU. If it is positive, IMS_PER_BATCH and the recipe follow
    # from it by the linear rule (docs/small_batches.md); if it is 0, they are taken as stated.
    # "auto": as many as fit into the memory, up to 4 (docs/memory.md).
    cfg.SOLVER.setdefault("IMS_PER_GPU", 0)
    # The length of the run in epochs, whole or not, of the images that are trained on; MAX_ITER
    # follows. 0: MAX_ITER as stated.
    cfg.SOLVER.setdefault("EPOCHS", 0.0)
    # STEPS as parts of the run, such as (0.7, 0.9); (): as stated.
    cfg.SOLVER.setdefault("STEPS_AT", ())
    # WARMUP_ITERS and TEST.EVAL_PERIOD in epochs; 0: as stated.
    cfg.SOLVER.setdefault("WARMUP_EPOCHS", 0.0)
    cfg.TEST.setdefault("EVAL_EPOCHS", 0.0)
    # Forward passes whose gradients are averaged into one iteration. "auto", with IMS_PER_GPU:
    # as many as restore the reference batch. IMS_PER_BATCH counts the images of all of them.
    cfg.SOLVER.setdefault("ACCUMULATE_STEPS", None)
    # How many checkpoints of SOLVER.CHECKPOINT_PERIOD to keep, the newest (model_final.pth is kept
    # besides); 0: all, as Detectron2.
    cfg.SOLVER.setdefault("CHECKPOINT_KEEP", 0)
    # Save also where the last save was so many seconds ago, as model_latest.pth, which the next
    # checkpoint replaces; 0: by SOLVER.CHECKPOINT_PERIOD alone.
    cfg.SOLVER.setdefault("CHECKPOINT_SECONDS", 0)
    # "float16" (with a gradient scaler) or "bfloat16", where SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.setdefault("DTYPE", "float16")
    # An exponential moving average of the weights, evaluated beside them (metrics under ema/), and
    # written as model_final_ema.safetensors. DECAY is reached after 9 / (1 - DECAY) iterations: the
    # average of t iterations decays by (1 + t) / (10 + t).
    ema = cfg.SOLVER.setdefault("EMA", CfgNode())
    ema.setdefault("ENABLED", False)
    ema.setdefault("DECAY", 0.999)
    # End the run after so many evaluations (TEST.EVAL_PERIOD) without gain in TEST.BEST_METRIC, in
    # the points of which a gain is more than MIN_DELTA; 0: train to MAX_ITER.
    cfg.SOLVER.setdefault("EARLY_STOP", 0)
    cfg.SOLVER.setdefault("EARLY_STOP_MIN_DELTA", 0.0)

    # Large-scale jitter (Ghiasi et al., https://arxiv.org/abs/2012.07177) in place of the
    # training sizes: scale the image by a factor of this range, then cut or pad it to a square;
    # with MODEL.GN.MASK_PADDING, only cut it.
    lsj = cfg.INPUT.setdefault("LSJ", CfgNode())
    lsj.setdefault("ENABLED", False)
    lsj.setdefault("MIN_SCALE", 0.1)
    lsj.setdefault("MAX_SCALE", 2.0)
    lsj.setdefault("IMAGE_SIZE", 1024)  # pixels

    # Simple copy-paste (same paper): objects of another training image, scaled and flipped on its
    # own, are pasted into each one. For models with masks, which become bitmaps.
    cfg.INPUT.setdefault("COPY_PASTE", CfgNode()).setdefault("ENABLED", False)
    # Brightness, contrast and saturation change by factors within 1 +- this, the hue by a tenth of
    # it; 0: not at all.
    cfg.INPUT.setdefault("COLOR_JITTER", 0.0)
    # The share of the iterations, at the end of the run, without both.
    cfg.INPUT.setdefault("CLOSE_AUGMENTATION", 0.15)

    # Pairs of keypoints that a horizontal flip exchanges, by their names in ``categories``, such as
    # [["left_eye", "right_eye"]]; None: those of left and right in their names.
    cfg.INPUT.setdefault("KEYPOINT_FLIP_PAIRS", None)

    # The values of images with more than 8 bits (16-bit, 32-bit integer, float) that become 0 and
    # 255, such as (0, 4095) of a camera of 12 bits; values beyond are refused. (): those of the
    # type, 0 to 65535 of integers and 0 to 1 of floats.
    cfg.INPUT.setdefault("BIT_DEPTH_RANGE", ())

    # At its end, a run writes report.html: scores, curves, where the detector errs, pictures, data,
    # environment and config (docs/report.md); after --eval-only, inference/report.html.
    cfg.TEST.setdefault("REPORT", True)

    # What scores by COCO's rules: "pycocotools"; "fast": faster-coco-eval, whose numbers are equal,
    # in a quarter of the time; "auto": "fast" where it is installed.
    cfg.TEST.setdefault("COCO_EVAL", "auto")

    # What decides which evaluation is the best, whose weights are kept as model_best.pth and
    # .safetensors, such as "bbox/AP50"; of several test sets their mean. "auto": segm/AP, else
    # keypoints/AP, else bbox/AP.
    cfg.TEST.setdefault("BEST_METRIC", "auto")

    # What is refused, or warned of, before it wastes a run: docs/small_batches.md has the reasons.
    # False lets it pass.
    guards = cfg.setdefault("GUARDS", CfgNode())
    guards.setdefault("SCRATCH_FREEZE_AT", True)
    guards.setdefault("SCRATCH_FROZEN_BN", True)
    guards.setdefault("BN_WEIGHTS_INTO_GN", True)
    guards.setdefault("WEIGHTS_STRIDE", True)
    guards.setdefault("WEIGHTS_INPUT", True)
    guards.setdefault("WEIGHTS_NORM", True)
    guards.setdefault("WEIGHTS_COVERAGE", True)
    guards.setdefault("WEIGHTS_CLASSES", True)
    guards.setdefault("SINGLE_VALUE_GROUPS", True)
    guards.setdefault("LEARNING_RATE", True)
    guards.setdefault("FEW_IMAGES", True)
    guards.setdefault("SMALL_BATCH_BN", True)
    guards.setdefault("OVERWRITE_OUTPUT", True)
    guards.setdefault("BOX_FORMAT", True)
    guards.setdefault("FILE_NAMES", True)


def locate(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """The node of ``cfg`` that holds ``key`` (``A.B.C``), and the last part of the key."""
    *path, name = key.split(".")
    return functools.reduce(operator.getitem, path, cfg), name


def load_config(config_file: str = "", opts: list[str] | None = None) -> CfgNode:
    """Detectron2's defaults and our keys, then ``config_file``, then ``opts`` (KEY VALUE ...).

    ``NUM_CLASSES`` of ``MODEL.ROI_HEADS`` and ``MODEL.RETINANET``, and ``NUM_KEYPOINTS`` of
    ``MODEL.ROI_KEYPOINT_HEAD``, are None where neither states them: they then follow the data
    (``engine.prepare_run``). YAML that would execute code is refused.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or the type of a value is wrong.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = None
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = None
    try:
        source = config_file
        if config_file:
            _merge(cfg, lambda: cfg.merge_from_file(config_file, allow_unsafe=False))
        cfg.SOLVER.REFERENCE_MAX_ITER = cfg.SOLVER.MAX_ITER
        source = "the command line"
        _merge(cfg, lambda: cfg.merge_from_list(opts or []))
    except (AttributeError, TypeError):  # what yacs and fvcore raise where a mapping is expected
        raise ConfigError(f"{source}: not a mapping of config keys to values") from None
    except (AssertionError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ConfigError(f"{source}: {reason}") from None
    return cfg


def _merge(cfg: CfgNode, merge: Callable[[], None]) -> None:
    """Call ``merge``, with which a number may become "auto", and back, and epochs may be whole."""
    before = {key: operator.getitem(*locate(cfg, key)) for key in (*_EPOCHS, *_OR_AUTO)}
    for key in before:
        setattr(*locate(cfg, key), None)  # which yacs lets become a value of any type
    merge()
    for key, value in before.items():
        merged = operator.getitem(*locate(cfg, key))
        if merged is None:
            setattr(*locate(cfg, key), value)
        elif key in _EPOCHS:
            if type(merged) not in (int, float):
                raise ValueError(f"{key} is {merged!r}; it must be a number of epochs")
            setattr(*locate(cfg, key), float(merged))


def get_config_file(name: str) -> str:
    """Return the path of a config that ships with gn_detect.

    Args:
        name: path below ``configs/``, such as
            ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"``, or below
            ``configs/lazy/``, with ``"lazy/"`` in front and ``.py`` at the end.

    Raises:
        FileNotFoundError: there is no such config; the message lists similar names.
    """
    # A wheel carries configs/ inside the package; a checkout has it beside the package.
    root = next(
        (p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()), None
    )
    if root is None:
        raise FileNotFoundError(f"gn_detect is installed without its configs/ ({_PACKAGE})")
    path = root / name
    if not path.is_file():
        configs = (p for p in root.rglob("*") if p.suffix in (".yaml", ".py"))
        available = sorted(p.relative_to(root).as_posix() for p in configs)
        similar = difflib.get_close_matches(name, available, n=3, cutoff=0.3) or available
        raise FileNotFoundError(f"gn_detect has no config {name!r}; similar: {', '.join(similar)}")
    return str(path)
