# Each target makes its own virtual environment the first time; Python ≥ 3.11 is all that is needed.
# Another Python gets an environment of its own: make test PYTHON=python3.12
PYTHON ?= python3
PORT ?= 8866
VENV := .venv$(addprefix -,$(filter-out python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin

.PHONY: demo test browser lint lab app notebooks docs wheel clean

demo: $(VENV)/ready  ## train baseline and full method on the toy corpus and compare them
	OMP_NUM_THREADS=1 $(BIN)/prvr_demo

test: $(VENV)/ready lint  ## run all notebooks, then all tests but those that need a browser
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests --ignore tests/test_browser.py

browser: $(VENV)/ready  ## the search panel in a real browser (Chromium or Chrome must be installed)
	$(BIN)/python -m pytest -q tests/test_browser.py

lint: $(VENV)/ready  ## style of notebooks, package and tests
	$(BIN)/ruff check nbs prvr_nb tests

lab: $(VENV)/ready  ## open the notebooks
	$(BIN)/jupyter lab nbs

app: $(VENV)/ready  ## the search panel as a page on this machine; prints its address
	$(BIN)/prvr_app --port $(PORT)

notebooks: $(VENV)/ready  ## after an edit: export the package, store outputs, write README.md
	$(BIN)/nbdev_export
	OMP_NUM_THREADS=1 $(BIN)/python nbs/execute.py
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/make_readme.py

docs: $(VENV)/docs  ## notebooks, API and commands as one site: _docs/html/index.html
	rm -rf _docs && mkdir -p _docs/source
	$(BIN)/sphinx-build -W --keep-going -q -j auto -c nbs/docs -d _docs/doctrees _docs/source _docs/html
	$(BIN)/lychee --offline --include-fragments --no-progress --quiet --exclude-path '_static|_sources' _docs/html
	@echo _docs/html/index.html is ready

wheel: $(VENV)/ready  ## build a wheel, install it without extras into an empty environment, train two toy epochs with it
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build/wheel && env/bin/prvr_data toy --root data
	cd build/wheel && OMP_NUM_THREADS=1 env/bin/prvr_train --dataset toy --root data --out run --epochs 2 --hidden-size 32

clean:  ## remove what the other targets made
	rm -rf .venv .venv-* _docs runs/demo runs/app data/toy build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
