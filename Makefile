# Everything is set up by the targets themselves; a user's machine has Python 3.11+ and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := .tools/bin/opa .tools/bin/grpcurl

.DEFAULT_GOAL := help
.PHONY: help run test check gen bench prove clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The lock names everything, so nothing is resolved: a resolver that meets `coverage[toml]` looks past the pin of `coverage`.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "BudgetGuard needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "installing the locked dependencies into $(VENV) (about a minute, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Real OPA and grpcurl, compiled once per user by the locked Go and then linked into the checkout.
.tools/bin/%: scripts/install_tools.py | $(INSTALLED)
	@$(BIN)/python scripts/install_tools.py $*

run: $(INSTALLED) ## start the whole product on this machine
	@$(BIN)/budgetguard up

test: $(INSTALLED) $(TOOLS) ## run every test against real Envoy, Redis, Postgres and OPA
	@$(BIN)/python -m pytest

check: $(INSTALLED) $(TOOLS) ## style, types, contracts between packages, protos, policies, edge configuration, all of core covered
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/protos.py --check
	.tools/bin/opa fmt --diff --fail policies
	.tools/bin/opa check --strict policies
	.tools/bin/opa test policies
	$(BIN)/budgetguard edge validate
	$(BIN)/python -m pytest tests/core --disable-socket --cov=budgetguard.core --cov-branch --cov-fail-under=100 --cov-report=term-missing:skip-covered

gen: $(INSTALLED) ## regenerate code from proto/
	@$(BIN)/python scripts/protos.py

bench: $(INSTALLED) .tools/bin/bombardier ## measure the full path against the unfiltered edge, and the decision inside Redis
	@$(BIN)/python bench/run.py
	@$(BIN)/python -m bench.redis_cost

prove: $(INSTALLED) ## run every kind of budget at its last cent, and again with each part killed (minutes)
	@$(BIN)/python -m bench.prove

clean: ## remove what the other targets made (not your data in .budgetguard)
	rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
