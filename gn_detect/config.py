"""The keys that gn_detect adds to a Detectron2 config, and the configs that it ships."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

_PACKAGE = Path(__file__).resolve().parent


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key, the value, and the fix."""


def add_gn_config(cfg: CfgNode) -> None:
    """Add the keys of gn_detect, with their defaults, to ``cfg`` in place.

    Keys that ``cfg`` has already (through the ``DETECTRON2_ENV_MODULE`` hook, or by an earlier
    call) keep their values.
    """
    gn = cfg.MODEL.setdefault("GN", CfgNode())
    # Groups of every GroupNorm layer (GN paper, table 3: 32 is best). Must divide the channels.
    gn.setdefault("NUM_GROUPS", 32)
    # Added to the variance of a group before the square root (GN paper, eq. 3).
    gn.setdefault("EPS", 1e-5)


def load_config(config_file: str = "", opts: list[str] | None = None) -> CfgNode:
    """Detectron2's defaults and our keys, then ``config_file``, then ``opts`` (KEY VALUE ...).

    ``MODEL.ROI_HEADS.NUM_CLASSES`` is None where neither states it: it then follows the data
    (``engine.prepare_run``). YAML that would execute code is refused.

    Raises:
        ConfigError: the file is missing or no YAML, or a key or the type of a value is wrong.
    """
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = None
    try:
        source = config_file
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        source = "the command line"
        cfg.merge_from_list(opts or [])
    except (AttributeError, TypeError):  # what yacs and fvcore raise where a mapping is expected
        raise ConfigError(f"{source}: not a mapping of config keys to values") from None
    except (AssertionError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ConfigError(f"{source}: {reason}") from None
    return cfg


def get_config_file(name: str) -> str:
    """Return the path of a config that ships with gn_detect.

    Args:
        name: path below ``configs/``, such as
            ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"``.

    Raises:
        FileNotFoundError: there is no such config; the message lists similar names.
    """
    # A wheel carries configs/ inside the package; a checkout has it beside the package.
    root = next(
        (p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()), None
    )
    if root is None:
        raise FileNotFoundError(f"gn_detect is installed without its configs/ ({_PACKAGE})")
    path = root / name
    if not path.is_file():
        available = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.yaml"))
        similar = difflib.get_close_matches(name, available, n=3, cutoff=0.3) or available
        raise FileNotFoundError(f"gn_detect has no config {name!r}; similar: {', '.join(similar)}")
    return str(path)
