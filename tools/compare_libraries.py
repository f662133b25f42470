#!/usr/bin/env python3
"""Train what people use instead on the same images for the same time, and compare the AP.

    python tools/compare_libraries.py --data datasets/shapes photos/ --output output/libraries

Each folder of --data has train.json, val.json, and images/ (or train/ and val/); a folder called
shapes is drawn where it is missing. Nobody has weights to start from, all have the same cores, and
--minutes of training: imports, conversion of the data, timing and evaluation do not count. All
predictions are scored here, by pycocotools. Peers: pip install -e '.[compare]'; one that is not
installed is left out. A run that has its result.json is not repeated, so the same command goes on
where it stopped. At the end, and with --report alone at any time: a table, and mask AP against
minutes in libraries.png.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import msgspec
import torch
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from gn_detect.benchmark.libraries import CONTESTANTS, USUAL, Job
from gn_detect.data.shapes import write_shapes


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="one after another")
    add("--output", type=Path, required=True, help="directory of the runs")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=USUAL, metavar="NAME")
    add("--minutes", nargs="+", type=float, default=[10], help="of training; each is a run")
    add("--seeds", nargs="+", type=int, default=[0], help="each is a run")
    add("--cores", type=int, default=2, help="of the CPU, for each contestant")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help=f"of PyTorch ({default})")
    add("--report", action="store_true", help="only the table and the plot")
    return parser.parse_args(argv)


def job_of(args, data: Path, contestant: str, minutes: float, seed: int) -> Job:
    images = [data / "images"] * 2
    if not images[0].is_dir():
        images = [data / "train", data / "val"]
    folder = args.output / data.name / f"{contestant}-{minutes:g}min-seed{seed}"
    package, options = CONTESTANTS[contestant]
    return Job(
        package=package,
        options=options,
        train_json=str((data / "train.json").resolve()),
        train_images=str(images[0].resolve()),
        val_json=str((data / "val.json").resolve()),
        val_images=str(images[1].resolve()),
        folder=str(folder.resolve()),
        seconds=60 * minutes,
        cores=args.cores,
        device=args.device,
        seed=seed,
    )


def run(job: Job) -> bool:
    """Train, predict and score one, in a process of its own; False where it fails."""
    folder = Path(job.folder)
    stated, settings = folder / "job.json", msgspec.json.encode(job)
    if stated.exists() and stated.read_bytes() != settings:
        sys.exit(f"error: {folder} holds a run with other settings; choose another --output")
    if (folder / "result.json").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    stated.write_bytes(settings)
    command = [sys.executable, "-m", "gn_detect.benchmark.libraries", str(stated)]
    env = os.environ | {"OMP_NUM_THREADS": str(job.cores)}
    with open(folder / "output.txt", "w") as output:
        code = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
    label = f"{folder.parent.name}, {folder.name}"
    if code:
        words = (folder / "output.txt").read_text(errors="replace")[-1000:]
        print(f"error: {label} failed; its last words, of {output.name}:\n{words}", flush=True)
        return False
    result = json.loads((folder / "run.json").read_text())
    result |= {"job": msgspec.to_builtins(job)} | score(
        job.val_json, str(folder / "predictions.json")
    )
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(f"{label}: {cell([result])}", flush=True)
    return True


def score(truth_json: str, results_json: str) -> dict[str, float]:
    """AP of boxes and masks, and at IoU 0.5, in percent, as COCO defines them."""
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(truth_json)
        truth.dataset.setdefault("info", {})
        for kind, task in (("box", "bbox"), ("mask", "segm")):
            stats = [0.0, 0.0]
            if Path(results_json).read_text() != "[]":  # which pycocotools does not take
                scorer = COCOeval(truth, truth.loadRes(results_json), task)
                scorer.evaluate()
                scorer.accumulate()
                scorer.summarize()
                stats = scorer.stats
            found |= {f"{kind} AP": 100 * stats[0], f"{kind} AP50": 100 * stats[1]}
    return {key: float(value) for key, value in found.items()}


def cell(results: list[dict]) -> str:
    """Mean of the seeds, with the lowest and the highest of the masks."""
    if not results:
        return ""
    box, mask = ([r[f"{kind} AP"] for r in results] for kind in ("box", "mask"))
    spread = f" ({min(mask):.1f}-{max(mask):.1f})" if len(mask) > 1 else ""
    took = statistics.mean(r["seconds"] for r in results) / 60
    text = f"{statistics.mean(box):.1f} / {statistics.mean(mask):.1f}{spread}"
    iterations = statistics.mean(r["iterations"] for r in results)
    return f"{text}, {iterations:.0f} iterations in {took:.1f} min"


def report(args) -> None:
    """Print the table of all results that are there, and draw the means."""
    figure = Figure((4 * len(args.data), 4))
    columns = figure.subplots(1, len(args.data), squeeze=False)[0]
    rows = []
    for data, axes in zip(args.data, columns, strict=True):
        for contestant in args.contestants:
            points = []
            for minutes in args.minutes:
                files = sorted(
                    (args.output / data.name).glob(f"{contestant}-{minutes:g}min-seed*/result.json")
                )
                results = [json.loads(file.read_text()) for file in files]
                rows.append([data.name, contestant, f"{minutes:g}", cell(results)])
                if results:
                    both = ([r["seconds"] / 60, r["mask AP"]] for r in results)
                    points.append([statistics.mean(values) for values in zip(*both, strict=True)])
            took, ap = zip(*points, strict=True) if points else ((), ())
            axes.plot(took, ap, "o-", label=contestant)
        axes.set(title=data.name, xlabel="minutes of training", ylabel="mask AP", ylim=(0, None))
    columns[-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left")
    headers = ["data", "from scratch", "minutes", "box / mask AP"]
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))
    path = args.output / "libraries.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"Plot: {path}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    failed = 0
    if not args.report:
        for data in args.data:
            if data.name == "shapes" and not data.exists():
                write_shapes(data)
            if not (data / "train.json").is_file():
                sys.exit(f"error: --data {data} has no train.json; name a folder that has")
        for name in dict.fromkeys(CONTESTANTS[c][0] for c in args.contestants):
            if not importlib.util.find_spec(name):
                print(f"{name} is left out: not installed (pip install -e '.[compare]')")
                args.contestants = [c for c in args.contestants if CONTESTANTS[c][0] != name]
        everything = itertools.product(args.data, args.minutes, args.seeds, args.contestants)
        for data, minutes, seed, contestant in everything:
            failed += not run(job_of(args, data, contestant, minutes, seed))
    report(args)
    if failed:
        sys.exit(f"error: {failed} of the runs failed")


if __name__ == "__main__":
    main()
