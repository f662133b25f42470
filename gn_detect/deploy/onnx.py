"""From a trained detector to an ONNX file that knows what it is."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

import torch
from detectron2.data import transforms as T

from gn_detect.config import ConfigError
from gn_detect.predict.saved_config import build_mapper
from gn_detect.settings import Settings

from .tracing import Detector, traceable

if TYPE_CHECKING:
    from gn_detect.predict import Predictor

GROUP_NORMS = "decomposed", "op"
_OPSET = 20  # the newest that PyTorch writes of a trace
_OPSET_OF_OP = 21  # since which gamma and beta of GroupNormalization are per channel


def export_onnx(
    predictor: Predictor,
    path: str,
    *,
    static: tuple[int, int] | None = None,
    group_norm: str = "decomposed",
) -> None:
    """Write the detector as ONNX: ``deploy/runtime.py`` says what is in it, and runs it.

    Args:
        static: height and width of the images; None for any.
        group_norm: ``"op"`` for the operator GroupNormalization, ``"decomposed"`` for others.

    Raises:
        ConfigError: the model is of another kind, or cannot be traced.
    """
    import onnx  # the extra `export`; here, so that this module needs it in a call alone

    facts = describe(predictor, static)
    detector = Detector(predictor.model, bgr=facts["input_format"] == "BGR")
    shape = static or (96, 128)
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    names = detector.output_names
    axes = {name: {0: "detections"} for name in names}
    with _quiet(), traceable(detector.model), _group_norm(group_norm):
        torch.onnx.export(
            detector.eval(),
            (image,),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_axes=axes if static else axes | {"image": {0: "height", 1: "width"}},
        )
    model = onnx.load(path)
    if group_norm == "op":  # what else is in a model is in both the same
        next(o for o in model.opset_import if not o.domain).version = _OPSET_OF_OP
    model.producer_name, model.producer_version = "gn_detect", "1"
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def describe(predictor: Predictor, static: tuple[int, int] | None = None) -> dict:
    """What the file says of the detector and of the images that it takes.

    Raises:
        ConfigError: images go into the model in another way than ``deploy/runtime.py`` has.
    """
    run, model = Settings(predictor.cfg), predictor.model
    resizing = build_mapper(predictor.cfg).augmentations.augs
    if len(resizing) > 1 or not all(isinstance(r, T.ResizeShortestEdge) for r in resizing):
        raise ConfigError(
            "in evaluations images are not resized by ResizeShortestEdge alone, which is all that "
            "an exported detector can do"
        )
    if run["input_format"] not in ("BGR", "RGB"):
        raise ConfigError(
            f"{run.keys['input_format']} is {run['input_format']!r}: only models of BGR and RGB "
            "images can be exported"
        )
    edges, longest = [(r.short_edge_length, r.max_size) for r in resizing][0] or ((0,), 0)
    return {
        "class_names": list(predictor.class_names),
        "min_size": min(edges),
        "max_size": min(longest, 2**31 - 1),
        "static_size": static,
        "bit_depth_range": list(run["bit_depth_range"] or ()),
        "architecture": type(model).__name__,
        "input_format": run["input_format"],
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "size_divisibility": model.backbone.size_divisibility,
    }


@contextlib.contextmanager
def _group_norm(kind: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if kind == "op":
            ours = _GroupNormalization.apply
            stack.enter_context(mock.patch.object(torch, "group_norm", ours))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a trace: the file is compared with the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _GroupNormalization(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, *_):
        size = x[:1, :1].numel()
        return torch.native_group_norm(x, weight, bias, *x.shape[:2], size, num_groups, eps)[0]

    @staticmethod
    def symbolic(g, x, num_groups, weight, bias, eps, *_):
        y = g.op("GroupNormalization", x, weight, bias, num_groups_i=num_groups, epsilon_f=eps)
        return y.setType(x.type())
