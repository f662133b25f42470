"""What a run that is resumed must share with the checkpoint that it goes on from, and what not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import yaml

from gn_detect.config import ConfigError

from .convert import Weights
from .coverage import Coverage, num_classes

logger = logging.getLogger(__name__)


def check_resumed(
    weights: Weights, coverage: Coverage, path: str, names: Mapping[str, list[str]], config: str
) -> None:
    """Refuse to go on with another model, other classes or keypoints; log which options
    have changed.

    Args:
        weights: of the checkpoint ``path``.
        coverage: of the run's model by them.
        names: of the classes and the keypoints of the run's data (``outputs.KINDS``), in order;
            empty if not known.
        config: of the run, as YAML.

    Raises:
        ConfigError: says what the checkpoint has, what the run has, and the way out.
    """
    if differences := list(_differences(weights, coverage, names)):
        raise ConfigError(
            f"--resume: {path} is of another model than this run's: {'; '.join(differences)}. "
            f"To go on from its weights, start a new OUTPUT_DIR with MODEL.WEIGHTS {path} (in lazy "
            "configs train.output_dir and train.init_checkpoint)"
        )
    theirs = weights.rest.get("config")
    if theirs and config:
        old, new = _options(theirs), _options(config)
        changed = [
            f"{key} {new.get(key, 'absent')} (it was {old.get(key, 'absent')})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            logger.warning(f"--resume: the options of this run hold: {', '.join(changed)}")


def _differences(
    weights: Weights, coverage: Coverage, names: Mapping[str, list[str]]
) -> Iterator[str]:
    for kind, ours in names.items():
        theirs = weights.names(kind)
        if theirs and ours and theirs != ours:
            yield (
                f"it has {len(theirs)} {kind} ({', '.join(theirs)}), the data {len(ours)} "
                f"({', '.join(ours)})"
            )
    if not weights.names("classes"):
        counts, here = num_classes(weights.shapes), num_classes(coverage.shapes)
        if counts != here:
            yield f"it has {counts} classes, the data {here}"
    for name, shape in list(coverage.mismatched.items())[:3]:
        yield f"{name} is {list(shape)} in it, {list(coverage.shapes[name])} here"
    for names, what in ((coverage.missing, "it lacks"), (coverage.unexpected, "only it has")):
        if names:
            yield f"{what} {len(names)} of the parameters, such as {names[0]}"


def _options(config: str) -> dict[str, str]:
    """The values in a YAML, by their keys (A.B.C), as text: it may name Python's objects."""
    return dict(_leaves(yaml.compose(config, Loader=yaml.SafeLoader)))


def _leaves(node: yaml.Node, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _leaves(value, f"{key}.{name.value}" if key else name.value)
    elif isinstance(node, yaml.ScalarNode):
        yield key, node.value or ("''" if node.tag.endswith(":str") else node.tag)
    elif all(isinstance(value, yaml.ScalarNode) for value in node.value):
        yield key, f"[{', '.join(value.value for value in node.value)}]"
    else:
        for index, value in enumerate(node.value):
            yield from _leaves(value, f"{key}[{index}]")
