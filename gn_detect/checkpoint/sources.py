"""The names of weights, and the file that each of them stands for."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir

from .origin import Origin
from .public import PUBLIC
from .safe_load import WeightsError

_DETECTRON = "https://dl.fbaipublicfiles.com/detectron"
# What Detectron has published with GN (its projects/GN/README.md); Detectron2's catalog has one.
_DETECTRON_GN = {
    "e2e_mask_rcnn_R-50-FPN_2x_gn": "48616381 _0416.13_23_38.bTlTI97Q",
    "e2e_mask_rcnn_R-101-FPN_2x_gn": "48616724 _0416.13_26_34.GLnri4GR",
    "e2e_mask_rcnn_R-50-FPN_3x_gn": "48734751 _0417.09_54_59.nwCTtPVk",
    "e2e_mask_rcnn_R-101-FPN_3x_gn": "48734779 _0417.09_55_23.HMtcR8wg",
}
# timm's ResNets without parts that leave no trace in the names of weights, such as anti-aliasing.
_TIMM = r"(tv_)?(resnet\d+(_gn)?|resnext\d+_\d+x\d+d|wide_resnet\d+_2|resnetv2_\w+)\..+"


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
              its projects/GN by the name of its config, ``detectron://e2e_mask_rcnn_R-50-FPN_2x_gn``;
            - ``mmdetection://MODEL``, detectors of its configs/gn, gn+ws and scratch:
              ``mmdetection://mask_rcnn_r50_fpn_gn-all_2x_coco``;
            - ``tensorpack://MODEL``, weights of tensorpack: ``tensorpack://COCO-MaskRCNN-R50FPN2xGN``

            and, behind any of them, ``#sha256=`` and the digest that the file must have.

    Raises:
        WeightsError: there is no such file, it cannot be downloaded, or it has another digest.
    """
    address, heuristics, digest = split_name(name)
    origin = Origin.of_name(address)
    url = address
    if address.startswith("timm://"):
        url, published = _timm(address.removeprefix("timm://"))
        origin = published.completed_by(origin)
    elif address.startswith("detectron://"):
        url = _detectron(address.removeprefix("detectron://"))
        origin = origin or Origin.of_name(url)
    elif scheme := re.match("(mmdetection|tensorpack)://", address):
        if address not in PUBLIC:
            known = (name for name in PUBLIC if name.startswith(scheme[0]))
            raise WeightsError(f"{address} is unknown; known: {', '.join(known)}")
        url = PUBLIC[address].url
    path = _download(url, name) if "://" in url else url
    if not os.path.isfile(path):
        known = " (nor does Detectron2 know such an address)" if "://" in path else ""
        raise WeightsError(f"{name}: there is no file {path}{known}")
    if digest and digest != (actual := hashlib.sha256(Path(path).read_bytes()).hexdigest()):
        raise WeightsError(
            f"{path} has the SHA-256 {actual}, not {digest}: it is another file, or was damaged; "
            "delete it to have it downloaded again"
        )
    return Source(path, origin, heuristics)


def split_name(name: str) -> tuple[str, bool, str]:
    """Take a name of weights apart: path or URL, whether it has Detectron2's query
    ``?matching_heuristics=True``, and the SHA-256 behind it or "".

    Raises:
        WeightsError: that is none.
    """
    address, found, digest = name.partition("#sha256=")
    if found and not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise WeightsError(f"{name}: #sha256= takes the 64 hexadecimal digits of the file's digest")
    address, query, _ = address.partition("?matching_heuristics=True")
    return address, bool(query), digest.lower()


def cached(name: str) -> str:
    """The path of the file of public weights that was downloaded already; "" if it was not."""
    scheme, _, model = name.partition("://")
    path = _cached(_detectron(model) if scheme == "detectron" else PUBLIC[name].url or name)
    return path if os.path.isfile(path) else ""


def _timm(model: str) -> tuple[str, Origin]:
    try:
        import timm
    except ImportError:
        raise WeightsError(
            f"timm://{model}: timm knows where its weights are: pip install timm"
        ) from None
    available = [name for name in timm.list_pretrained() if re.fullmatch(_TIMM, name)]
    if model not in available:
        similar = [name for name in available if name.startswith(f"{model}.")]
        similar += difflib.get_close_matches(model, available, n=5, cutoff=0)
        raise WeightsError(
            f"timm has no weights {model!r} of a ResNet that Detectron2 has, too; similar: "
            f"{', '.join(dict.fromkeys(similar))}"
        )
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
        message = f"{wanted} cannot be downloaded: {reason[0] if reason else type(error).__name__}"
        if cached := _cached(url):
            # Named by its path, it would not be known for what it is.
            message += f". Download it elsewhere and put it at {cached}; the name stays the same"
        raise WeightsError(message) from None


def _cached(url: str) -> str:
    """Where iopath's HTTPURLHandler keeps ``url``; "" for what it does not know."""
    if url.startswith("catalog://"):
        try:
            url = ModelCatalog.get(url.removeprefix("catalog://"))
        except (KeyError, RuntimeError):
            return ""
    elif url.startswith("detectron2://"):
        url = "https://dl.fbaipublicfiles.com/" + url.replace("://", "/")
    if not url.startswith(("http://", "https://")):
        return ""
    path = urlparse(url).path.lstrip("/")
    return os.path.join(get_cache_dir(), os.path.dirname(path), url.split("/")[-1])
