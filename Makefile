# Each target does all of its own set-up in .venv, and what the clients need in another.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
CLIENTS := .venv-clients
# All tests of a class run in one process, in the order that tests/conftest.py gives.
SCOPES := --dist loadscope --no-loadscope-reorder
UV := uv==0.13.9

# Python keeps what it compiles, also where the environment says that it shall not: each
# process that imports TensorFlow would spend 13 seconds on that.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test test-long clients lint compiled clean

# The whole path on scikit-learn's digits, offline.
quickstart: $(INSTALLED)
	$(VENV)/bin/python tools/run.py --flagfile=tools/flagfiles/quickstart.cfg

# The linters need one core; the other compiles what is installed, if it is new, once for
# all processes of the tests.
test: $(INSTALLED)
	$(MAKE) --jobs=2 lint compiled
	$(VENV)/bin/python -m pytest -q -n auto $(SCOPES) -m "not long" tests

# What takes too long for every change: full sizes and whole cross products.
test-long: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n auto $(SCOPES) -m long tests

# Files of four networks, one the quickstart's, in the clients that apps are made of.
# Not for every change: the clients are 730 MB, whose installation takes minutes.
clients: $(INSTALLED) $(CLIENTS)/.installed runs/quickstart/df_qat_kd.tflite
	$(VENV)/bin/python clients/make_files.py runs/quickstart runs/clients
	$(CLIENTS)/bin/python clients/check.py runs/clients

runs/quickstart/df_qat_kd.tflite:
	$(MAKE) quickstart

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy dfq_tf dfq_tf_command tools clients/make_files.py clients/check.py

compiled: $(VENV)/.compiled

$(VENV)/.compiled: $(INSTALLED)
	-$(VENV)/bin/python -m pytest -q --collect-only tests >/dev/null
	@touch $@

$(INSTALLED): requirements.txt requirements-dev.txt
	$(call install,$(VENV),requirements-dev.txt)

$(CLIENTS)/.installed: requirements-clients.txt
	$(call install,$(CLIENTS),requirements-clients.txt)

# $(1): the environment, $(2): what is installed there. uv takes a quarter of pip's time, and
# pip may know of mirrors that uv does not. What is used is compiled when it is first
# imported; all of it would take half a minute.
# What an installation that failed has left may be of another Python, which venv would keep:
# .begun says that it is of this file, and may go.
define install
	@if command -v uv >/dev/null; then \
	  uv venv --python "$(PYTHON)" --allow-existing $(1) && \
	  uv pip install --python $(1)/bin/python -r $(2); \
	else \
	  $(PYTHON) -m venv $(if $(wildcard $(1)/.begun),--clear) $(1) && \
	  touch $(1)/.begun && \
	  $(1)/bin/python -m pip install --quiet $(UV) && \
	  $(1)/bin/uv pip install --quiet --python $(1)/bin/python -r $(2) || \
	  $(1)/bin/python -m pip install --quiet --no-compile -r $(2); \
	fi
	@rm -f $(1)/.begun
	@touch $(1)/.installed
endef

clean:
	rm -rf $(VENV) $(CLIENTS) runs/quickstart runs/clients
