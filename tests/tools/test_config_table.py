import ast
import json
import re
import runpy

import pytest
from detectron2.config import CfgNode, get_cfg
from helpers import ROOT

from gn_detect.config import add_gn_config

tool = runpy.run_path(str(ROOT / "tools/config_table.py"))
PUBLISHED = json.loads((ROOT / "configs/published.json").read_text())["configs"]


def test_pages_are_up_to_date_and_mended(tmp_path, monkeypatch):
    text = {name: (ROOT / "docs" / name).read_text() for name in ("configs.md", "keys.md")}
    configs = [p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml")]
    names = [p.as_posix() for p in configs if not p.name.startswith("Base-")]
    assert [name for name in names if f"](../{name})" not in text["configs.md"]] == []

    sizes = {}
    for name, size in re.findall(r"\]\(\.\./(.+?)\) \| ([\d.]+ \| \d+) \|", text["configs.md"]):
        millions, layers = size.split(" | ")
        sizes[ROOT / name] = float(millions), int(layers)
    for config in list(sizes)[::9]:  # a few: to build all takes seconds
        millions, layers = tool["model_size"](config)
        assert (round(millions, 1), layers) == sizes[config]
    module = tool["main"].__globals__
    monkeypatch.setitem(module, "model_size", sizes.get)
    monkeypatch.setitem(module, "DOCS", tmp_path)
    for name, old, new in (
        ("configs.md", "42.6 / 38.6", "44.6 / 38.6"),
        ("keys.md", "| `32`<br>", "| `16`<br>"),
    ):
        (tmp_path / name).write_text(text[name].replace(old, new))
        assert (tmp_path / name).read_text() != text[name]
    tool["main"]()
    for name in text:
        assert (tmp_path / name).read_text() == text[name], "run tools/config_table.py"
    (tmp_path / "keys.md").write_text("no marks")
    with pytest.raises(SystemExit, match="keys.md has no lines"):
        tool["main"]()


def leaves(cfg: CfgNode, path: str = "") -> dict:
    found = {}
    for name, value in cfg.items():
        key = f"{path}{name}"
        found |= leaves(value, f"{key}.") if isinstance(value, CfgNode) else {key: value}
    return found


def test_each_key_is_described_once_with_its_default():
    cfg = get_cfg()
    theirs = leaves(cfg)
    add_gn_config(cfg)
    expected = {key: value for key, value in leaves(cfg).items() if key not in theirs}
    rows = re.findall(
        r"^\| (`[A-Z].*?) \| (`.*?) \| (.+) \|$", (ROOT / "docs/keys.md").read_text(), re.MULTILINE
    )
    described = []
    for keys, defaults, meaning in rows:
        defaults = [ast.literal_eval(d.split("`")[1]) for d in defaults.split("<br>")]
        described += zip(keys.replace("`", "").split("<br>"), defaults, strict=True)
        assert len(meaning) > 20
    assert len(described) == len(expected) and dict(described) == expected


def test_readme_has_the_best_published_figures():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(configs/(\S+)\) \| (.+) \|$", readme, re.MULTILINE)
    best = sorted(
        (-row["box"], -row["mask"], name)
        for name, row in PUBLISHED.items()
        if name.startswith("COCO-InstanceSegmentation/") and "SyncBN" not in row.get("note", "")
    )[:5]
    assert rows == [
        (name.split("/")[1].removesuffix(".yaml"), name, f"{-box} / {-mask}")
        for box, mask, name in best
    ]
