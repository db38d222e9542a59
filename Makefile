# make demo    train a small GPT on real text and see what it learned
# make test    lint, types, import contracts and all tests
# make check   the same without the tests marked `slow` or `browser`: after every edit, under 90 s
# make fix     let ruff mend what it can, and lay out the code
# make docs    the pages of docs/ and the API reference as a website, in site/
#
# Each installs what it needs into .venv once. An active virtual environment that has torch is
# used as it is, and its torch is never replaced.

ifneq ($(VIRTUAL_ENV),)
  ifeq ($(shell "$(VIRTUAL_ENV)/bin/python" -c "import torch" 2>/dev/null && echo yes),yes)
    VENV := $(VIRTUAL_ENV)
    PINNED := ^torch==
  endif
endif
VENV ?= .venv
PINNED ?= .
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= python3
# One stamp per environment and set of extras; it is older than pyproject.toml when that changes.
STAMP := $(VENV)/.glassgpt

.PHONY: demo test check lint fix docs clean

demo: $(STAMP)-demo
	$(PYTHON) -m glassgpt demo

test: lint
	$(PYTHON) -m pytest -n 2 --dist worksteal

check: lint
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "not slow and not browser"

lint: $(STAMP)-dev
	$(PYTHON) -m ruff check src tests benchmarks lessons
	$(PYTHON) -m ruff format --check src tests benchmarks lessons
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	$(VENV)/bin/lint-imports

fix: $(STAMP)-dev
	$(PYTHON) -m ruff check --fix src tests benchmarks lessons
	$(PYTHON) -m ruff format src tests benchmarks lessons

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

$(PYTHON):
	$(BASE_PYTHON) -m venv $(VENV)

$(STAMP)-demo: pyproject.toml constraints.txt | $(PYTHON)
	$(call install,-e ".[fast]")

$(STAMP)-dev: pyproject.toml constraints.txt | $(PYTHON)
	$(call install,-e ".[dev]")
	@touch $(STAMP)-demo

$(STAMP)-docs: pyproject.toml constraints.txt | $(PYTHON)
	$(call install,-e ".[docs]")

# The torch that is there already takes the place of the pinned one; an environment that is not ours
# is held to nothing else.
define install
	@here=$$($(PYTHON) -c "import importlib.metadata as m; print(m.version('torch').split('+')[0])" 2>/dev/null); \
	sed "s/^torch==.*/torch==$${here:-$$(sed -n 's/^torch==//p' constraints.txt)}/" constraints.txt \
		| grep "$(PINNED)" > $@.constraints
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c $@.constraints $(1)
	@touch $@
endef

clean:
	rm -rf .venv site
