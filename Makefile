# make help lists the targets. Each one installs what it needs; as root also the Debian packages.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
VENV := .venv
PYTHON := $(VENV)/bin/python
SYSTEM := requirements/install-system
RUNTIME_PACKAGES := wireguard-go wireguard-tools nftables iproute2 iputils-ping procps
PROTOCOL_PACKAGES := openvpn openssh-server openssh-client charon-systemd libstrongswan-standard-plugins xl2tpd ppp
DEMO_PACKAGES := openvpn openssh-server openssh-client curl
TEST_PACKAGES := $(RUNTIME_PACKAGES) $(PROTOCOL_PACKAGES) curl iperf3 sshpass systemd postgresql
BENCH_PACKAGES := $(TEST_PACKAGES) wrk prometheus-node-exporter strace
CHECKED := controller agent shared tests bench

.PHONY: help install up demo test check pytest test-kernel kernel-conformance kernel-others bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## the .venv and the missing system packages
	@$(SYSTEM) $(RUNTIME_PACKAGES)

$(VENV)/.installed: pyproject.toml requirements/dev.txt
	@python3 -m venv --help >/dev/null 2>&1 && python3 -c 'import ensurepip' 2>/dev/null || $(SYSTEM) python3-venv
	@test -x $(VENV)/bin/pip || python3 -m venv $(VENV)
	@echo "installing the Python packages into $(VENV)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

up: install ## controller and one node on this machine, in the foreground
	@$(VENV)/bin/skynetvpn up

demo: install ## the whole main job once, in network namespaces; the exit status tells
	@$(SYSTEM) $(DEMO_PACKAGES)
	@$(PYTHON) -m tests.demo

test: check pytest test-kernel ## everything that must hold

check: $(VENV)/.installed ## format, lint, types
	@$(VENV)/bin/ruff format --check --quiet $(CHECKED)
	@$(VENV)/bin/ruff check --quiet $(CHECKED)
	@$(VENV)/bin/mypy

pytest: install
	@$(SYSTEM) $(TEST_PACKAGES)
	@tests/systemd/setup $(RUNTIME_PACKAGES) $(PROTOCOL_PACKAGES)
	@SKYNETVPN_POSTGRESQL_TESTS=1 $(PYTHON) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not kernel"

test-kernel: install ## the tests that need WireGuard and L2TP in the kernel, in virtual machines
	@$(SYSTEM) $(TEST_PACKAGES)
	@tests/vm/setup
	@# Collected outside: this finds the files, and writes the byte code that a slow guest would compile anew each time.
	@env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m pytest --collect-only -q -m kernel >.cache/kernel-tests
	@$(MAKE) --jobs=2 --keep-going --output-sync=target kernel-conformance kernel-others

# One CPU each, and side by side: two CPUs of one guest cost twice the work. Each plugin more is seconds of imports there.
KERNEL_TEST_FILES = $(shell sed -n 's/::.*//p' .cache/kernel-tests | sort -u)
IN_GUEST := tests/vm/run -t 1800 -c 1 -- env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PYTHON) -m pytest -q -m kernel \
    -p pytest_asyncio.plugin -p pytest_timeout -o timeout=600

kernel-conformance:
	@$(IN_GUEST) $(filter tests/conformance/%,$(KERNEL_TEST_FILES))

kernel-others:
	@$(IN_GUEST) $(filter-out tests/conformance/%,$(KERNEL_TEST_FILES))

bench: install ## measures against the named peers; JSON in bench/results
	@$(SYSTEM) $(BENCH_PACKAGES)
	@$(PYTHON) -m bench

LOCK := $(VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url \
    --no-emit-find-links --python-version 3.11

lock: $(VENV)/.installed ## make the requirement files anew from pyproject.toml
	@$(VENV)/bin/pip install --quiet uv
	@$(LOCK) --extra controller --extra postgresql pyproject.toml -o requirements/controller.txt
	@$(LOCK) --extra agent pyproject.toml -o requirements/agent.txt
	@$(LOCK) --extra controller --extra postgresql --extra agent --extra dev pyproject.toml -o requirements/dev.txt
	@$(LOCK) bench/peers/requirements.in -o requirements/bench.txt

clean: ## forget everything that the targets made here
	@rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
