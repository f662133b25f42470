#!/usr/bin/env python3
"""List the public weights with GN, or say what a file of weights is and which config takes it.

    python tools/list_weights.py mmdetection ws
    python tools/list_weights.py --check mask_rcnn.pth

The list has what MODEL.WEIGHTS takes, what is published for it (box / mask AP on COCO, or top-1
accuracy on ImageNet), its size in MB as float32, the config that fits, below configs/, with the
changes that it needs, and whether it was downloaded already.
"""

import argparse
import itertools
import shlex

from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from gn_detect.checkpoint import read_weights
from gn_detect.checkpoint.public import PUBLIC
from gn_detect.checkpoint.sources import cached
from gn_detect.engine import errors_as_sentences
from gn_detect.engine.identify import describe, fitting_configs


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="list those that have all of them in their line")
    parser.add_argument("--check", metavar="FILE", help="path, URL or name of weights")
    args = parser.parse_args()
    if args.check and args.words:
        parser.error("--check takes one FILE, and no words")
    return args


def command(config: str, changes: tuple) -> str:
    """As it is typed behind --config-file."""
    values = (v if isinstance(v, str) else str(v).replace(" ", "") for v in changes)
    return " ".join([config, *map(shlex.quote, values)])


def list_weights(words: list[str]) -> None:
    headers = ["weights", "published", "MB", "config", "here"]
    count = 0
    for (page, licence), rows in itertools.groupby(
        PUBLIC.values(), lambda row: (row.page, row.licence)
    ):
        table = [
            [
                *(row.name, row.published, f"{4 * row.parameters:.0f}"),
                *(command(row.config, row.changes), "yes" if cached(row.name) else ""),
            ]
            for row in rows
        ]
        about = f"{page} ({licence})"
        table = [row for row in table if all(word in " ".join([*row, about]) for word in words)]
        if table:
            print(f"{about}\n{tabulate(table, headers, disable_numparse=True)}\n")
        count += len(table)
    print(f"{count} of {len(PUBLIC)} public weights with GN")


def check(name: str) -> None:
    weights = read_weights(name)
    facts = describe(weights)
    if isinstance(weights.rest.get("config"), str):
        runs = ": tools/predict.py runs it" * (facts["what"] != "no detector")
        facts["config"] = f"in the file{runs}"
    else:
        configs, reason = fitting_configs(weights, name)
        facts["config"] = "\n".join(itertools.starmap(command, configs)) or f"none: {reason}"
    print(tabulate(facts.items(), tablefmt="plain"))


if __name__ == "__main__":
    args = parse_args()
    setup_logger(name="gn_detect")
    with errors_as_sentences():
        check(args.check) if args.check else list_weights(args.words)
