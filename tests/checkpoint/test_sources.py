import functools
import hashlib
import http.server
import os
import sys
import threading
from pathlib import Path

import pytest
import timm
from iopath.common.file_io import HTTPURLHandler

from gn_detect.checkpoint import WeightsError, sources
from gn_detect.checkpoint.public import PUBLIC
from gn_detect.checkpoint.sources import locate

CONTENT = b"content of a file"
ADDRESSES = {weights.url for weights in PUBLIC.values()}
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Of Detectron2's downloads, empty at first."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for handler in sources.PathManager._path_handlers.values():
        if isinstance(handler, HTTPURLHandler):
            handler.cache_map.clear()
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path, cache):
    """A web server of this machine, with the names that it was asked for."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www/weights.pkl").write_bytes(CONTENT)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


@pytest.fixture
def put(cache):
    """Puts a file where a download would be cached."""

    def put(path):
        file = cache / path
        file.parent.mkdir(parents=True)
        file.write_bytes(CONTENT)
        return str(file)

    return put


def test_a_path(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(CONTENT)
    source = locate(str(path))
    assert (source.path, source.origin, source.matching_heuristics) == (str(path), None, False)
    assert locate(f"{path}?matching_heuristics=True").matching_heuristics
    with pytest.raises(WeightsError, match="there is no file .*absent.pth"):
        locate(str(tmp_path / "absent.pth"))


def test_the_digest_is_checked(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(CONTENT)
    assert locate(f"{path}#sha256={DIGEST.upper()}").path == str(path)
    with pytest.raises(WeightsError, match=f"{path} has the SHA-256 {DIGEST}, not 00"):
        locate(f"{path}#sha256={'0' * 64}")
    with pytest.raises(WeightsError, match="takes the 64 hexadecimal digits"):
        locate(f"{path}#sha256=abc")


def test_a_url_is_downloaded_once(server, cache):
    url, asked = server
    path = locate(f"{url}/weights.pkl#sha256={DIGEST}").path
    assert path == str(cache / "weights.pkl") == locate(f"{url}/weights.pkl").path
    assert asked == ["/weights.pkl"]
    assert Path(path).read_bytes() == CONTENT


def test_a_failed_download_says_what_to_do(server, cache):
    url, _ = server
    with pytest.raises(WeightsError) as error:
        locate(f"{url}/folder/absent.pth")
    message = str(error.value)
    assert f"{url}/folder/absent.pth cannot be downloaded: HTTP Error 404" in message
    assert f"Download it elsewhere and put it at {cache}/folder/absent.pth; the name" in message
    (cache / "folder").mkdir(exist_ok=True, parents=True)
    (cache / "folder/absent.pth").write_bytes(CONTENT)  # as it says
    assert locate(f"{url}/folder/absent.pth").path == str(cache / "folder/absent.pth")


@pytest.mark.parametrize(
    "name, path",
    [
        ("detectron://R-50-GN", "detectron/ImageNetPretrained/47261647/R-50-GN.pkl"),
        ("detectron://R-101-GN", "detectron/ImageNetPretrained/47592356/R-101-GN.pkl"),
        (
            "detectron://e2e_mask_rcnn_R-101-FPN_3x_gn",
            "detectron/GN/48734779/04_2018_gn_baselines/"
            "e2e_mask_rcnn_R-101-FPN_3x_gn_0417.09_55_23.HMtcR8wg/output/train/"
            "coco_2014_train%3Acoco_2014_valminusminival/generalized_rcnn/model_final.pkl",
        ),
        (
            "detectron2://Misc/mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e.pkl",
            "detectron2/Misc/mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e.pkl",
        ),
        (
            "catalog://ImageNetPretrained/FAIR/R-50-GN",
            "detectron/ImageNetPretrained/47261647/R-50-GN.pkl",
        ),
    ],
)
def test_names_of_detectron(name, path, put, monkeypatch):
    """A file that is in the cache is not downloaded; the error without it names that place."""
    file = put(path)
    source = locate(name)
    assert source.path == file
    assert source.origin.input_format == "BGR" and source.origin.stride_in_1x1 is False
    assert f"put it at {file}" in _error_without_network(name, file, monkeypatch)


def _error_without_network(name, cached, monkeypatch):
    os.remove(cached)

    def refuse(url, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("iopath.common.file_io.download", refuse)
    with pytest.raises(WeightsError, match="cannot be downloaded: no network") as error:
        locate(name)
    return str(error.value)


@pytest.mark.parametrize(
    "model", [name.removeprefix("tensorpack://") for name in PUBLIC if "tensorpack" in name]
)
def test_names_of_tensorpack(model, put, monkeypatch):
    file = put(f"FasterRCNN/{model}.npz")
    for name in (f"tensorpack://{model}", f"http://models.tensorpack.com/FasterRCNN/{model}.npz"):
        source = locate(name)
        assert source.path == file
        assert source.origin.pixel_std == pytest.approx((57.375, 57.12, 58.395))
        assert (source.origin.input_format, source.origin.num_groups) == ("BGR", 32)
    assert f"put it at {file}" in _error_without_network(f"tensorpack://{model}", file, monkeypatch)


@pytest.mark.parametrize(
    "file",
    [
        "gn/mask_rcnn_r101_fpn_gn-all_3x_coco/"
        "mask_rcnn_r101_fpn_gn-all_3x_coco_20200513_181609-0df864f4.pth",
        "gn%2Bws/faster_rcnn_r50_fpn_gn_ws-all_1x_coco/"
        "faster_rcnn_r50_fpn_gn_ws-all_1x_coco_20200130-613d9fe2.pth",
        "scratch/mask_rcnn_r50_fpn_gn-all_scratch_6x_coco/scratch_mask_rcnn_r50_fpn_gn_6x_"
        "bbox_mAP-0.412__segm_mAP-0.374_20200201_193051-1e190a40.pth",
    ],
)
def test_names_of_mmdetection(file, put):
    """As its README.md of configs/gn, gn+ws and scratch link them."""
    path = put(f"mmdetection/v2.0/{file}")
    assert locate(f"mmdetection://{file.split('/')[1]}").path == path
    assert f"https://download.openmmlab.com/mmdetection/v2.0/{file}" in ADDRESSES


def test_names_of_timm(put, monkeypatch):
    file = put("timm/resnet50_gn.a1h_in1k/resolve/main/model.safetensors")
    source = locate("timm://resnet50_gn.a1h_in1k")
    assert source.path == file
    assert source.origin.weight_standardization == "" and source.origin.num_groups == 32
    published = timm.create_model("resnet50_gn").pretrained_cfg
    assert source.origin.pixel_mean == pytest.approx([255 * v for v in published["mean"]])
    assert source.origin.pixel_std == pytest.approx([255 * v for v in published["std"]])
    message = _error_without_network("timm://resnet50_gn.a1h_in1k", file, monkeypatch)
    assert "https://huggingface.co/timm/resnet50_gn.a1h_in1k/resolve/main/" in message
    assert f"put it at {file}" in message


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm://resnet50_gm.a1h", "no weights 'resnet50_gm.a1h' .* similar: resnet50_g"),
        ("timm://resnet50_gn", "similar: resnet50_gn.a1h_in1k"),
        # Which no name in its file says.
        ("timm://resnetblur50.bt_in1k", "'resnetblur50.bt_in1k' of a ResNet that Detectron2 has"),
        ("catalog://foo/bar", "catalog://foo/bar cannot be .*: model not present"),
        ("foo://bar.pth", "nor does Detectron2 know such an address"),
        ("tensorpack://COCO-MaskRCNN-R50FPN2x", "R50FPN2x is unknown.*-R50FPN2xGN, tensorpack"),
        ("detectron://R-18", "detectron://R-18 is unknown.*R-50-GN"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(WeightsError, match=message):
        locate(name)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(WeightsError, match="pip install timm"):
        locate("timm://resnet50_gn.a1h_in1k")
