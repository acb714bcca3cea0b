# Every target sets itself up: on a fresh Debian machine as root, `make demo` or `make test` is all there is to do.
SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: setup demo test check bench soak fmt lock clean

setup: .venv/installed .cache/servers

.venv/installed: requirements.lock deploy/triton/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv && $(PYTHON) -m venv --clear .venv; }
	@echo "installing Python packages (locked, with hashes)"
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes --no-deps -r deploy/triton/requirements.lock \
		|| echo "not installed: nvidia-pytriton; inference: give a Triton with --triton or triton.url"
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.cache/servers: deploy/hospital/install_debian.sh deploy/hospital/hapi/pom.xml .venv/installed
	@mkdir -p .cache
	@sh deploy/hospital/install_debian.sh
	@echo "building the simulator's EHR (HAPI FHIR), once"
	@$(BIN)/python -m deploy.hospital.ehr --build || echo "EHR: falls back to the in-memory FHIR server"
	@touch $@

.cache/test-packages: deploy/hospital/install_debian.sh .cache/servers
	@sh deploy/hospital/install_debian.sh tests
	@touch $@

# The authorization server of the tests, with the Node that it supports; npm takes what the lock file names and checks it.
.cache/oidc/installed: tests/oidc/package.json tests/oidc/package-lock.json .cache/test-packages
	@mkdir -p .cache/oidc
	@cp tests/oidc/package.json tests/oidc/package-lock.json .cache/oidc/
	@npm ci --prefix .cache/oidc --ignore-scripts --no-audit --no-fund --silent && touch $@ \
		|| echo "not installed: oidc-provider; the tests of the sign-in at an EHR fail"

demo: setup
	@$(BIN)/wetread demo $(ARGS)

test: setup .cache/test-packages .cache/oidc/installed
	@$(BIN)/pytest $(PYTEST_ARGS) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/wetread protocols validate

bench: setup .cache/test-packages
	@$(BIN)/python -m tests.bench $(ARGS)

soak: setup .cache/test-packages
	@WETREAD_SOAK=1 $(BIN)/pytest tests/crash tests/system/test_hospital_day.py -q $(ARGS)

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: .venv/installed
	$(BIN)/pip install -q pip-tools
	$(BIN)/pip-compile -q --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
		--no-header --strip-extras --allow-unsafe --extra dev --extra demo -o requirements.lock pyproject.toml

clean:
	rm -rf .venv .cache
