#!/usr/bin/env python3
"""Train the same model with each norm at several images per forward pass, and compare: the AP of a
detector, or with ``--task classification`` the error of a classifier (GN paper, figure 1).

    python tools/compare_norms.py --total-batch 8 --output output/norms

Every run sees the same images in the same order and with the same augmentation, and takes the same
optimizer steps at the same learning rate, each on the mean gradient of --total-batch images. Only
how many of these pass the network together differs (--images-per-pass; SOLVER.ACCUMULATE_STEPS
makes up for it). So the results differ by what a norm makes of the batch, by what padding does, and
by noise, of which --seeds says how much there is.

A run that has its result.json is not repeated, and one that was interrupted is resumed, so the same
command goes on where it stopped, and another with more norms or seeds adds to it. At the end, and
with --report alone at any time: a table of all that is there, and its first value over images per
pass in norms.png, with the range of the seeds.
"""

import argparse
import dataclasses
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from gn_detect import get_config_file
from gn_detect.data.shapes import write_shapes
from gn_detect.visualize import read_curves

NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
NORMS = ("GN", "GN+mask", "GN+WS", "LN", "IN", "LN2d", "BN", "FrozenBN", "SyncBN")
DATA = ("train-json", "train-images", "val-json", "val-images")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained and compared.

    Attributes:
        config: that ships with gn_detect.
        command: (args, norm, images per pass, seed, directory of the run) -> the words behind
            ``python`` that train and evaluate, or resume. The last one has the directory.
        metrics: what the table calls a metric -> its name in metrics.json. The first is drawn.
        worst: the value of the metrics of a run that diverged, or that has none.
        norms: those that are compared where none are named.
        total_batch, images_per_pass, images: the defaults of the options.
    """

    config: str
    command: Callable[[argparse.Namespace, str, int, int, Path], list]
    metrics: dict[str, str]
    worst: float
    norms: tuple[str, ...]
    total_batch: int
    images_per_pass: tuple[int, ...]
    images: int


def detection(args, norm: str, per_pass: int, seed: int, directory: Path) -> list:
    name, *variants = norm.split("+")
    data = {option: getattr(args, option.replace("-", "_")) for option in DATA}
    opts = [
        *(word for key in NORM_KEYS for word in (f"MODEL.{key}.NORM", name)),
        *("MODEL.GN.WEIGHT_STANDARDIZATION", "authors" if "WS" in variants else "''"),
        *(("MODEL.GN.MASK_PADDING", True) if "mask" in variants else ()),
        *("SOLVER.IMS_PER_GPU", per_pass),
        *("SOLVER.ACCUMULATE_STEPS", args.total_batch // (per_pass * args.num_gpus)),
        *("SOLVER.MAX_ITER", args.images // args.total_batch, "SOLVER.CHECKPOINT_KEEP", 1),
        # Groups would change the order of the images with the size of a batch, and several workers
        # their augmentation: each draws random numbers of its own, and takes whole batches.
        *("DATALOADER.ASPECT_RATIO_GROUPING", False, "DATALOADER.NUM_WORKERS", 0),
        *("TEST.EVAL_PERIOD", 0, "TEST.REPORT", False, "SEED", seed),
        *("GUARDS.SCRATCH_FROZEN_BN", False),  # what it costs is a row of the table
    ]
    if args.mixed:
        root = write_shapes(args.output / "mixed_shapes", mixed=True)
        data = {f"{split}-json": root / f"{split}.json" for split in ("train", "val")}
        data |= {f"{split}-images": root / split for split in ("train", "val")}
        opts += ["INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96]  # as drawn
    return [
        *(Path(__file__).with_name("train_net.py"), "--resume", "--num-gpus", args.num_gpus),
        *("--config-file", args.config_file),
        *(word for option, value in data.items() if value for word in (f"--{option}", value)),
        *(*opts, *args.opts, "OUTPUT_DIR", directory),
    ]


def classification(args, norm: str, per_pass: int, seed: int, directory: Path) -> list:
    name, *variants = norm.split("+")
    norms = {
        "GN": {},
        "LN": {"norm.num_groups": 1},
        "IN": {"norm.num_groups": 0, "norm.channels_per_group": 1},
    }
    keys = {f"model.stem.{key}": n for key, n in norms.get(name, {"norm": name}).items()} | {
        "model.weight_standardization": "authors" if "WS" in variants else "''",
        "train.ims_per_gpu": per_pass,
        "train.accumulate_steps": args.total_batch // (per_pass * args.num_gpus),
        "train.max_iter": args.images // args.total_batch,
        **dict.fromkeys(("train.epochs", "train.eval_epochs", "dataloader.train.num_workers"), 0),
        "train.checkpointer.max_to_keep": 1,
        "train.seed": seed,
        "train.report": False,
    }
    return [
        *(Path(__file__).with_name("lazyconfig_train_net.py"), "--resume"),
        *("--num-gpus", args.num_gpus, "--config-file", args.config_file),
        *(f"{key}={value}" for key, value in keys.items()),
        *(*args.opts, f"train.output_dir={directory}"),
    ]


TASKS = {
    "detection": Task(
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml",
        detection,
        {"box AP": "bbox/AP", "mask AP": "segm/AP"},
        worst=0.0,
        norms=tuple(norm for norm in NORMS if norm not in ("GN+mask", "SyncBN")),
        total_batch=8,
        images_per_pass=(1, 2, 4, 8),
        images=5600,
    ),
    "classification": Task(
        "lazy/quickstart/resnet_18_narrow_gn_classes.py",
        classification,
        {"top-1 error": "classification/top1_error"},
        worst=100.0,
        norms=("GN", "LN", "BN"),
        total_batch=32,
        images_per_pass=(2, 4, 8, 16, 32),
        images=80000,
    ),
}


def defaults(option: str) -> str:
    values = (str(getattr(task, option)) for task in TASKS.values())
    return " and ".join(re.sub(r"[(',)]", "", v) for v in values)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="detection")
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--config-file", help="other than the small one of the task")
    parser.add_argument(
        "--norms",
        nargs="+",
        choices=NORMS,
        help="GN+mask is GN with MODEL.GN.MASK_PADDING; SyncBN needs several GPUs (--num-gpus), on "
        f"one it is BN. By default: {defaults('norms')}",
    )
    for option, what, more in (
        ("total-batch", "images of an optimizer step", {}),
        ("images-per-pass", "in each process; they divide the total batch", {"nargs": "+"}),
        ("images", "seen by every run", {}),
    ):
        text = f"{what}. By default: {defaults(option.replace('-', '_'))}"
        parser.add_argument(f"--{option}", type=int, metavar="N", help=text, **more)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each: seeds 0, 1, ...")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of a run")
    for option in DATA:
        parser.add_argument(f"--{option}", help="of tools/train_net.py, for data of your own")
    text = "generated landscapes and portraits, of which a pass of several is padded"
    parser.add_argument("--mixed", action="store_true", help=text)
    parser.add_argument("--report", action="store_true", help="only the table and the plot")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="more of the config")
    args = parser.parse_args(argv)
    task, args.task = args.task, TASKS[args.task]
    args.config_file = args.config_file or get_config_file(args.task.config)
    for option in ("norms", "total_batch", "images_per_pass", "images"):
        if getattr(args, option) is None:
            setattr(args, option, getattr(args.task, option))
    if min(args.total_batch, args.seeds, *args.images_per_pass) < 1:
        parser.error("--total-batch, --images-per-pass and --seeds must be at least 1")
    data = [f"--{option}" for option in DATA if getattr(args, option.replace("-", "_"))]
    if task == "classification":
        if given := " ".join(data) or "--mixed" * args.mixed:
            parser.error(f"{given}: of detection; give dataloader.*.dataset.root")
        if others := {"GN+mask", "LN2d"} & {*args.norms}:
            parser.error(f"--norms {' '.join(sorted(others))} is compared in detection alone")
    if data and (args.mixed or not {"--train-json", "--val-json"} <= {*data}):
        parser.error("--train-json needs --val-json, as the AP is compared, and excludes --mixed")
    if "SyncBN" in args.norms and args.num_gpus < 2:
        parser.error("SyncBN in one process is BN: give --num-gpus")
    if left := [n for n in args.images_per_pass if args.total_batch % (n * args.num_gpus)]:
        parser.error(
            f"--total-batch is {args.total_batch}, no multiple of {left[0]} (--images-per-pass) x "
            f"{args.num_gpus} (--num-gpus)"
        )
    if args.images < args.total_batch:
        parser.error(f"--images is {args.images}, less than --total-batch {args.total_batch}")
    return args


def run_directory(args, norm: str, per_pass: int, seed: int | str) -> Path:
    return args.output / f"{norm}-{per_pass}of{args.total_batch}-seed{seed}"


def command_of(args, norm: str, per_pass: int, seed: int) -> tuple[list[str], str]:
    """That of a run, and what its result depends on."""
    directory = run_directory(args, norm, per_pass, seed)
    command = list(map(str, args.task.command(args, norm, per_pass, seed, directory)))
    return [sys.executable, *command], shlex.join(command[1:-1])


def run(args, norm: str, per_pass: int, seed: int) -> None:
    """Train and evaluate one; write result.json into its directory."""
    directory = run_directory(args, norm, per_pass, seed)
    directory.mkdir(parents=True, exist_ok=True)
    command, settings = command_of(args, norm, per_pass, seed)
    stated = directory / "settings.txt"
    if stated.exists() and stated.read_text() != settings:
        sys.exit(f"error: {directory} holds a run with other settings; choose another --output")
    stated.write_text(settings)
    if (directory / "result.json").exists():
        return
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **streams, text=True, errors="replace")
    (directory / "output.txt").write_text(done.stdout)
    metrics = args.task.metrics
    if done.returncode == 0:
        curves = read_curves(directory / "metrics.json")
        if (first := next(iter(metrics.values()))) not in curves:
            sys.exit(
                f"error: {directory / 'metrics.json'} has no {first}: the run did not evaluate"
            )
        last = {name: curves.get(key, ([], [-1.0]))[1][-1] for name, key in metrics.items()}
        # A model without masks has no mask AP. Detectron2 has NaN where nothing was predicted, and
        # pycocotools -1 where nothing is asked.
        result = {n: value if value >= 0 else args.task.worst for n, value in last.items()}
    elif diverged := re.search(r"training diverged at iteration (\d+)", done.stdout):
        result = {**dict.fromkeys(metrics, args.task.worst), "diverged": int(diverged[1])}
    else:
        words = done.stdout[-2000:]
        sys.exit(f"error: a run failed; its last words, of {directory / 'output.txt'}:\n{words}")
    (directory / "result.json").write_text(json.dumps(result))
    said = f"{norm}, {per_pass} images per pass, seed {seed}: {cell([result], metrics)}"
    print(said, flush=True)


def report(args) -> None:
    """Print the table of all results of these settings, and draw the first metric."""
    table, figure, (drawn, *_) = [], Figure((6, 4)), args.task.metrics
    axes = figure.subplots()
    for norm in NORMS:
        row, points = [norm], []
        for per_pass in args.images_per_pass:
            results = []
            pattern = run_directory(args, norm, per_pass, "*").name
            for file in sorted(args.output.glob(f"{pattern}/result.json")):
                seed = int(file.parent.name.rpartition("seed")[2])
                settings = command_of(args, norm, per_pass, seed)[1]
                if file.with_name("settings.txt").read_text() == settings:
                    results.append(json.loads(file.read_text()))
                else:
                    print(f"{file.parent} is left out: it was run with other settings")
            row.append(cell(results, args.task.metrics))
            if values := [result[drawn] for result in results]:
                mean = statistics.mean(values)
                points.append((per_pass, mean, mean - min(values), max(values) - mean))
        if points:
            table.append(row)
            passes, means, *spread = zip(*points, strict=True)
            axes.errorbar(passes, means, spread, fmt="o-", capsize=3, label=norm)
    headers = [f"{' / '.join(args.task.metrics)}, at"]
    headers += [f"{n} per pass" for n in args.images_per_pass]
    print(tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True))
    steps, total = args.images // args.total_batch, args.total_batch
    axes.set(xlabel="images per forward pass", ylabel=drawn, xscale="log")
    axes.set_title(f"From scratch, {steps} optimizer steps on {total} images each")
    axes.set_xticks(args.images_per_pass, map(str, args.images_per_pass))
    axes.minorticks_off()
    axes.invert_xaxis()  # as in the GN paper's figure 1
    if table:
        axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "norms.png", dpi=150, bbox_inches="tight")
    print(f"Plot: {args.output / 'norms.png'}")


def cell(results: list[dict], metrics: dict[str, str]) -> str:
    """Mean of the seeds, with the lowest and the highest."""
    if not results:
        return ""
    columns = [[result[name] for result in results] for name in metrics]
    text = " / ".join(f"{statistics.mean(values):.1f}" for values in columns)
    if len(results) > 1:
        text += f" ({' / '.join(f'{min(values):.1f}-{max(values):.1f}' for values in columns)})"
    if diverged := [str(r["diverged"]) for r in results if "diverged" in r]:
        text += f", diverged at iteration {', '.join(diverged)}"
    return text


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.report:
        seeds = range(args.seeds)
        for seed, norm, per_pass in itertools.product(seeds, args.norms, args.images_per_pass):
            run(args, norm, per_pass, seed)
    report(args)


if __name__ == "__main__":
    main()
