# make demo shows the finding, make test checks everything; both first set up what they need in .venv.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.longva
NEED := longva needs Python 3.11 or newer
TAIL := tail -n 15 .venv/install.log; echo "pip could not set up .venv: the reason is above, all of it is in .venv/install.log."; exit 1
HOW := install one, or name one: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),env)

# In containers people are root, and JupyterLab wants to be told that this is meant.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

export GRADIO_ANALYTICS_ENABLED := False
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Many processes are started: where this is set, each would compile torch anew, ten seconds long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env demo test audit app chat lab export notebooks readme map docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

env: $(STAMP)  ## the environment .venv, with the versions of constraints.txt

# The stamp holds the folder it was made in: a .venv that was moved or copied still points to the old place.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "$(NEED), and there is no $(PYTHON) here: $(HOW)"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(NEED), and $(PYTHON) is older: $(HOW)"; exit 1; }
	@[ ! -f $@ ] || [ "$$(cat $@)" = "$(CURDIR)" ] || rm -rf .venv
	@$(BIN)/python -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)."; exit 1; }
	@echo "Setting up .venv, the first time only; pip's own words are in .venv/install.log."
	@echo "1 of 2: build tools"
	@$(BIN)/python -m pip install -c constraints.txt setuptools > .venv/install.log 2>&1 || { $(TAIL); }
	@echo "2 of 2: PyTorch, transformers, JupyterLab, Gradio and the rest (2 GB; a minute or more)"
	@$(BIN)/python -m pip install --no-compile -c constraints.txt --no-build-isolation --config-settings editable_mode=compat -e ".[dev,lab,apps,train,docs]" >> .venv/install.log 2>&1 || { $(TAIL); }
	@printf '%s' "$(CURDIR)" > $@

demo: $(STAMP)  ## the paper's Figure 4 in miniature, on two CPU cores
	$(BIN)/longva demo $(ARGS)

test: $(STAMP)  ## tree, notebooks, tests, lint: what CI runs
	$(BIN)/python tools/check_tree.py
	$(BIN)/ruff check
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

audit: $(STAMP)  ## known vulnerabilities of the versions in constraints.txt; needs PyPI
	@$(BIN)/python tools/audit.py

app: $(STAMP)  ## the needle app on 127.0.0.1; ARGS="--port 7870" and the like, here and for the others
	$(BIN)/python apps/needle/app.py $(ARGS)

chat: $(STAMP)  ## the chat app on 127.0.0.1
	$(BIN)/python apps/chat/app.py $(ARGS)

lab: $(STAMP)  ## JupyterLab on the notebooks; what it saves is clean
	$(BIN)/jupyter lab --config=tools/jupyter_config.py $(AS_ROOT) $(ARGS) nbs

export: $(STAMP)  ## notebooks -> modules, and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

notebooks: $(STAMP)  ## run notebooks again and save their outputs; NB="nbs/a.ipynb nbs/b.ipynb" for some
	$(BIN)/python tools/run_notebooks.py $(NB)

readme: $(STAMP)  ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/readme.py

map:  ## the picture of the house, from its imports
	"$(PYTHON)" tools/house.py

docs: $(STAMP)  ## the notebooks as pages, in _docs; ARGS=--serve shows them on 127.0.0.1:8000
	$(BIN)/python tools/docs.py $(ARGS)

clean:  ## caches and build leftovers; .venv and runs/ stay
	rm -rf build dist _proc _docs _site_src *.egg-info .pytest_cache .ruff_cache .gradio
	find . -path ./.venv -prune -o -path ./runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
