#!/usr/bin/env python3
"""What GN costs, one command per question.

    python tools/benchmark.py memory    --output DIR   what the ResNet keeps for its backward pass
    python tools/benchmark.py kernels   --output DIR   each GN layer alone
    python tools/benchmark.py step      --output DIR   a training step of Mask R-CNN
    python tools/benchmark.py inference --output DIR   images per second
    python tools/benchmark.py scaling   --output DIR   the step, over sizes and numbers of images

All variants run in turn in one process (A B C A B C), and are compared round by round: a cell has
the median, and the quartiles in brackets. The table (.md) and all samples (.json) go into DIR, in
files called after the question and the time. Without a GPU the defaults are small.
"""

import argparse
import dataclasses
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from gn_detect.benchmark import detectors, kernels, questions, report
from gn_detect.engine import sentence
from gn_detect.engine.train_loop import AMP_DTYPES

QUESTIONS = {
    "memory": questions.memory,
    "kernels": questions.kernels,
    "step": questions.step,
    "inference": questions.inference,
    "scaling": questions.step,
}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    for name in QUESTIONS:
        command = commands.add_parser(
            name,
            help=f"its options: {name} --help",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add_options(command, name)
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser, question: str) -> None:
    on_gpu = torch.cuda.is_available()

    def by_device(gpu, cpu):
        return gpu if on_gpu else cpu

    def several(*names, **options):
        parser.add_argument(*names, nargs="+", **options)

    known = list(kernels.VARIANTS if question == "kernels" else detectors.VARIANTS)
    usual = known[:3] if question == "inference" else known  # modes of memory do not differ there
    if question == "kernels" and not on_gpu:  # compiling takes minutes
        usual = [name for name in known if name != "compiled"]
    sizes = by_device([(480, 800), (640, 1088), (800, 1344)], [(128, 160), (192, 256), (256, 320)])
    sizes = {"memory": [(512, 512)], "scaling": sizes}.get(question, sizes[-1:])
    images = {"memory": [1], "inference": [1], "step": [2]}.get(question, [1, 2])

    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--threads", type=positive, help="of PyTorch, on a CPU")
    several("--variants", choices=known, default=usual, metavar="NAME", help="to compare")
    several("--size", "--sizes", type=size, default=sizes, metavar="HxW", help="of the images")
    several("-n", "--images", type=positive, default=images, metavar="N", help="of a step")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="of the config, after --")
    device = {"choices": ["cuda", "cpu"], "default": by_device("cuda", "cpu")}
    if question == "memory":
        parser.add_argument("--device", **device, help="which need not be there")
    else:
        parser.set_defaults(device=device["default"])
        parser.add_argument("--rounds", type=positive, default=by_device(50, 7), help="timed")
        parser.add_argument("--warmup", type=positive, default=3, help="rounds before these")
    if question not in ("memory", "inference"):
        rois = {"type": positive, "default": by_device(512, 64)}
        parser.add_argument("--rois", **rois, help="of each image, a quarter with masks")
    if question == "kernels":
        dtypes = by_device(["float32", "bfloat16"], ["float32"])
        several("--dtypes", dest="dtype", choices=kernels.DTYPES, default=dtypes, help="of maps")
        layouts = by_device(["nchw", "channels_last"], ["nchw"])
        several("--layouts", dest="layout", choices=kernels.LAYOUTS, default=layouts, help="same")
        return
    amp = ["none", *AMP_DTYPES]
    parser.add_argument("--amp", choices=amp, default="none", help="mixed precision")
    if question != "memory":
        whose = {"nargs": "?", "choices": ["all", "ours"], "const": "all", "default": ""}
        parser.add_argument("--channels-last", **whose, help="all variants, or ours alone")


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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "tools/benchmark.py", *words])
    path = args.output / f"{args.question}-{time.strftime('%Y%m%d-%H%M%S')}"
    given = vars(args) | {"opts": tuple(args.opts)}
    fields = [f.name for f in dataclasses.fields(detectors.Settings) if f.name in given]
    varied = {name: given[name] for name in fields if isinstance(given[name], list)}
    settings = detectors.Settings(**{name: given[name] for name in fields if name not in varied})
    how = {name: given[name] for name in ("variants", "rounds", "warmup") if name in given}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".md").touch()  # before hours of measuring
    except OSError as error:
        sys.exit(f"error: --output {args.output}: {error.strerror}; give a directory to write in")
    try:
        for rows, results in questions.answer(QUESTIONS[args.question], settings, varied, **how):
            report.write(path, command, given, rows, results)  # what is measured is not lost
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")
    # Single layers are many, and in the file.
    print(report.markdown([row for row in rows if row.get("layer", "all") == "all"]))
    print("Wrote", path.with_suffix(".md"), path.with_suffix(".json"))


if __name__ == "__main__":
    main()
