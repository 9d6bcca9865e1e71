# Each target does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
# All tests of a class run in one process, in the order that tests/conftest.py gives.
SCOPES := --dist loadscope --no-loadscope-reorder

.PHONY: quickstart test test-long lint clean

# The whole path on scikit-learn's digits, offline.
quickstart: $(INSTALLED)
	$(VENV)/bin/python tools/run.py --flagfile=tools/flagfiles/quickstart.cfg

test: lint
	$(VENV)/bin/python -m pytest -q -n auto $(SCOPES) -m "not long" tests

# What takes too long for every change: full sizes and whole cross products.
test-long: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto $(SCOPES) -m long tests

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy dfq_tf tools

$(INSTALLED): requirements.txt requirements-dev.txt
	@if command -v uv >/dev/null; then \
	  uv venv --python "$(PYTHON)" --allow-existing $(VENV) && \
	  uv pip install --python $(VENV)/bin/python -r requirements-dev.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt; \
	fi
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs/quickstart
