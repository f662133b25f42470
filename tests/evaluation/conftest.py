import copy
import json

import pytest
from detectron2.data import DatasetCatalog

from gn_detect.data.coco import register_coco_json
from gn_detect.evaluation import build_evaluator


@pytest.fixture
def evaluate(tmp_path, capsys):
    """``evaluate(content, found, **options)``: the results, and the lines of COCO's tables, of
    detections (one ``Instances`` for each image) on the content of a COCO JSON."""

    def run(content, found, **options):
        (tmp_path / "generated.json").write_text(json.dumps(content))
        register_coco_json("generated", str(tmp_path / "generated.json"), str(tmp_path))
        inputs = DatasetCatalog.get("generated")
        evaluator = build_evaluator("generated", str(tmp_path / "inference"), **options)
        evaluator.reset()
        for image, instances in zip(inputs, copy.deepcopy(found), strict=True):
            evaluator.process([image], [{"instances": instances}])
        capsys.readouterr()
        return evaluator.evaluate(), table(capsys.readouterr().out)

    return run


def table(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith(" Average")]
