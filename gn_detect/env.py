"""``DETECTRON2_ENV_MODULE=gn_detect.env``: stock Detectron2 scripts understand our YAML.

Detectron2 runs :func:`setup_environment` at the end of its own environment set-up, inside
``import detectron2`` (detectron2/utils/env.py), so nothing here may need a complete ``detectron2``.
"""


def setup_environment() -> None:
    """Add our keys to Detectron2's default config, and register our components."""
    from detectron2.config.defaults import _C

    from .config import add_gn_config

    add_gn_config(_C)
