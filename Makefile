# Two commands: `make report` and `make test`. Each sets itself up first; see README.md.
PYTHON ?= python3
RUN = .venv/bin/python
WORKERS ?= 2

.DEFAULT_GOAL := report
.PHONY: report study test publish clean

report: .venv/ready            ## make the runs, run the notebooks, write results/reports/index.html
	@$(RUN) -m editcore report --workers $(WORKERS)

study: .venv/ready             ## the full study: hours; goes on where it was stopped
	@$(RUN) -m editcore study --full --workers $(WORKERS)
	@$(RUN) -m editcore report --full --workers $(WORKERS) -o results/study/reports

test: .venv/ready              ## the whole suite
	@$(RUN) -m pytest

publish: .venv/ready           ## the full study's report into docs/
	@$(RUN) -m editcore report --full --workers $(WORKERS) -o results/study/reports --publish docs

clean:                         ## the environment, caches and rendered reports; results/runs, which took long, stay
	rm -rf .venv results/reports results/figures *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A file, not a folder, says that setting up is finished: an interrupted one is taken up again.
.venv/ready: requirements.lock pyproject.toml
	@$(RUN) -c "import pip" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@echo "installing requirements.lock into .venv (about a minute, once)"
	@$(RUN) -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@
