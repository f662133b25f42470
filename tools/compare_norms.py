#!/usr/bin/env python3
"""Train the same detector with each norm at several batch sizes, and compare the AP.

    python tools/compare_norms.py --output output/norms

Every run sees the same number of images from the same recipe: learning rate and iterations follow
from the images per step by the linear rule. A run that has its result.json is not repeated, and one
that was interrupted is resumed, so the same command goes on where it stopped. At the end, and with
--report alone at any time: a table, and AP against images per step in norms.png.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

from gn_detect import get_config_file
from gn_detect.config import load_config

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
    directory = run_directory(args, norm, per_step, seed)
    reference = load_config(args.config_file).SOLVER.REFERENCE_BATCH_SIZE
    name, _, ws = norm.partition("+")
    opts = [
        *(word for key in NORM_KEYS for word in (f"MODEL.{key}.NORM", name)),
        *("MODEL.GN.WEIGHT_STANDARDIZATION", "authors" if ws else "''"),
        *("SOLVER.MAX_ITER", args.images // reference, "SOLVER.IMS_PER_GPU", per_step),
        *("TEST.EVAL_PERIOD", 0, "SEED", seed),
        *("GUARDS.SCRATCH_FROZEN_BN", False),  # what it costs is a row of the table
        *args.opts,
    ]
    data = [(f"--{option}", getattr(args, option.replace("-", "_"))) for option in DATA]
    data = [word for pair in data if pair[1] for word in pair]
    settings = " ".join(map(str, [Path(args.config_file).name, *data, *opts]))
    directory.mkdir(parents=True, exist_ok=True)
    stated = directory / "settings.txt"
    if stated.exists() and stated.read_text() != settings:
        sys.exit(f"error: {directory} holds a run with other settings; choose another --output")
    stated.write_text(settings)
    if (directory / "result.json").exists():
        return
    command = [sys.executable, Path(__file__).with_name("train_net.py"), "--resume", *data]
    command += ["--config-file", args.config_file, *opts, "OUTPUT_DIR", directory]
    start = time.monotonic()
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    (directory / "output.txt").write_text(output)
    result = {"minutes": round((time.monotonic() - start) / 60, 1)}
    diverged = re.search(r"training diverged at iteration (\d+)", output)
    if done.returncode == 0:
        rows = [json.loads(line) for line in (directory / "metrics.json").read_text().splitlines()]
        last = [row for row in rows if "bbox/AP" in row][-1]
        for kind, key in (("box AP", "bbox/AP"), ("mask AP", "segm/AP")):
            # Detectron2 has NaN where nothing was predicted, pycocotools -1 where nothing is asked.
            ap = last.get(key, 0.0)  # a model without masks has no mask AP
            result[kind] = max(ap, 0.0) if ap == ap else 0.0
    elif diverged:
        result |= {"box AP": 0.0, "mask AP": 0.0, "diverged": int(diverged[1])}
    else:
        sys.exit(
            f"error: a run failed; its last words, of {directory / 'output.txt'}:\n{output[-2000:]}"
        )
    (directory / "result.json").write_text(json.dumps(result))
    print(f"{norm}, {per_step} images per step, seed {seed}: {cell([result])}", flush=True)


def run_directory(args, norm: str, per_step: int, seed: int) -> Path:
    return args.output / f"{norm}-{per_step}-seed{seed}"


def report(args) -> None:
    """Print the table of all results that are there, and draw the plot."""
    table, figure = [], plt.figure(figsize=(6, 4))
    for norm in args.norms:
        row, points = [norm], []
        for per_step in args.images_per_step:
            files = sorted(args.output.glob(f"{norm}-{per_step}-seed*/result.json"))
            results = [json.loads(f.read_text()) for f in files]
            row.append(cell(results))
            points += [(per_step, r["box AP"]) for r in results]
        table.append(row)
        means = {x: statistics.mean(y for x2, y in points if x2 == x) for x, _ in points}
        (line,) = plt.plot(list(means), list(means.values()), label=norm)
        plt.plot(*zip(*points, strict=True), "o", color=line.get_color()) if points else None
    headers = ["box / mask AP, at", *(f"{n} per step" for n in args.images_per_step)]
    print(tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True))
    plt.xscale("log", base=2)
    plt.xticks(args.images_per_step, args.images_per_step)
    plt.xlabel("images per step")
    plt.ylabel("box AP")
    plt.title(f"From scratch, {args.images} images seen", fontsize="medium")
    plt.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
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
        for seed in range(args.seeds):
            for norm in args.norms:
                for per_step in args.images_per_step:
                    run(args, norm, per_step, seed)
    report(args)


if __name__ == "__main__":
    main()
