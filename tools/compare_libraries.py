#!/usr/bin/env python3
"""Train what people use instead on the same images for the same time, and compare the AP.

    python tools/compare_libraries.py --data datasets/shapes photos/ --output output/libraries

Each folder of --data has train.json, val.json, and images/ (or train/ and val/); a folder called
shapes is drawn where it is missing. Nobody has weights to start from, all have the same cores, and
--minutes of training: imports, conversion of the data, timing and evaluation do not count. All
predictions are scored here, by pycocotools. Peers: pip install -e '.[compare]'; one that is not
installed is left out. A run that has its result.json is not repeated, so the same command goes on
where it stopped; one that failed or was stopped begins anew. At the end, and with --report alone at
any time: a table, and mask AP against minutes in libraries.png.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TextIO

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
    path = {"type": lambda name: Path(name).resolve(), "required": True}  # "." has a name, too
    add("--data", nargs="+", metavar="DIR", help="one after another", **path)
    add("--output", help="directory of the runs", **path)
    add("--contestants", nargs="+", choices=CONTESTANTS, default=USUAL, metavar="NAME")
    add("--minutes", nargs="+", type=float, default=[10], help="of training; each is a run")
    add("--seeds", nargs="+", type=int, default=[0], help="each is a run")
    add("--cores", type=int, default=2, help="of the CPU, for each contestant")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help=f"of PyTorch ({default})")
    add("--report", action="store_true", help="only the table and the plot")
    return parser.parse_args(argv)


def job_of(args, data: Path, minutes: float, seed: int, contestant: str) -> Job:
    """Exits with a sentence where the data are not there, or the run is another one."""
    images = [data / "images"] * 2
    if not images[0].is_dir():
        images = [data / "train", data / "val"]
    for path in (data / "train.json", data / "val.json", *images):
        if not path.exists():
            sys.exit(f"error: --data {data} has no {path.name}; name a folder that has")
    folder = args.output / data.name / f"{contestant}-{minutes:g}min-seed{seed}"
    package, options = CONTESTANTS[contestant]
    job = Job(
        package=package,
        options=options,
        train_json=str(data / "train.json"),
        train_images=str(images[0]),
        val_json=str(data / "val.json"),
        val_images=str(images[1]),
        folder=str(folder),
        seconds=60 * minutes,
        cores=args.cores,
        device=args.device,
        seed=seed,
    )
    stated = folder / "job.json"
    if stated.exists() and stated.read_bytes() != msgspec.json.encode(job):
        sys.exit(f"error: {folder} holds a run with other settings; choose another --output")
    return job


def run(job: Job) -> bool:
    """Train, predict and score one, in a process of its own; False where it fails."""
    folder = Path(job.folder)
    if (folder / "result.json").exists():
        return True
    shutil.rmtree(folder, ignore_errors=True)  # what a run that was stopped has left
    folder.mkdir(parents=True)
    stated = folder / "job.json"
    stated.write_bytes(msgspec.json.encode(job))
    command = [sys.executable, "-m", "gn_detect.benchmark.libraries", str(stated)]
    label = f"{folder.parent.name}, {folder.name}"
    with open(folder / "output.txt", "w") as output:
        print(f"{label}: see {output.name}", flush=True)
        code = execute(command, os.environ | {"OMP_NUM_THREADS": str(job.cores)}, output)
    if code:
        words = (folder / "output.txt").read_text(errors="replace")[-1000:]
        how = "failed" if code > 0 else f"was killed (signal {-code}; 9 where memory ends)"
        print(f"error: {label} {how}; its last words, of {output.name}:\n{words}", flush=True)
        return False
    result = json.loads((folder / "run.json").read_text())
    result |= {"job": msgspec.to_builtins(job)} | score(
        job.val_json, str(folder / "predictions.json")
    )
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(f"{label}: {cell([result])}", flush=True)
    return True


def execute(command: list[str], env: dict[str, str], output: TextIO) -> int:
    """The exit status of a process. What it has started ends with it, and all of it with this one:
    it would take the cores of the next."""
    how = {"env": env, "stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(command, **how) as process:
        try:
            return process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


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


def cell(results: list[dict], missing: int = 0) -> str:
    """Mean of the seeds, with the lowest and the highest of the masks; ``missing`` runs were begun
    and have no result."""
    lost = f"{missing} of {len(results) + missing} runs without a result" if missing else ""
    if not results:
        return lost
    box, mask = ([r[f"{kind} AP"] for r in results] for kind in ("box", "mask"))
    spread = f" ({min(mask):.1f}-{max(mask):.1f} of {len(mask)})" if len(mask) > 1 else ""
    took = statistics.mean(r["seconds"] for r in results) / 60
    text = f"{statistics.mean(box):.1f} / {statistics.mean(mask):.1f}{spread}"
    iterations = statistics.mean(r["iterations"] for r in results)
    text = f"{text}, {iterations:.0f} iterations in {took:.1f} min"
    return f"{text}; {lost}" if lost else text


def report(args) -> None:
    """Print the table of all results that are there, and draw the means."""
    figure = Figure((4 * len(args.data), 4))
    columns = figure.subplots(1, len(args.data), squeeze=False)[0]
    rows = []
    for data, axes in zip(args.data, columns, strict=True):
        for contestant in args.contestants:
            points = []
            for minutes in args.minutes:
                pattern = f"{contestant}-{minutes:g}min-seed*"
                runs = sorted((args.output / data.name).glob(pattern))
                files = [run / "result.json" for run in runs]
                results = [json.loads(file.read_text()) for file in files if file.exists()]
                text = cell(results, len(runs) - len(results))
                rows.append([data.name, contestant, f"{minutes:g}", text])
                if results:
                    both = ([r["seconds"] / 60, r["mask AP"]] for r in results)
                    points.append([statistics.mean(values) for values in zip(*both, strict=True)])
            took, ap = zip(*points, strict=True) if points else ((), ())
            axes.plot(took, ap, "o-", label=contestant)
        axes.set(title=data.name, xlabel="minutes of training", xlim=(0, None))
        axes.set(ylabel="mask AP", ylim=(0, None))
    if not any(row[-1] for row in rows):
        sys.exit(f"error: {args.output} has no runs of these --data, --contestants and --minutes")
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
        for name in dict.fromkeys(CONTESTANTS[c][0] for c in args.contestants):
            if not importlib.util.find_spec(name):
                print(f"{name} is left out: not installed (pip install -e '.[compare]')")
                args.contestants = [c for c in args.contestants if CONTESTANTS[c][0] != name]
        everything = itertools.product(args.data, args.minutes, args.seeds, args.contestants)
        jobs = [job_of(args, *each) for each in everything]
        failed = sum(not run(job) for job in jobs)
    report(args)
    if failed:
        sys.exit(f"error: {failed} of the runs failed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    main()
