#!/usr/bin/env python3
"""What GN costs, one command per question.

    python tools/benchmark.py memory    --output DIR   what the ResNet keeps for its backward pass
    python tools/benchmark.py kernels   --output DIR   each GN layer alone
    python tools/benchmark.py step      --output DIR   a training step of Mask R-CNN
    python tools/benchmark.py inference --output DIR   images per second
    python tools/benchmark.py scaling   --output DIR   the step, over sizes and numbers of images

All variants run in turn in one process (A B C A B C), and are compared round by round: a cell holds
the median, and the quartiles in brackets. Tables (.md), all samples (.json) and a plot (.png) go
into DIR, in files that are called after the settings. Without a GPU the defaults are small: images
of 256x320 instead of 800x1344, with 64 RoIs of each instead of 512.
"""

import argparse
import os
import re
import shlex
import sys
import zlib
from pathlib import Path

import torch

from gn_detect import get_config_file
from gn_detect.benchmark import detectors, kernels, questions
from gn_detect.benchmark.detectors import DETECTRON2_GN, FROZEN_BN, Settings
from gn_detect.benchmark.kernel_question import ask_kernels
from gn_detect.benchmark.timing import Plan
from gn_detect.engine import sentence
from gn_detect.engine.train_loop import AMP_DTYPES
from gn_detect.layers import functional

CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
INFERENCE = (FROZEN_BN, DETECTRON2_GN, "ours-fast")  # where modes of memory do not differ

# Of a device and, where they differ, of a question.
DEFAULTS = {
    "cuda": {"size": (800, 1344), "sizes": [(480, 800), (640, 1088), (800, 1344)], "rois": 512},
    "cpu": {"size": (256, 320), "sizes": [(128, 160), (192, 256), (256, 320)], "rois": 64},
}
ROUNDS = {"cuda": 50, "cpu": 7}
DTYPES = {"cuda": ["float32", "bfloat16"], "cpu": ["float32"]}
# What the names of the files tell, and where they are.
NAMED = ("question", "device", "amp", "channels_last", "dtypes", "layouts", "images", "size")
NAMED += ("sizes", "threads", "output")
LAYOUTS = {"cuda": list(kernels.LAYOUTS), "cpu": ["nchw"]}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name in ("memory", "kernels", "step", "inference", "scaling"):
        add_options(commands.add_parser(name, help=f"its options: {name} --help"), name)
    args = parser.parse_args(argv)
    here = torch.cuda.is_available() or args.question == "memory"  # which needs no device
    if args.device == "cuda" and not here:
        parser.error("--device cuda, but PyTorch finds no CUDA device: leave it out for the CPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and args.question != "memory" and functional.triton_kernels is None:
        parser.error("--device cuda: triton is not installed, whose kernels would be measured")
    complete(args)
    for base in args.baselines:
        if base not in args.variants:
            parser.error(f"--baselines: {base} is not among --variants {' '.join(args.variants)}")
    if args.variants == ["autocast"] and "float32" in args.dtypes:
        parser.error("--variants autocast, which is for --dtypes bfloat16 and float16, not float32")
    plain = parser.parse_args([args.question, "--device", args.device, "--output", "."])
    args.name = name_of(args, vars(complete(plain)))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}; it has to be a directory")
    if not os.access(args.output, os.W_OK):
        parser.error(f"--output {args.output}: no files can be written there")
    return args


def complete(args):
    """Fill in the defaults that depend on the device or on other options, in place."""
    defaults = DEFAULTS[args.device] | {
        "rounds": ROUNDS[args.device],
        "warmup": 3,
        "dtypes": DTYPES[args.device],
        "layouts": LAYOUTS[args.device],
    }
    for name, value in defaults.items():
        if getattr(args, name, ...) is None:
            setattr(args, name, value)
    if args.question == "kernels" and args.device == "cpu" and args.variants is None:
        args.variants = [v for v in kernels.VARIANTS if v != "compiled"]  # minutes of compiling
    args.variants = args.variants or variants_of(args.question)
    usual = ("eager",) if args.question == "kernels" else (DETECTRON2_GN, FROZEN_BN)
    if args.baselines is None:
        args.baselines = [b for b in usual if b in args.variants] or args.variants[:1]
    return args


def name_of(args, plain: dict) -> str:
    """Of the files: the settings, and a checksum of those that differ from the ``plain`` ones."""
    values = vars(args)
    kinds = [["float32" if args.amp == "none" else args.amp]] if "amp" in values else []
    kinds += [values[key] for key in ("dtypes", "layouts") if key in values]
    sizes = values.get("sizes") or [args.size]
    images = args.images if isinstance(args.images, list) else [args.images]
    parts = [args.question, args.device, *("+".join(kind) for kind in kinds)]
    if values.get("channels_last"):
        parts.append("channels_last" + "_ours" * (args.channels_last == "ours"))
    parts.append(f"{'+'.join(map(str, images))}x{'+'.join(f'{h}x{w}' for h, w in sizes)}")
    if args.threads:
        parts.append(f"{args.threads}threads")
    others = [(k, str(v)) for k, v in values.items() if k not in NAMED and v != plain[k]]
    if others:
        parts.append(f"{zlib.crc32(repr(others).encode()):08x}")
    return "-".join(parts)


def add_options(parser: argparse.ArgumentParser, question: str) -> None:
    known = kernels.VARIANTS if question == "kernels" else detectors.VARIANTS
    several = {"nargs": "+", "choices": known, "metavar": "NAME"}
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--config-file", default=get_config_file(CONFIG), help="R-50-FPN with GN")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda, where there is")
    parser.add_argument("--threads", type=positive, help="of PyTorch, on a CPU")
    parser.add_argument("--variants", **several, help=f"of {', '.join(known)}")
    parser.add_argument("--baselines", **several, help="that the others are compared with")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="more of the config, after --")
    if question == "scaling":
        parser.add_argument("--sizes", nargs="+", type=size, metavar="HxW", help="of images")
    else:
        default = (512, 512) if question == "memory" else None
        parser.add_argument("--size", type=size, metavar="HxW", default=default, help="of images")
    if question in ("scaling", "kernels"):
        parser.add_argument("-n", "--images", nargs="+", type=positive, default=[1, 2])
    else:
        one = question in ("memory", "inference")
        parser.add_argument("-n", "--images", type=positive, default=1 if one else 2)
    if question != "memory":
        parser.add_argument("--rounds", type=positive, help="default: 50, on a CPU 7")
        parser.add_argument("--warmup", type=positive, help="rounds before them; default: 3")
    if question not in ("memory", "inference"):
        parser.add_argument("--rois", type=positive, help="of each image, a quarter with masks")
    if question == "kernels":
        parser.add_argument("--dtypes", nargs="+", choices=kernels.DTYPES, help="of the maps")
        parser.add_argument("--layouts", nargs="+", choices=kernels.LAYOUTS, help="of the maps")
        parser.add_argument(
            "--launch",
            choices=["graph", "eager"],
            default="graph",
            help="on a GPU: time the kernels alone, or with the launches from Python",
        )
    else:
        parser.add_argument(
            "--amp", choices=["none", *AMP_DTYPES], default="none", help="mixed precision"
        )
        if question != "memory":
            parser.add_argument(
                "--channels-last",
                nargs="?",
                choices=["all", "ours"],
                const="all",
                default="",
                help="all variants, or ours alone",
            )
        parser.add_argument(
            "--freeze-at", type=int, default=0, help="MODEL.BACKBONE.FREEZE_AT; default: 0"
        )


def variants_of(question: str) -> list[str]:
    if question == "kernels":
        return list(kernels.VARIANTS)
    return list(INFERENCE if question == "inference" else detectors.VARIANTS)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; height x width in pixels, such as 800x1344, or one for both"
        )
    return int(match[1]), int(match[2] or match[1])


def ask(args):
    values = {
        name: getattr(args, name)
        for name in ("config_file", "device", "images", "size", "rois", "amp")
        + ("channels_last", "freeze_at")
        if hasattr(args, name)
    }
    plan = Plan(args.variants, args.baselines)
    if args.question != "memory":
        plan = Plan(args.variants, args.baselines, args.rounds, args.warmup)
    if args.question in ("kernels", "scaling"):
        values["images"] = args.images[0]
    if args.question == "scaling":
        values["size"] = args.sizes[0]
    settings = Settings(**values, opts=tuple(args.opts))
    if args.question == "kernels":
        graph = args.launch == "graph"
        return ask_kernels(settings, plan, args.images, args.dtypes, args.layouts, graph)
    if args.question == "scaling":
        return questions.scaling(settings, plan, args.sizes, args.images)
    return getattr(questions, args.question)(settings, plan)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "tools/benchmark.py", *words])
    try:
        for report in ask(args):  # written as it grows: what is measured is not lost
            paths = report.write(args.output, args.name, command)
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")
    print(report.text())
    print("Wrote", *paths)


if __name__ == "__main__":
    main()
