"""Whether all processes of a run were told the same, and still have the same weights."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gn_detect
from gn_detect.config import ConfigError
from gn_detect.distributed import process_name
from gn_detect.settings import Settings

from .errors import ProcessesError

_SHOWN = 8  # options that a message names
# Of the sum of the absolute values of a parameter. Kernels of different GPUs round differently.
_TOLERANCE = 1e-5


def check_same(cfg: CfgNode | DictConfig, typed: Iterable[str] = (), **arguments: Any) -> None:
    """Compare, over all processes, what each was told: the config, but for the output directory,
    which need not be shared; the command line; the versions of the software; and whether there is
    CUDA. All processes call it, before anything is derived from ``cfg``.

    Args:
        typed: the keys of ``cfg`` on the command line.
        arguments: of the command line, by their names with underscores.

    Raises:
        ConfigError: in all processes; names what differs, its values, and the processes.
    """
    if comm.get_world_size() == 1:
        return
    told = {f"--{name.replace('_', '-')}": repr(value) for name, value in arguments.items()}
    told.update(_options(cfg if isinstance(cfg, CfgNode) else OmegaConf.to_container(cfg)))
    told.pop(output_dir := Settings(cfg).keys["output_dir"])
    told["what is typed"] = ", ".join(sorted({*typed} - {output_dir})) or "nothing"
    for library in (gn_detect, detectron2, torch):
        told[f"the version of {library.__name__}"] = str(library.__version__)
    told["torch.cuda.is_available()"] = str(torch.cuda.is_available())
    hosts, everywhere = zip(*comm.all_gather((socket.gethostname(), told)), strict=True)
    keys = dict.fromkeys(key for theirs in everywhere for key in theirs)
    differ = [key for key in keys if len({theirs.get(key) for theirs in everywhere}) > 1]
    if not differ:
        return
    shown = []
    for key in differ[:_SHOWN]:
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everywhere):
            ranks.setdefault(theirs.get(key, "absent"), []).append(rank)
        shown.append(f"{key} is {', '.join(f'{v} on {_name(r, hosts)}' for v, r in ranks.items())}")
    if more := len(differ) - len(shown):
        shown.append(f"and {more} more")
    raise ConfigError(
        f"the processes were told different things: {'; '.join(shown)}; start the same command, "
        "with the same software, on each machine"
    )


def _options(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """What a config states, as text, by its keys (``A.B.C``, ``a.b[0].c``)."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _options(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, Sequence) and any(isinstance(item, Mapping) for item in node):
        for index, item in enumerate(node):
            yield from _options(item, f"{key}[{index}]")
    elif hasattr(node, "__qualname__"):  # what a lazy config calls
        yield key, f"{node.__module__}.{node.__qualname__}"
    else:
        yield key, re.sub(r" at 0x[0-9a-f]+", "", repr(node))


def check_weights_same(model: nn.Module, iteration: int) -> None:
    """Compare the sums of each parameter, and of its absolute values, over all processes, which
    all call it. Buffers may differ: the statistics of BN are of the images of a process.

    Args:
        model: with or without DistributedDataParallel.
        iteration: for the message.

    Raises:
        ProcessesError: in all processes; names the parameter that differs most, and the processes.
    """
    if comm.get_world_size() == 1:
        return
    if isinstance(model, DistributedDataParallel):
        model = model.module
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.no_grad():
        sums = [parameter.sum(dtype=torch.float64) for parameter in parameters]
        sizes = [torch.linalg.vector_norm(p, 1, dtype=torch.float64) for p in parameters]
        ours = torch.stack([*sums, *sizes]).cpu().reshape(2, -1)
    hosts, everywhere = zip(*comm.all_gather((socket.gethostname(), ours)), strict=True)
    sums = torch.stack(everywhere)  # (processes, 2, parameters)
    sums = sums.where(sums.isfinite().all(1, keepdim=True), torch.nan)
    # In parts of the absolute sums of the first process.
    parts = sums / sums[0, 1].nan_to_num(1).clamp(min=1e-300)
    apart = ~torch.isclose(parts, parts[0], rtol=0, atol=_TOLERANCE, equal_nan=True).all(1)
    if not apart.any():
        return
    differences = (parts - parts[0]).abs().amax(1).nan_to_num(torch.inf, torch.inf).where(apart, 0)
    rank, worst = divmod(int(differences.argmax()), len(names))
    values = [f"{everywhere[r][0, worst]:.7g} on {_name([r], hosts)}" for r in (0, rank)]
    ranks = apart.any(1).nonzero().flatten().tolist()
    raise ProcessesError(
        f"at iteration {iteration} the weights of {_name(ranks, hosts)} are not those of "
        f"{_name([0], hosts)}: {int(apart.any(0).sum())} of {len(names)} parameters differ, most "
        f"of all {names[worst]}, whose sum is {' and '.join(values)}. Either a parameter was "
        "changed outside of DistributedDataParallel, or a GPU computes wrongly; the last "
        "checkpoint before it is intact"
    )


def _name(ranks: list[int], hosts: Sequence[str]) -> str:
    """What processes are called in messages."""
    if len(ranks) == 1:
        return process_name(ranks[0], hosts[ranks[0]])
    names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"ranks {', '.join(map(str, ranks))} (host{'s' * (',' in names)} {names})"
