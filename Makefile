# make demo     train on the embedded digits, in a virtual environment made here (.venv)
# make test     run the tests
# make story    publish to a Hub on this machine, delete everything, go on from there with new classes
# make torture  kill, damage and starve runs hundreds of times (half an hour), write results/torture.json
# make benchmark  measure what things cost, as ratios (8 minutes), write results/benchmark-cpu.json
# make style    lint and format, changing files
# make quality  the same, changing nothing

PYTHONS = python3.13 python3.12 python3.11 python3
# Everything below is a relative path, so that the checkout may stand in a folder with spaces in its name.
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

.PHONY: demo test story torture benchmark style quality
# Two pip processes must not work on one environment.
.NOTPARALLEL:

# One process, on the GPU where there is one. What is not said here, `accelerate launch` warns about or takes from a
# saved configuration.
demo: .venv/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train_continual.py --config configs/digits.yaml
	@echo
	@echo "Report:  runs/digits/report.md"
	@echo "Samples: runs/digits/samples/"

# One thread a worker: the workers already take every core.
test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

story: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/story.py

torture: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py

benchmark: .venv/.installed
	$(BIN)/python -W ignore scripts/benchmark.py

style: .venv/.installed-quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/.installed-quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamps stand in .venv and go with it.
.venv/.installed: setup.py constraints.txt | .venv/.created
	$(INSTALL) -e .
	@touch $@

.venv/.installed-%: setup.py constraints.txt | .venv/.created
	$(INSTALL) -e ".[$*]"
	@touch $@

# Candidates are executed, not looked up: a name on PATH may be a shim for a Python that is not there.
.venv/.created:
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then touch $@; exit; fi; \
	for python in $(PYTHONS); do \
		if "$$python" -c 'import ensurepip, sys, venv; ensurepip.version(); sys.exit(sys.version_info < (3, 11))' \
			>/dev/null 2>&1; then \
			echo "Making .venv with $$("$$python" --version)"; \
			"$$python" -m venv --clear .venv && touch $@; exit; \
		fi; \
	done; \
	echo "No Python 3.11 or newer with the modules venv and ensurepip (on Debian and Ubuntu: python3-venv) was found;" \
		"tried: $(PYTHONS)." >&2; \
	exit 1
