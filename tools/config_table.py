"""Write the tables of docs/configs.md and docs/keys.md.

The first is of configs/, with published figures from configs/published.json; the second is of the
keys of gn_detect/config.py, with their comments there. A test fails where one is not up to date.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch import nn

from gn_detect.config import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCS, CONFIGS = ROOT / "docs", ROOT / "configs"
BEGIN, END = "<!-- written by tools/config_table.py -->", "<!-- end of what it wrote -->"
# What is published for the configs of a folder.
FIGURES = {
    "COCO-Detection": ("box",),
    "COCO-InstanceSegmentation": ("box", "mask"),
    "COCO-Keypoints": ("keypoint",),
    "COCO-PanopticSegmentation": ("PQ",),
    "Detectron": ("box", "mask"),
    "GN-paper": ("box", "mask"),
    "tensorpack": ("box", "mask"),
    "quickstart": ("box", "mask"),
    "finetune": ("box", "mask"),
}


def numerically(path: Path) -> list:
    """Sorts 4x before 16x."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def model_size(config: Path) -> tuple[float, int]:
    """(millions of parameters, GroupNorm layers), of a model for COCO where no number of classes or
    keypoints is stated."""
    cfg = load_config(str(config), ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""])
    for head in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        if head.NUM_CLASSES is None:
            head.NUM_CLASSES = 1 if cfg.MODEL.KEYPOINT_ON else 80
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with torch.device("meta"):
        model = build_model(cfg)
    layers = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    return sum(p.numel() for p in model.parameters()) / 1e6, layers


def config_table() -> str:
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
            name = config.relative_to(CONFIGS).as_posix()
            millions, layers = model_size(config)
            row = published["configs"].get(name, {})
            values = " / ".join(str(row[f]) for f in figures if f in row) or "-"
            notes = ": ".join(row[k] for k in ("source", "note") if k in row)
            link = f"[{config.stem}](../configs/{name})"
            lines.append(f"| {link} | {millions:.1f} | {layers} | {values} | {notes} |")
        lines.append("")
    lines += [f"- {key}: [{s['title']}]({s['url']})" for key, s in published["sources"].items()]
    return "\n".join(lines)


def key_table() -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for keys, comment in documented_keys((ROOT / "gn_detect/config.py").read_text()):
        names, defaults = ("<br>".join(column) for column in zip(*keys, strict=True))
        comment = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", comment)
        lines.append(f"| {names} | {defaults} | {comment} |")
    return "\n".join(lines)


def documented_keys(source: str) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """For each comment of ``add_gn_config``: the keys below it and their defaults, and its text.

    ``source`` is the module. Every key is set by ``setdefault``, and the nodes that hold keys have
    names or are attributes of ``cfg``; what stands behind a key on its line belongs to it alone.
    """
    lines = source.splitlines()
    (function,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "add_gn_config")
    nodes, keys, comment = {"cfg": []}, [], ""

    def path(expression: ast.expr) -> list[str]:
        match expression:
            case ast.Name(name):
                return nodes[name]
            case ast.Attribute(node, name) | ast.Call(ast.Attribute(node), [ast.Constant(name), _]):
                return [*path(node), name]

    for before, statement in zip(function.body, function.body[1:], strict=False):
        text = [line.strip() for line in lines[before.end_lineno : statement.lineno - 1]]
        if new := " ".join(line.removeprefix("# ") for line in text if line):
            if keys:
                yield keys, comment
            keys, comment = [], new
        match statement:
            case ast.Assign([ast.Name(name)], call):
                nodes[name] = path(call)
            case ast.Expr(ast.Call(_, [_, default]) as call):
                behind = lines[statement.end_lineno - 1].partition("  # ")[2]
                default = f"`{ast.unparse(default)}` {behind}".rstrip()
                keys.append((f"`{'.'.join(path(call))}`", default))
    yield keys, comment


def main() -> None:
    for page, table in ((DOCS / "configs.md", config_table()), (DOCS / "keys.md", key_table())):
        before, begin, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            sys.exit(f"error: {page} has no lines {BEGIN} and {END}")
        page.write_text(f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    main()
