VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.gn_detect-installed
DEMO := output/quickstart

.PHONY: venv test test-quick demo lint

venv: $(STAMP)

# Exit status 0: a detectron2 other than tools/detectron2_alias is importable.
HAS_REAL_DETECTRON2 := import importlib.metadata as m, importlib.util as u, sys; \
	version = next((d.version for d in m.distributions(name="detectron2")), ""); \
	sys.exit("+labgym" in version or u.find_spec("detectron2") is None)

# A real detectron2 is used as it is, and no constraints move the torch that it was compiled against.
# LabGym carries the copy of Detectron2; its own requirements (a GUI, TensorFlow) are not wanted,
# and it comes last because pip would list them as conflicts.
$(STAMP): constraints.txt setup.py pyproject.toml \
		$(wildcard tools/detectron2_alias/*.toml tools/detectron2_alias/*/*.py)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large: minutes the first time)"
	@set -e; \
	if $(BIN)/python -c '$(HAS_REAL_DETECTRON2)'; then \
		echo "Using the detectron2 already in $(VENV), with the torch beside it"; \
		$(PIP) -e '.[fast-eval,export,test,dev]'; \
	else \
		$(PIP) -c constraints.txt ./tools/detectron2_alias -e '.[fast-eval,export,test,dev]'; \
		$(PIP) --no-deps --ignore-requires-python LabGym==3.1.2; \
	fi
	@touch $@

# One process for each core, with one thread.
test: export OMP_NUM_THREADS := 1
test: venv
	$(BIN)/python -m pytest -q -n auto --dist worksteal tests $(PYTEST_ARGS)

# What the inner loop needs: no process, no training, no compiler.
test-quick: override PYTEST_ARGS += -m "not slow"
test-quick: test

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The data is drawn from datasets/, wherever COCO lies; metrics.json is appended to, so an old run goes.
demo: export DETECTRON2_DATASETS := datasets
demo: venv
	rm -rf $(DEMO)
	$(BIN)/python tools/train_net.py \
		--config-file configs/quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml OUTPUT_DIR $(DEMO)
	@$(BIN)/python -c 'import json; \
		rows = [json.loads(line) for line in open("$(DEMO)/metrics.json")]; \
		last = [row for row in rows if "bbox/AP" in row][-1]; \
		print("box AP {bbox/AP:.1f}, mask AP {segm/AP:.1f}".format(**last))'
	@echo "Pictures, curves and errors, for a browser: $(DEMO)/report.html"
