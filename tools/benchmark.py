#!/usr/bin/env python3
"""What GN costs, one command per question.

    python tools/benchmark.py memory    --output DIR   what the ResNet keeps for its backward pass
    python tools/benchmark.py estimate  --output DIR   a step's memory, estimated and measured
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
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from detectron2.utils.collect_env import collect_env_info
from tabulate import tabulate

from gn_detect.benchmark import detectors, kernels, peers, questions
from gn_detect.engine import errors_as_sentences
from gn_detect.engine.train_loop import AMP_DTYPES

QUESTIONS = {
    "memory": questions.memory,
    "estimate": questions.estimate,
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
        style = argparse.ArgumentDefaultsHelpFormatter
        add_options(commands.add_parser(name, formatter_class=style), name)
    args = parser.parse_args(argv)
    usual = commands.choices[args.question].get_default("variants")
    if getattr(args, "mixed", False) and args.variants is usual:
        args.variants = detectors.VARIANTS
    return args


def add_options(parser: argparse.ArgumentParser, question: str) -> None:
    sizes, rois, rounds, device = [(128, 160), (192, 256), (256, 320)], 64, 7, "cpu"
    dtypes, layouts = list(kernels.DTYPES)[:1], list(kernels.LAYOUTS)[:1]
    if torch.cuda.is_available():
        sizes, rois, rounds, device = [(480, 800), (640, 1088), (800, 1344)], 512, 50, "cuda"
        dtypes, layouts = list(kernels.DTYPES)[:2], list(kernels.LAYOUTS)
    sizes = {"memory": [(512, 512)], "scaling": sizes}.get(question, sizes[-1:])
    images = {"memory": [1], "estimate": [1], "inference": [1], "step": [2]}.get(question, [1, 2])
    known = (*kernels.VARIANTS, *peers.PEERS) if question == "kernels" else detectors.VARIANTS
    # The modes of memory do not differ in inference, and Detectron2's variants have no estimate.
    # Where no image is padded, there is nothing to mask.
    unmasked = [name for name in known if name != detectors.MASKED]
    usual = {"inference": known[:3], "estimate": unmasked[2:]}.get(question, unmasked)
    if question == "kernels":  # to compile all layers takes minutes
        usual = *kernels.VARIANTS, *peers.installed()

    add = parser.add_argument
    add("--output", type=Path, required=True, help="directory of the results")
    add("--threads", type=positive, help="of PyTorch, on a CPU")
    add("--variants", nargs="+", choices=known, default=usual, metavar="NAME", help="to compare")
    add("--size", "--sizes", nargs="+", type=size, default=sizes, metavar="HxW", help="in pixels")
    add("-n", "--images", nargs="+", type=positive, default=images, metavar="N", help="of a step")
    add("opts", nargs="*", metavar="KEY VALUE", help="of the config, after --")
    if question in ("step", "scaling"):
        add("--mixed", action="store_true", help="every second image has the other orientation")
    if question == "memory":
        add("--device", choices=["cuda", "cpu"], default=device, help="which need not be there")
    else:
        parser.set_defaults(device=device)
        if question != "estimate":
            add("--rounds", type=positive, default=rounds, help="timed")
    if question not in ("memory", "inference"):
        add("--rois", type=positive, default=rois, help="of each image, a quarter with masks")
    if question == "kernels":
        parser.set_defaults(layout=layouts)
        known = kernels.DTYPES
        add("--dtypes", dest="dtype", nargs="+", choices=known, default=dtypes, help="of the maps")
    else:
        add("--amp", choices=["none", *AMP_DTYPES], default="none", help="mixed precision")
    if question not in ("memory", "kernels"):
        whose = {"nargs": "?", "choices": ["all", "ours"], "const": "all", "default": ""}
        add("--channels-last", **whose, help="all variants, or ours alone")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def size(text: str) -> tuple[int, int]:
    height, width = map(positive, text.split("x"))
    return height, width


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    given = vars(args) | {"opts": tuple(args.opts)}
    fields = [f.name for f in dataclasses.fields(detectors.Settings) if f.name in given]
    varied = {name: given[name] for name in fields if isinstance(given[name], list)}
    settings = detectors.Settings(**{name: given[name] for name in fields if name not in varied})
    how = {name: given[name] for name in ("variants", "rounds") if name in given}
    path = args.output / f"{args.question}-{time.strftime('%Y%m%d-%H%M%S')}"
    content = {
        "command": shlex.join(["python", "tools/benchmark.py", *words]),
        "settings": given | {"threads": torch.get_num_threads()},
        "environment": collect_env_info(),
    }
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".md").touch()  # before hours of measuring
    except OSError as error:
        sys.exit(f"error: --output {args.output}: {error.strerror}; give a directory to write in")
    with errors_as_sentences():
        for rows, results in questions.answer(QUESTIONS[args.question], settings, varied, **how):
            # After each combination, so that what is measured is not lost.
            text = json.dumps(content | {"results": results}, indent=1, default=str)
            path.with_suffix(".json").write_text(text)
            path.with_suffix(".md").write_text(f"`{content['command']}`\n\n{markdown(rows)}\n")
    # Single layers are many, and in the file.
    print(markdown([row for row in rows if row.get("layer", "all") == "all"]))
    print("Wrote", path.with_suffix(".md"), path.with_suffix(".json"))


def markdown(rows: list[dict]) -> str:
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    main()
