# demo   find a lottery ticket on handwritten digits (under two minutes, offline once installed)
# test   the test suite            bench  all measurements, their plots and the table of bars
# lint   ruff                  docs    the documentation's site, in build/site
# wheels a wheel for this Python that runs on any Linux from 2018 on, and the tests of its kernels without a compiler
# wheels-aarch64   the same for aarch64, by a cross compiler; nothing of it is run
# torture [TORTURE_MINUTES=10 TORTURE_SEED=0]    random layers, altered files, threads, kills, full disks
# audit  the GPU kernels compiled for GPUs that are not here, and the tables of what came out (half an hour)
# clean  everything that was built, but not .venv
# gpu    on a machine with a GPU, offline, nothing installed: tests of its kernels, measurements and bars (9 minutes)
# gpu-lab  there, the paper's Conv-2 and Resnet-18 (ten minutes a call; the next call goes on); SPARSELOTTERY_DATA=FOLDER
# gpu-sanitize GPU_RESULTS=DIR    there: compute-sanitizer on tiny layers, its report in DIR/sanitize.txt
#
# The first target creates .venv. A smaller torch, without CUDA, on Linux:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
GPU_PYTHON ?= python3
GPU_SECONDS ?= 540
GPU_RESULTS ?=
TORTURE_MINUTES ?= 10
TORTURE_SEED ?= 0
GPU_LAB_SECONDS ?= 570
GPU_LAB ?= conv-2 resnet-18
PIP_ARGS ?=
TEST_PROCESSES ?= 2
BIN := .venv/bin
AUDITED := 3.6 3.9  # versions of Triton
BUILT_FROM := setup.py pyproject.toml constraints.txt $(wildcard kernels/csrc/*)

WHEEL := build/wheel
BUILD_WHEEL = SPARSELOTTERY_LEVELS=all CXXFLAGS="-include $(CURDIR)/kernels/old_glibc.h" \
  $(BIN)/pip wheel $(PIP_ARGS) --no-deps --no-build-isolation
REPAIR_WHEEL = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --disable-isa-ext-check --wheel-dir dist
CROSS := aarch64-linux-gnu

.PHONY: docs wheels wheels-aarch64 demo test bench peers gpu gpu-lab gpu-sanitize audit torture lint clean

demo: .venv/lab.stamp
	$(BIN)/sparselottery find

# Threads that wait for others sleep, as two processes share the cores.
test: .venv/test.stamp
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal -p no:benchmark

bench: .venv/test.stamp
	-$(MAKE) peers
	$(BIN)/pytest benchmarks/ --benchmark-only
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.find_overhead
	$(BIN)/python -m benchmarks.moves
	$(BIN)/python -m benchmarks.sparse_gpt
	$(BIN)/python -m benchmarks.busy
	$(BIN)/python -m benchmarks.build
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.report

# Optional peers. SparseProp's setup.py calls whatever pip and python3 come first: they must be ours.
peers: .venv/test.stamp
	$(BIN)/pip install $(PIP_ARGS) mnn openvino sparselab onednn-cpu-gomp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install $(PIP_ARGS) --no-build-isolation pybind11 sparseprop

# The interpreter must have torch with CUDA, Triton and pytest.
gpu:
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) -m benchmarks.gpu --seconds $(GPU_SECONDS) \
	  $(if $(GPU_RESULTS),--results "$(GPU_RESULTS)")

gpu-lab:
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) -m benchmarks.gpu.lab --seconds $(GPU_LAB_SECONDS) \
	  --experiments $(GPU_LAB) --results $(or $(GPU_RESULTS),runs/gpu-lab-results)

gpu-sanitize:
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) -m benchmarks.gpu.sanitize --seconds $(GPU_SECONDS) \
	  $(if $(GPU_RESULTS),--results "$(GPU_RESULTS)")

# audit-3.6 is that of one Triton. Each has an environment of its own: a torch with CUDA installs the one it wants.
audit: $(AUDITED:%=audit-%)

.PRECIOUS: build/triton-%.stamp
audit-%: build/triton-%.stamp
	build/triton-$*/bin/python -m sparselottery.kernels.gpu.audit --table

build/triton-%.stamp: constraints.txt
	test -x build/triton-$*/bin/python || $(PYTHON) -m venv build/triton-$*
	build/triton-$*/bin/pip install $(PIP_ARGS) -c constraints.txt torch numpy scipy safetensors
	build/triton-$*/bin/pip install $(PIP_ARGS) --no-deps 'triton==$*.*'
	touch $@

# The minutes are shared by five parts (benchmarks/torture); each goes on where the last call with this seed ended.
torture: .venv/test.stamp
	$(BIN)/python -m benchmarks.torture --minutes $(TORTURE_MINUTES) --seed $(TORTURE_SEED)

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 PYTHONPATH="$(CURDIR)" $(BIN)/mkdocs build --strict --quiet

# libgomp is not put into the wheel: a process must have but one, torch's. The tests run from a folder without the sources.
wheels: .venv/wheels.stamp
	rm -rf $(WHEEL)
	$(BUILD_WHEEL) --wheel-dir $(WHEEL)/built .
	$(REPAIR_WHEEL) --plat manylinux_2_28_$$(uname -m) $(WHEEL)/built/*.whl
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/pip install $(PIP_ARGS) -c constraints.txt dist/sparselottery-*_$$(uname -m).whl hypothesis pytest
	cp -r tests $(WHEEL)/tests
	cd $(WHEEL) && PATH="$(CURDIR)/$(WHEEL)/venv/bin" venv/bin/python -m pytest -q -c /dev/null --rootdir . tests/test_kernels_cpu*.py

# Python's headers are this machine's: both have 64 bits and the same byte order. The kernels themselves are tested in an
# emulator (tests/test_native_driver.py).
wheels-aarch64: .venv/wheels.stamp
	rm -rf $(WHEEL)-aarch64
	_PYTHON_HOST_PLATFORM=linux-aarch64 CC=$(CROSS)-gcc CXX=$(CROSS)-g++ \
	  LDSHARED="$(CROSS)-gcc -shared" LDCXXSHARED="$(CROSS)-g++ -shared" \
	  SETUPTOOLS_EXT_SUFFIX=$$($(BIN)/python -c "import sys; print('.' + sys.implementation.cache_tag + '-$(CROSS).so')") \
	  $(BUILD_WHEEL) --wheel-dir $(WHEEL)-aarch64/built .
	$(REPAIR_WHEEL) --plat auto $(WHEEL)-aarch64/built/*.whl
	ls dist/sparselottery-*manylinux_2_2[0-8]_aarch64.whl  # of no newer Linux

clean:
	rm -rf build dist *.egg-info kernels/_native_* .venv/*.stamp .benchmarks .hypothesis .pytest_cache .ruff_cache

# Installs the extra of that name, editable, and builds the native library; again whenever a source of it changes.
.venv/%.stamp: $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	touch $@
