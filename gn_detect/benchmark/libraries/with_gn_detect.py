"""gn_detect itself, by the command that its users type."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gn_detect

from . import Job, Trained

TOOL = Path(gn_detect.__file__).parents[1] / "tools/train_net.py"


def train(job: Job) -> Trained:
    def fit(iterations: int, folder: str) -> str:
        data = ["--train-json", job.train_json, "--train-images", job.train_images]
        opts = ["SOLVER.MAX_ITER", iterations, "SEED", job.seed, "MODEL.DEVICE", job.device]
        opts += ["DATALOADER.NUM_WORKERS", job.cores, "TEST.EVAL_PERIOD", 0, "TEST.REPORT", False]
        config = ["--config-file", gn_detect.get_config_file(job.options["config"])]
        config += ["--recipe", job.options["recipe"]]
        command = [sys.executable, TOOL, *config, *data, *opts, "OUTPUT_DIR", folder]
        subprocess.run(list(map(str, command)), check=True)
        return Path(folder, "log.txt").read_text()

    iterations = 20
    # As boxes are found, more of them are learned from, and a step takes longer: the second trial
    # is a whole schedule, a tenth of the run.
    for seconds in (job.seconds / 10, job.seconds):
        with tempfile.TemporaryDirectory() as folder:
            log = fit(iterations, folder)
        each = float(re.search(r"Overall training speed: .*\((\S+) s / it\)", log)[1])
        iterations = max(5, int(seconds / each))
    folder = os.path.join(job.folder, "train")
    log = fit(iterations, folder)
    hours, minutes, seconds = re.search(r"Total training time: (\d+):(\d+):(\d+)", log).groups()
    predictor = gn_detect.Predictor(f"{folder}/model_final.pth", device=job.device)
    took = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    images = predictor.cfg.SOLVER.IMS_PER_BATCH
    return Trained(predictor, job.category_ids(), iterations, images, took)
