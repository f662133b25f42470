import json

import pytest
from detectron2.data import DatasetCatalog
from evaluation.generated import scores_of

from gn_detect.data.coco import register_coco_json
from gn_detect.evaluation import build_evaluator


@pytest.fixture
def evaluate(tmp_path, capsys):
    """``evaluate(content, found, **options)``: the results, and the lines of COCO's tables, of
    detections (one ``Instances`` for each image) on the content of a COCO JSON."""

    def run(content, found, **options):
        (tmp_path / "generated.json").write_text(json.dumps(content))
        register_coco_json("generated", str(tmp_path / "generated.json"), str(tmp_path))
        images = DatasetCatalog.get("generated")
        evaluator = build_evaluator("generated", str(tmp_path / "inference"), **options)
        capsys.readouterr()
        results = scores_of(evaluator, images, [{"instances": f} for f in found])
        printed = capsys.readouterr().out.splitlines()
        return results, [line for line in printed if line.startswith(" Average")]

    return run
