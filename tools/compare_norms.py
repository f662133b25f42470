#!/usr/bin/env python3
"""Train the same detector with each norm at several batch sizes, and compare the AP.

    python tools/compare_norms.py --output output/norms

Every run sees the same number of images from the same recipe: learning rate and iterations follow
from the images per step by the linear rule. A run that has its result.json is not repeated, and one
that was interrupted is resumed, so the same command goes on where it stopped. At the end, and with
--report alone at any time: a table, and AP against images per step in norms.png.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from gn_detect import get_config_file
from gn_detect.config import load_config
from gn_detect.visualize import read_curves

NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
NORMS = ("GN", "GN+WS", "LN", "IN", "BN", "FrozenBN")
DATA = ("train-json", "train-images", "val-json", "val-images")
CONFIG = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--config-file", default=get_config_file(CONFIG))
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=NORMS)
    parser.add_argument("--images-per-step", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--images", type=int, default=1200, help="seen by every run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each")
    for option in DATA:
        parser.add_argument(f"--{option}", help="of tools/train_net.py, for data of your own")
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="more of the config")
    args = parser.parse_args(argv)
    if args.train_json and not args.val_json:
        parser.error("--train-json needs --val-json: the AP is compared")
    return args


def run(args, norm: str, per_step: int, seed: int) -> None:
    """Train and evaluate one; write result.json into its directory."""
    directory = args.output / f"{norm}-{per_step}-seed{seed}"
    reference = load_config(args.config_file).SOLVER.REFERENCE_BATCH_SIZE
    name, _, ws = norm.partition("+")
    opts = [
        *(word for key in NORM_KEYS for word in (f"MODEL.{key}.NORM", name)),
        *("MODEL.GN.WEIGHT_STANDARDIZATION", "authors" if ws else "''"),
        *("SOLVER.IMS_PER_GPU", per_step, "TEST.EVAL_PERIOD", 0, "SEED", seed),
        *("GUARDS.SCRATCH_FROZEN_BN", False),  # what it costs is a row of the table
        *args.opts,
    ]
    data = [(f"--{option}", getattr(args, option.replace("-", "_"))) for option in DATA]
    data = [word for pair in data if pair[1] for word in pair]
    command = [sys.executable, Path(__file__).with_name("train_net.py"), "--resume", *data]
    directory.mkdir(parents=True, exist_ok=True)
    recipe = directory / "recipe.yaml"  # what a file states is scaled with the images of a step
    base, iterations = json.dumps(os.path.abspath(args.config_file)), args.images // reference
    recipe.write_text(f"_BASE_: {base}\nSOLVER:\n  MAX_ITER: {iterations}\n")
    command += ["--config-file", recipe, *opts, "OUTPUT_DIR", directory]
    command = list(map(str, command))
    stated, settings = directory / "settings.txt", shlex.join(command[2:])
    if stated.exists() and stated.read_text() != settings:
        sys.exit(f"error: {directory} holds a run with other settings; choose another --output")
    stated.write_text(settings)
    if (directory / "result.json").exists():
        return
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **streams, text=True, errors="replace")
    (directory / "output.txt").write_text(done.stdout)
    if done.returncode == 0:
        curves = read_curves(directory / "metrics.json")
        # A model without masks has no mask AP. Of 0 and NaN, which Detectron2 has where nothing was
        # predicted, or -1, which pycocotools has where nothing is asked, max takes the first.
        ap = {key: max(0.0, curves.get(key, ([], [0.0]))[1][-1]) for key in ("bbox/AP", "segm/AP")}
        result = {"box AP": ap["bbox/AP"], "mask AP": ap["segm/AP"]}
    elif diverged := re.search(r"training diverged at iteration (\d+)", done.stdout):
        result = {"box AP": 0.0, "mask AP": 0.0, "diverged": int(diverged[1])}
    else:
        words = done.stdout[-2000:]
        sys.exit(f"error: a run failed; its last words, of {directory / 'output.txt'}:\n{words}")
    (directory / "result.json").write_text(json.dumps(result))
    print(f"{norm}, {per_step} images per step, seed {seed}: {cell([result])}", flush=True)


def report(args) -> None:
    """Print the table of all results that are there, and draw the means."""
    table, figure = [], Figure((6, 4))
    axes = figure.subplots()
    for norm in args.norms:
        row, means = [norm], {}
        for per_step in args.images_per_step:
            files = sorted(args.output.glob(f"{norm}-{per_step}-seed*/result.json"))
            results = [json.loads(f.read_text()) for f in files]
            row.append(cell(results))
            if results:
                means[per_step] = statistics.mean(r["box AP"] for r in results)
        table.append(row)
        axes.plot(list(means), list(means.values()), "o-", label=norm)
    headers = ["box / mask AP, at", *(f"{n} per step" for n in args.images_per_step)]
    print(tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True))
    title = f"From scratch, {args.images} images seen"
    axes.set(xlabel="images per step", ylabel="box AP", title=title, xticks=args.images_per_step)
    axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.savefig(args.output / "norms.png", dpi=150, bbox_inches="tight")
    print(f"Plot: {args.output / 'norms.png'}")


def cell(results: list[dict]) -> str:
    """Mean of the seeds, with the lowest and the highest."""
    if not results:
        return ""
    box, mask = ([r[f"{kind} AP"] for r in results] for kind in ("box", "mask"))
    text = f"{statistics.mean(box):.1f} / {statistics.mean(mask):.1f}"
    if len(results) > 1:
        text += f" ({min(box):.1f}-{max(box):.1f} / {min(mask):.1f}-{max(mask):.1f})"
    if diverged := [str(r["diverged"]) for r in results if "diverged" in r]:
        text += f", diverged at iteration {', '.join(diverged)}"
    return text


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.report:
        seeds = range(args.seeds)
        for seed, norm, per_step in itertools.product(seeds, args.norms, args.images_per_step):
            run(args, norm, per_step, seed)
    report(args)


if __name__ == "__main__":
    main()
