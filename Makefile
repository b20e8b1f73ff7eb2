# Each target makes its own virtual environment (.venv) the first time; Python ≥ 3.11 is all that is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lab app notebooks docs clean

demo: .venv/ready  ## train baseline and full method on the toy corpus and compare them
	$(BIN)/prvr_demo

test: .venv/ready  ## run all notebooks, then all tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest -q tests

lab: .venv/ready  ## open the notebooks
	$(BIN)/jupyter lab nbs

app: .venv/ready  ## the search panel as a page on this machine; prints its address
	$(BIN)/prvr_app

notebooks: .venv/ready  ## after an edit: export the package, store outputs, write README.md
	$(BIN)/nbdev_export
	$(BIN)/python nbs/execute.py
	$(BIN)/python nbs/make_readme.py

docs: .venv/docs  ## notebooks, API and commands as one site: _docs/html/index.html
	$(BIN)/python nbs/docs/make_docs.py

clean:  ## remove what the other targets made
	rm -rf .venv _docs runs/demo runs/app data/toy build dist *.egg-info .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
