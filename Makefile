# Everything runs in .venv; the first target that needs it installs it.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

DEMO_MODEL := outputs/demo/model.safetensors

.PHONY: train demo test test-fast test-browser screenshot lint format clean

train: $(INSTALLED)
	$(VENV)/bin/accelerate launch --config_file accelerate_config.yaml train.py

demo: $(INSTALLED) $(DEMO_MODEL) examples
	$(VENV)/bin/python app.py

# One test process per core, each with one torch thread; tests/conftest.py sets the order of the tests.
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-browser: $(INSTALLED)
	$(VENV)/bin/python -m pytest tests/test_app.py

screenshot: $(INSTALLED) $(DEMO_MODEL) examples
	EMOSHARE_SCREENSHOTS=docs $(VENV)/bin/python -m pytest tests/test_app.py -k screenshot

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(DEMO_MODEL): | $(INSTALLED)
	$(MAKE) train

examples: | $(INSTALLED)
	$(VENV)/bin/python -m emoshare.dataset_script.examples $@

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
