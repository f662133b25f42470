"""The names of weights, and the file that each of them stands for."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from urllib.parse import urlparse

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir

from .origin import Origin
from .safe_load import WeightsError

_DETECTRON = "https://dl.fbaipublicfiles.com/detectron"
# What Detectron has published with GN (its projects/GN/README.md); Detectron2's catalog has one.
_DETECTRON_GN = {
    "e2e_mask_rcnn_R-50-FPN_2x_gn": "48616381 _0416.13_23_38.bTlTI97Q",
    "e2e_mask_rcnn_R-101-FPN_2x_gn": "48616724 _0416.13_26_34.GLnri4GR",
    "e2e_mask_rcnn_R-50-FPN_3x_gn": "48734751 _0417.09_54_59.nwCTtPVk",
    "e2e_mask_rcnn_R-101-FPN_3x_gn": "48734779 _0417.09_55_23.HMtcR8wg",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of weights on this machine.

    Args:
        path: of the file.
        origin: of weights that are known by name, or None.
        matching_heuristics: the names in it lack their beginning (Detectron2's query of this name).
    """

    path: str
    origin: Origin | None = None
    matching_heuristics: bool = False


def locate(name: str) -> Source:
    """Find the file that ``name`` stands for, and download it where it is not here yet.

    Args:
        name: one of

            - a path;
            - ``https://...``, or anything else that Detectron2's PathManager knows, such as
              ``detectron2://Misc/mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e.pkl``;
            - ``timm://MODEL``, weights of timm on the Hugging Face Hub:
              ``timm://resnet50_gn.a1h_in1k``;
            - ``detectron://MODEL``, weights of Detectron: ``detectron://R-50-GN``, or a detector of
              its projects/GN by the name of its config, ``detectron://e2e_mask_rcnn_R-50-FPN_2x_gn``

            and, behind any of them, ``#sha256=`` and the digest that the file must have.

    Raises:
        WeightsError: there is no such file, it cannot be downloaded, or it has another digest.
    """
    address, digest = _split_digest(name)
    address, query, _ = address.partition("?matching_heuristics=True")
    origin = Origin.of_name(address)
    url = address
    if address.startswith("timm://"):
        url, origin = _timm(address.removeprefix("timm://"))
    elif address.startswith("detectron://"):
        url = _detectron(address.removeprefix("detectron://"))
        origin = origin or Origin.of_name(url)
    path = _download(url, name) if "://" in url else url
    if not os.path.isfile(path):
        raise WeightsError(f"{name}: there is no file {path}")
    if digest:
        _check_digest(path, digest)
    return Source(path, origin, bool(query))


def _split_digest(name: str) -> tuple[str, str]:
    address, found, digest = name.partition("#sha256=")
    if found and not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise WeightsError(f"{name}: #sha256= takes the 64 hexadecimal digits of the file's digest")
    return address, digest.lower()


def _check_digest(path: str, digest: str) -> None:
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha256.update(block)
    actual = sha256.hexdigest()
    if actual != digest:
        raise WeightsError(
            f"{path} has the SHA-256 {actual}, not {digest}: it is another file, or was damaged; "
            "delete it to have it downloaded again"
        )


def _timm(model: str) -> tuple[str, Origin]:
    try:
        import timm
    except ImportError:
        raise WeightsError(
            f"timm://{model}: timm knows where its weights are; pip install timm, or download "
            f"model.safetensors of https://huggingface.co/timm/{model} and name that file"
        ) from None
    available = timm.list_pretrained()
    if model not in available:
        similar = difflib.get_close_matches(model, available, n=5, cutoff=0.3)
        raise WeightsError(f"timm has no weights {model!r}; similar: {', '.join(similar)}")
    published = timm.get_pretrained_cfg(model)
    origin = Origin(
        input_format="RGB",
        pixel_mean=tuple(255 * value for value in published.mean),
        pixel_std=tuple(255 * value for value in published.std),
    )
    url = f"https://huggingface.co/{published.hf_hub_id}/resolve/main/model.safetensors"
    return url, origin


def _detectron(model: str) -> str:
    catalog = ModelCatalog.C2_IMAGENET_MODELS.items()
    urls = {name.split("/")[1]: f"{_DETECTRON}/{path}" for name, path in catalog}
    for name, run in _DETECTRON_GN.items():
        number, _, suffix = run.partition(" ")
        urls[name] = (
            f"{_DETECTRON}/GN/{number}/04_2018_gn_baselines/{name}{suffix}/output/train/"
            f"{ModelCatalog.C2_DATASET_COCO}/generalized_rcnn/model_final.pkl"
        )
    if model not in urls:
        raise WeightsError(f"detectron://{model} is unknown; known: {', '.join(urls)}")
    return urls[model]


def _download(url: str, name: str) -> str:
    """The path of ``url`` in the cache of Detectron2's PathManager, downloaded if need be."""
    try:
        return PathManager.get_local_path(url)
    except Exception as error:  # of urllib, of the catalogs, and of handlers that users register
        reason = str(error).strip().splitlines()
        wanted = f"{name} ({url})" if url != name else name
        raise WeightsError(
            f"{wanted} cannot be downloaded: {reason[0] if reason else type(error).__name__}. "
            f"Download it elsewhere, then name the file, or put it at {_cached(url)}"
        ) from None


def _cached(url: str) -> str:
    """Where iopath's HTTPURLHandler keeps ``url``."""
    if url.startswith("catalog://"):
        url = ModelCatalog.get(url.removeprefix("catalog://"))
    elif url.startswith("detectron2://"):
        url = "https://dl.fbaipublicfiles.com/" + url.replace("://", "/")
    path = urlparse(url).path.lstrip("/")
    return os.path.join(get_cache_dir(), os.path.dirname(path), url.split("/")[-1])
