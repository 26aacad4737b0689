# Sets up .venv on a machine that has only python3 and make, and runs everything in it.
#
#   make demo PYTHON=python3.12          another Python for the environment
#   make test PYTEST_ARGS="-k capture"   part of the tests
#   make detection DETECTION_ARGS="--only 'wine-*'"   part of the grid (--help tells more)

PYTHON ?= python3
PYTEST_ARGS ?=
DETECTION_ARGS ?=

VENV := .venv
BENCH := .venv-bench
FLOOR := .venv-floor
ALONE := .venv-wheel
PY := $(VENV)/bin/python
# Installed packages that satisfy the constraints are kept: torch is never replaced by a newer one.
INSTALL := $(PY) -m pip --quiet --quiet --disable-pip-version-check --no-input install \
	--no-warn-conflicts --constraint constraints.txt
BENCH_INSTALL = $(subst $(PY),$(BENCH)/bin/python,$(INSTALL))
FLOOR_INSTALL = $(subst $(PY),$(FLOOR)/bin/python,$(INSTALL))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo clean-and-retrain test test-quick test-floor test-browser screenshots size lint lint-page bench cost detection queries lds lds-this-run solvers unlearning fairness robustness compatibility memory scale recording package clean

help:
	@echo 'make demo    find the flipped labels in 5,000 real digits while a small network trains'
	@echo 'make clean-and-retrain   act on the audit and train again, against an oracle that knows the flips'
	@echo 'make test    run the test suite'
	@echo 'make test-quick   a minute of it: the rooms, the public door, the callback on small nets, how to add things'
	@echo 'make test-floor   the callback with the oldest releases that pyproject.toml allows, under both names of Lightning'
	@echo 'make test-browser   the page and TensorBoard in a real browser (Chromium of the system); screenshots/ has what they showed'
	@echo 'make screenshots   the pictures of the page in the README, from the demo (5 minutes)'
	@echo 'make size    lines of code by room'
	@echo 'make lint    ruff check, ruff format --check, mypy'
	@echo 'make lint-page   eslint, prettier and tsc on the page (needs npm)'
	@echo 'make bench   side by side with kronfluence and captum: time, memory, agreement (half an hour)'
	@echo 'make cost    measure what an audit costs, in passes of plain training'
	@echo 'make detection   a grid of noisy data: wrong labels found and put right, beside cleanlab (an hour; resumes)'
	@echo 'make queries   whether lists of queries can be read when labels are wrong'
	@echo 'make lds     how well scores predict retraining, beside kronfluence, dattri and TRAK (hours; resumes)'
	@echo 'make lds-this-run   how well a replay predicts what leaving examples out of this very run does (an hour or more; resumes)'
	@echo 'make solvers how many steps preconditioners save'
	@echo 'make unlearning   removal and label repair by one Newton step, against retraining'
	@echo 'make fairness    whether removing what a fairness gap names makes it smaller (arrests)'
	@echo 'make robustness  the same for the adversarial loss (MNIST-5k)'
	@echo 'make compatibility   which workflows an audit goes through in, with the newest and the oldest releases (10 minutes)'
	@echo 'make memory   what an audit takes of memory beside plain training, by example'
	@echo 'make scale    how many bytes the factors and queries of large models take'
	@echo 'make recording   what noting every step for a replay costs'
	@echo 'make package   build wheel and sdist, check them, and install the wheel alone beside torch'
	@echo 'make clean   remove the environment, caches and builds (not the logs of runs)'
	@echo
	@echo 'The first use makes .venv and installs what constraints.txt names. PYTHON=... picks the Python.'

demo: $(VENV)/.demo
	@$(PY) examples/01_mislabelled_digits.py

clean-and-retrain: $(VENV)/.demo
	@$(PY) examples/03_clean_and_retrain.py

# A process for each core: with a thread each, they do not get into each other's way.
test: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal --ignore-glob='*_browser.py' $(PYTEST_ARGS)

# What breaks most when something breaks: rooms and sizes, the door, whole audits, exactness of curvature and passes.
QUICK := $(addprefix tests/test_,imports.py core.py docs.py influence.py columns.py visitors.py saved.py \
	adding_a_layer.py how_to_add_curvature.py task.py sweep.py query_pairs.py callback_untouched.py)

test-quick: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal $(QUICK) $(PYTEST_ARGS)

# The callback under its package's two names, in an environment of the oldest releases.
FLOOR_TESTS := $(addprefix tests/test_,imports.py lightning.py callback_audit.py callback_errors.py \
	callback_untouched.py callback_resume.py nothing_lost.py)
FLOOR_PYTEST = OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest --numprocesses auto --dist worksteal

test-floor: $(FLOOR)/.floor
	@$(FLOOR_PYTEST) $(FLOOR_TESTS) $(PYTEST_ARGS)
	@LIGHTNING_PACKAGE=pytorch_lightning $(FLOOR_PYTEST) $(addprefix tests/test_,callback_errors.py first_hour.py) \
	    $(PYTEST_ARGS)

# Chromium is the system's; playwright, which steers it, brings none. Without one, what is skipped is said.
test-browser: $(VENV)/.browser
	@mkdir -p screenshots
	@SCREENSHOTS=screenshots OMP_NUM_THREADS=1 $(PY) -m pytest $(wildcard tests/test_*_browser.py) $(PYTEST_ARGS)

# The demo, and the same with the labels mended that its audit suggests.
screenshots: $(VENV)/.browser
	@test -d demo_logs/screenshots || $(PY) examples/01_mislabelled_digits.py --logs demo_logs/screenshots
	@$(PY) examples/screenshots.py demo_logs/screenshots

size:
	@$(firstword $(PYTHON)) tests/size.py

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lint-page: node_modules/.installed
	@npm run --silent lint

bench: $(BENCH)/.bench
	@$(BENCH)/bin/python benchmarks/side_by_side.py --out docs/benchmarks.md

cost: $(VENV)/.dev
	@$(PY) benchmarks/audit_cost.py

detection: $(BENCH)/.bench
	@$(BENCH)/bin/python benchmarks/detection.py $(DETECTION_ARGS)

queries: $(VENV)/.dev
	@$(PY) benchmarks/queries.py

lds: $(VENV)/.peers
	@$(PY) benchmarks/lds.py --out docs/results/lds.md

lds-this-run: $(VENV)/.peers
	@OMP_NUM_THREADS=1 $(PY) benchmarks/replay_lds.py --out docs/results/replay.md

solvers: $(VENV)/.dev
	@$(PY) benchmarks/solvers.py --out docs/results/solvers.md

unlearning: $(VENV)/.dev
	@$(PY) benchmarks/unlearning.py --out docs/results/unlearning.md

fairness: $(VENV)/.dev
	@$(PY) benchmarks/fairness.py --out docs/results/fairness.md

robustness: $(VENV)/.dev
	@$(PY) benchmarks/robustness.py --out docs/results/robustness.md

scale: $(VENV)/.dev
	@$(PY) benchmarks/scale.py

memory: $(VENV)/.dev
	@$(PY) benchmarks/memory.py

recording: $(VENV)/.dev
	@$(PY) benchmarks/recording.py

compatibility: $(VENV)/.dev $(FLOOR)/.floor
	@$(INSTALL) datasets
	@$(PY) benchmarks/compatibility.py --floor $(FLOOR)/bin/python

# What a user gets: from the wheel alone, without a checkout and without tools of tests and examples.
package: $(VENV)/.created
	@rm -rf dist $(ALONE)
	@$(INSTALL) build twine
	@$(PY) -m build --quiet --outdir dist
	@$(PY) -m twine check --strict dist/*
	@$(PYTHON) -m venv $(ALONE)
	@$(subst $(PY),$(ALONE)/bin/python,$(INSTALL)) dist/*.whl
	@cd $(ALONE) && bin/python -c 'from lightning_influence import *; print("installed:", __version__)'
	@$(ALONE)/bin/python -m pip list --format freeze | grep -iE '^(pytest|scikit|mlxtend|transformers|matplotlib|pandas|mypy|ruff)' \
	    && { echo 'make: the wheel brings tools that only tests and examples need' >&2; exit 1; } || true

clean:
	rm -rf node_modules $(VENV) $(BENCH) $(FLOOR) $(ALONE) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files below mark what is done. Each is touched last, so a failed step is repeated.

$(VENV)/.created:
	@command -v $(firstword $(PYTHON)) >/dev/null || { \
	    echo "make: there is no '$(PYTHON)' here. Install Python 3.10 or newer, or name another:" \
	        "make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: lightning-influence needs Python 3.10 or newer, but '$(PYTHON)' is" \
	        "$$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' has no venv or no ensurepip, which make the environment." \
	        "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo 'installing lightning-influence into $(VENV) (once, some minutes) ...'
	@$(INSTALL) --editable '.[examples]'
	@touch $@

# kronfluence and curvlinops (by way of backpack), further references of the tests, ask for torchvision and never
# import it, and torchvision does not import beside the pinned torch. So they come without their dependencies; the
# `test` extra has the rest. torchdata asks for clients of the network, which its stateful loader does not use.
$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo 'installing lightning-influence with its test tools into $(VENV) (once, some minutes) ...'
	@$(INSTALL) --editable '.[examples,test,dev]'
	@$(INSTALL) --no-deps kronfluence==1.0.1 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 \
	    linear_operator==0.6.1 torchdata==0.11.0
	@touch $@ $(VENV)/.demo

node_modules/.installed: package.json
	@npm install --silent --no-audit --no-fund --no-package-lock
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	@$(INSTALL) playwright
	@touch $@

# dattri asks for pretty_midi, which the methods measured here do not use.
$(VENV)/.peers: $(VENV)/.dev
	@$(INSTALL) pyyaml scipy tqdm
	@$(INSTALL) --no-deps dattri==0.3.0
	@touch $@

# The peers of `make bench` and `make detection`, without test tools. What kronfluence imports is named, for the reason
# above.
$(BENCH)/.bench: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(BENCH) $(BENCH)/.created
	@echo 'installing lightning-influence and its peers into $(BENCH) (once, some minutes) ...'
	@$(BENCH_INSTALL) --editable '.[examples]' captum==0.9.0 cleanlab==2.9.0 accelerate einconv einops opt-einsum
	@$(BENCH_INSTALL) --no-deps kronfluence==1.0.1
	@touch $@

# What pyproject.toml asks for at least, and both packages of Lightning at that release, which refuses much of what
# constraints.txt names; its own bar breaks with a newer rich.
$(FLOOR)/.floor: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(FLOOR) $(FLOOR)/.created
	@echo 'installing the oldest releases into $(FLOOR) (once, some minutes) ...'
	@sed -n '/^dependencies/,/^]/s/^ *"\([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml >$(FLOOR)/oldest.txt
	@sed -n 's/^lightning==/pytorch-lightning==/p' $(FLOOR)/oldest.txt >>$(FLOOR)/oldest.txt
	@$(subst constraints.txt,$(FLOOR)/oldest.txt,$(FLOOR_INSTALL)) --editable . pytest pytest-xdist scikit-learn 'rich<14'
	@$(FLOOR_INSTALL) --no-deps torchdata==0.11.0
	@touch $@
