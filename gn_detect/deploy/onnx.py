"""From a trained detector to an ONNX file that knows what it is."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image

import gn_detect
from gn_detect.checkpoint.saving import write_atomically
from gn_detect.config import ConfigError
from gn_detect.data.shapes import draw_image
from gn_detect.predict.saved_config import build_mapper
from gn_detect.settings import Settings

from .tracing import Detector, traceable

if TYPE_CHECKING:
    from gn_detect.predict import Predictor

    from .agreement import Agreement

_OPSET = 20  # the newest that PyTorch writes of a trace
_OPSET_OF_OP = 21  # since which gamma and beta of GroupNormalization are per channel


def export_onnx(
    predictor: Predictor,
    path: str,
    *,
    static: tuple[int, int] | None = None,
    group_norm: str = "decomposed",
    image: str | None = None,
) -> Agreement:
    """Write a detector as ONNX: ``deploy/runtime.py`` says what is in the file, and runs it.

    Args:
        predictor: on the CPU.
        static: height and width of the images; None for any.
        group_norm: ``"op"`` for the operator GroupNormalization of opset 21, ``"decomposed"`` for
            others, of opset 20.
        image: on which the file is compared with the model; None for one that is drawn.

    Returns:
        what the comparison gave.

    Raises:
        ConfigError: the model is of another kind, or the file does not find what the model finds;
            there is no file then.
        CheckpointError: it cannot be written.
        DataError: ``image`` cannot be read.
    """
    try:
        import onnx

        from . import runtime
        from .agreement import compare
    except ImportError as error:
        raise ConfigError(
            f"{error}: install the extra, `pip install 'gn_detect[export]'`"
        ) from None
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: it is a folder, or in no folder to write to")
    facts = describe(predictor, static)
    detector = Detector(predictor.model, bgr=facts["input_format"] == "BGR").eval()
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.onnx")
        try:
            _trace(detector, file, static, group_norm)
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"the model cannot be exported: {reason}") from error
        model = onnx.load(file)
        if group_norm == "op":  # of what else is in the file the two have the same
            next(o for o in model.opset_import if not o.domain).version = _OPSET_OF_OP
        model.producer_name, model.producer_version = "gn_detect", gn_detect.__version__
        onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
        onnx.checker.check_model(model)
        onnx.save(model, file)
        found, expected = _both(predictor, runtime.Detector(file), static, image)
    agreement = compare(found, expected)
    if not agreement.good:
        raise ConfigError(
            f"{path} is not written, as it does not find what the model does: {agreement}"
        )
    write_atomically(path, lambda f: f.write(model.SerializeToString()))
    return agreement


def _trace(detector: Detector, path: str, static: tuple[int, int] | None, group_norm: str) -> None:
    image = torch.randint(0, 256, (*(static or (96, 128)), 3), dtype=torch.uint8)
    axes = {name: {0: "objects"} for name in detector.output_names}
    if not static:
        axes["image"] = {0: "height", 1: "width"}
    form = mock.patch.object(torch, "group_norm", _GROUP_NORMS[group_norm].apply)
    with warnings.catch_warnings(), traceable(detector.model), form:
        warnings.simplefilter("ignore")  # of what a trace may miss: the file is compared instead
        torch.onnx.export(
            detector,
            (image,),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=["image"],
            output_names=detector.output_names,
            dynamic_axes=axes,
        )


def _both(predictor, exported, static: tuple[int, int] | None, image: str | None) -> tuple:
    """What both find in an image of another size than that of the trace, or of the static one."""
    if image:
        pixels = Image.fromarray(predictor.read(image))
    else:
        pixels = draw_image(np.random.default_rng(4), 256)[0].resize((317, 203))
    if not static:
        return exported(pixels), predictor(pixels)
    pixels = np.array(pixels.resize(static[::-1]))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if exported.metadata["input_format"] == "BGR":
        image = image.flip(0)
    with torch.no_grad():
        return exported(pixels), predictor.model([{"image": image}])[0]["instances"]


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
    (edges, longest), *_ = [*((r.short_edge_length, r.max_size) for r in resizing), ((0,), 0)]
    return {
        "class_names": list(predictor.class_names),
        "keypoint_names": list(predictor.keypoint_names),
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


_native_group_norm = torch.group_norm


class _GroupNorm(torch.autograd.Function):
    """``torch.group_norm`` with a form of ours in ONNX. PyTorch's cannot take an N of 0."""

    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, *_):
        return _native_group_norm(x, num_groups, weight, bias, eps)


class _Operator(_GroupNorm):
    @staticmethod
    def symbolic(g, x, num_groups, weight, bias, eps, *_):
        def constant(values):
            return g.op("Constant", value_t=torch.as_tensor(values))

        # One for none, as in images without objects: ONNX Runtime cannot take an N of 0.
        count, others = g.op("Shape", x, end_i=1), x.type().dim() - 1
        empty = g.op("Cast", g.op("Equal", count, constant([0])), to_i=7)  # int64
        pads = [constant([0] * (others + 1)), empty, constant([0] * others)]
        y = g.op("Pad", x, g.op("Concat", *pads, axis_i=0))
        y = g.op("GroupNormalization", y, weight, bias, num_groups_i=num_groups, epsilon_f=eps)
        y = g.op("Slice", y, constant([0]), count, constant([0]))
        return y.setType(x.type())


class _Decomposed(_GroupNorm):
    @staticmethod
    def symbolic(g, x, num_groups, weight, bias, eps, *_):
        def constant(value):
            return g.op("Constant", value_t=torch.as_tensor(value))

        values = g.op("ReduceProd", g.op("Shape", x, start_i=1), keepdims_i=1)
        groups = constant([num_groups])
        grouped = g.op(
            "Concat", g.op("Shape", x, end_i=1), groups, g.op("Div", values, groups), axis_i=0
        )
        y = g.op(
            "InstanceNormalization",
            g.op("Reshape", x, grouped, allowzero_i=1),
            constant(torch.ones(num_groups)),
            constant(torch.zeros(num_groups)),
            epsilon_f=eps,
        )
        y = g.op("Reshape", y, g.op("Shape", x), allowzero_i=1)
        per_channel = constant(list(range(1, x.type().dim() - 1)))
        y = g.op("Mul", y, g.op("Unsqueeze", weight, per_channel))
        return g.op("Add", y, g.op("Unsqueeze", bias, per_channel)).setType(x.type())


_GROUP_NORMS = {"decomposed": _Decomposed, "op": _Operator}
GROUP_NORMS = tuple(_GROUP_NORMS)
