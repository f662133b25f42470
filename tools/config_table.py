"""Write the table of configs into README.md; published figures come from configs/published.json.

python tools/config_table.py            # writes README.md
python tools/config_table.py --check    # exits with 1 if README.md is not up to date
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch import nn

from gn_detect.config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CONFIGS = ROOT / "configs"
BEGIN, END = "<!-- config table -->", "<!-- end of config table -->"
# What is published for the configs of a folder.
FIGURES = {
    "COCO-Detection": ("box",),
    "COCO-InstanceSegmentation": ("box", "mask"),
    "COCO-Keypoints": ("keypoint",),
    "COCO-PanopticSegmentation": ("PQ",),
    "GN-paper": ("box", "mask"),
    "quickstart": ("box", "mask"),
}


def numerically(path: Path) -> list:
    """Sorts 4x before 16x."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


@functools.cache
def model_size(config: Path) -> tuple[float, int]:
    """(millions of parameters, GroupNorm layers); 80 classes where none are stated."""
    cfg = load_config(str(config), ["MODEL.DEVICE", "meta"])
    for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        if head.NUM_CLASSES is None:
            head.NUM_CLASSES = 80
    with torch.device("meta"):
        model = build_model(cfg)
    layers = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    return sum(p.numel() for p in model.parameters()) / 1e6, layers


def table() -> str:
    published = json.loads((CONFIGS / "published.json").read_text())
    lines = []
    for folder, figures in FIGURES.items():
        unit = " / ".join(figures) + ("" if figures == ("PQ",) else " AP")
        lines += [
            f"**{folder}**\n",
            f"| config | M params | GN layers | {unit} | published by |",
            "|---|---|---|---|---|",
        ]
        configs = (p for p in (CONFIGS / folder).glob("*.yaml") if not p.name.startswith("Base-"))
        for config in sorted(configs, key=numerically):
            millions, layers = model_size(config)
            row = published["configs"].get(config.relative_to(CONFIGS).as_posix(), {})
            values = " / ".join(str(row[f]) for f in figures if f in row) or "-"
            notes = ": ".join(row[k] for k in ("source", "note") if k in row)
            link = f"[{config.stem}]({config.relative_to(ROOT).as_posix()})"
            lines.append(f"| {link} | {millions:.1f} | {layers} | {values} | {notes} |")
        lines.append("")
    lines += [f"- {key}: [{s['title']}]({s['url']})" for key, s in published["sources"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{README} has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if check:
        if new != text:
            print("README.md is not up to date: run tools/config_table.py", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
