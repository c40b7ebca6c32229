# make             the programs that can be built here
# make train       train the built-in default: a tiny model that learns to write this project's own sources
# make test        what must hold; a minute, needs nothing but a compiler; VERBOSE=1 prints a line for each comparison
# make test-long   what takes longer: streams of 10 million timesteps, kills at random moments, every tensor broken,
#                  several processes, also of the GPU program on a CPU
# make gecko       Gecko, the architecture after Megalodon: dev/gecko/train_gecko, and where nvcc is train_gecko_cuda;
#                  see dev/gecko/README.md
# make test-gecko  its tests; half a minute
# make bench       speed, as ratios to OpenBLAS and PyTorch where they are there, and of the GPU program where one is
# make cuda        the GPU programs, for the GPUs here (or CUDA_ARCH=90); dev/bin/check: GPU against CPU, kernel by kernel
# make test-emulated   the GPU programs' test where there is no GPU, slowly: see dev/cuda/emulate.h
CFLAGS ?= -O3 -march=native
PYTHON ?= python3
NVCC ?= nvcc
# no-pass-failed: clang reports loops that it does not vectorize as asked.
# no-trapping-math: nothing here reads the processor's flags of floating-point exceptions, and without it gcc does not
# vectorize exp_fast for AVX2. NaN and infinity keep their meaning.
THIS_CFLAGS = -std=gnu11 -Wall -Wextra -Wno-pass-failed -fno-trapping-math $(WIDE) $(CFLAGS)

MPICC ?= mpicc

SOURCES = train_megalodon.c data/base.h data/megalodon.h data/safetensors.h data/tokens.h

# What there is, found by compiling and linking a probe. CUDA's takes seconds, so only a plain `make` asks for it. GNU make
# before 4.3 takes a # inside a function call for a comment, hence HASH.
HASH := \#
probe = $(shell echo '$(1)' | $(2) -o /dev/null 2>/dev/null && echo '$(3)')
OPENMP := $(call probe,int main(void) { return 0; },$(CC) -x c - -fopenmp,-fopenmp)
ifeq ($(OPENMP),)
  OPENMP := $(call probe,int main(void) { return 0; },$(CC) -x c - -Xclang -fopenmp -lomp,-Xclang -fopenmp -lomp)
endif
# Tuned for Intel's processors, gcc and clang use half of AVX-512's width unless told otherwise: a third of the speed.
WIDE := $(call probe,int main(void) { return 0; },$(CC) -x c - -mprefer-vector-width=512,-mprefer-vector-width=512)
# Open MPI's mpicc says its flags in one way, MPICH's in another. MPI= builds without.
mpi_flags = $(or $(shell $(MPICC) --showme:$(1) 2>/dev/null),$(shell $(MPICC) -$(1)_info 2>/dev/null | cut -d' ' -f2-))
MPI := $(call mpi_flags,compile) $(call mpi_flags,link)
MPI := $(call probe,$(HASH)include <mpi.h>|int main(void) { return MPI_Init(0, 0); },tr "|" "\n" | $(CC) -x c - $(MPI),-DUSE_MPI $(MPI))
OPENBLAS = $(call probe,void cblas_sgemm(void); int main(void) { cblas_sgemm(); },$(CC) -w -x c - -lopenblas,-DOPENBLAS -lopenblas)
CUDA = $(call probe,$(HASH)include <cublasLt.h>,(cat; echo "int main() { return cublasLtGetVersion() == 0; }") | $(NVCC) -x cu - -lcublasLt,yes)

# Several GPUs need NCCL 2.28 or newer, and MPI to start it. NCCL_HOME: where it is, if nvcc does not find it by itself.
NCCL_FLAGS = $(if $(NCCL_HOME),-I$(NCCL_HOME)/include -L$(NCCL_HOME)/lib) -lnccl
NCCL = $(if $(MPI),$(call probe,$(HASH)include <nccl.h>,(cat; echo "int main() { return ncclAlltoAll(0, 0, 0, ncclFloat, 0, 0); }") | $(NVCC) -x cu - $(NCCL_FLAGS),\
         -DUSE_NCCL $(NCCL_FLAGS)))

# For the GPUs that are here, or else for compute capability 8.0 and 9.0.
CUDA_ARCH ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u),80 90)
NVCCFLAGS = -std=c++17 -O3 -diag-suppress 177,550,128 $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) \
            $(addprefix -Xcompiler ,-fopenmp $(filter -m%,$(CFLAGS))) -lcublasLt

all: train_megalodon test_megalodon
	@echo "OpenMP: $(if $(OPENMP),yes,not found, one thread)"
	@echo "MPI: $(if $(MPI),yes,not found, one process)"
	@if [ -n "$(CUDA)" ]; then echo "CUDA: yes, for compute capability $(CUDA_ARCH)"; \
	     echo "NCCL: $(if $(NCCL),yes,2.28 or newer not found, one GPU)"; $(MAKE) cuda; else echo "CUDA: not found"; fi

cuda: train_megalodon_cuda test_megalodon_cuda

# Programs are built again when what was found, or a flag, is another than the last time.
built_with = @mkdir -p dev/bin && echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@
dev/bin/flags: FORCE
	$(call built_with,$(CC) $(THIS_CFLAGS) $(OPENMP) $(MPI))
dev/bin/flags_cuda: FORCE
	$(call built_with,$(NVCC) $(NVCCFLAGS) $(MPI) $(NCCL))

train_megalodon test_megalodon: %: %.c $(SOURCES) dev/bin/flags
	$(CC) $(THIS_CFLAGS) $< $(OPENMP) $(MPI) -o $@ -lm

gecko: dev/gecko/train_gecko dev/gecko/test_gecko
	@if [ -n "$(CUDA)" ]; then $(MAKE) gecko-cuda; else echo "CUDA: not found"; fi

gecko-cuda: dev/gecko/train_gecko_cuda dev/gecko/test_gecko_cuda

dev/gecko/train_gecko: dev/gecko/gecko.c $(SOURCES) dev/bin/flags
	$(CC) $(THIS_CFLAGS) $< $(OPENMP) $(MPI) -o $@ -lm

dev/gecko/test_gecko: test_megalodon.c dev/gecko/gecko.c $(SOURCES) dev/bin/flags
	$(CC) $(THIS_CFLAGS) -I. -DPROGRAM='"dev/gecko/gecko.c"' $< $(OPENMP) $(MPI) -o $@ -lm

train_megalodon_cuda: train_megalodon.cu $(SOURCES) dev/bin/flags_cuda
	$(NVCC) $(NVCCFLAGS) $(MPI) $(NCCL) $< -o $@

test_megalodon_cuda: test_megalodon.c train_megalodon.cu $(SOURCES) dev/bin/flags_cuda
	$(NVCC) $(NVCCFLAGS) $(MPI) $(NCCL) -DGPU -x cu $< -o $@

dev/gecko/train_gecko_cuda: dev/gecko/gecko.cu dev/gecko/gecko.c train_megalodon.cu $(SOURCES) dev/bin/flags_cuda
	$(NVCC) $(NVCCFLAGS) -I. $(MPI) $(NCCL) $< -o $@

dev/gecko/test_gecko_cuda: test_megalodon.c dev/gecko/gecko.cu dev/gecko/gecko.c train_megalodon.cu $(SOURCES) dev/bin/flags_cuda
	$(NVCC) $(NVCCFLAGS) -I. $(MPI) $(NCCL) -DGPU -DPROGRAM='"dev/gecko/gecko.cu"' -x cu $< -o $@

dev/bin/test_tokens dev/bin/test_safetensors: dev/bin/%: dev/%.c dev/expect.h $(SOURCES)
	@mkdir -p dev/bin
	$(CC) $(THIS_CFLAGS) $< -o $@ -lm

dev/bin/bench: dev/bench.c $(SOURCES)
	@mkdir -p dev/bin
	$(CC) $(THIS_CFLAGS) $< $(OPENMP) $(OPENBLAS) -o $@ -lm

# GPU kernels and models against their CPU twins in one process; --bench and --kernels print times and rates.
dev/bin/check: dev/cuda/check.cu test_megalodon.c train_megalodon.cu $(SOURCES)
	@mkdir -p dev/bin
	$(NVCC) $(NVCCFLAGS) $< -o $@

dev/bin/check_gecko: dev/cuda/check.cu test_megalodon.c dev/gecko/gecko.cu dev/gecko/gecko.c train_megalodon.cu $(SOURCES)
	@mkdir -p dev/bin
	$(NVCC) $(NVCCFLAGS) -I. -DPROGRAM='"dev/gecko/gecko.cu"' $< -o $@

# The GPU programs on a CPU: train_megalodon, test_megalodon and check in dev/bin/emulated
EMULATED = g++ -std=gnu++17 -O2 -march=native -w -DGPU $(OPENMP) -I. -include dev/cuda/emulate.h
dev/bin/emulated/sources.done: dev/cuda/emulate.sh train_megalodon.cu test_megalodon.c dev/cuda/check.cu \
                              dev/gecko/gecko.cu
	@mkdir -p dev/bin/emulated
	sh $^ && touch $@
dev/bin/emulated/test_megalodon: EMULATED += -D__CUDA_ARCH__=800 # the others: 900, which has kernels in other forms
dev/bin/emulated/%: dev/bin/emulated/sources.done dev/cuda/emulate.h $(SOURCES)
	$(EMULATED) -x c++ dev/bin/emulated/$*.c* -x none $(if $(filter-out check,$*),$(MPI) $(if $(MPI),-DUSE_NCCL)) -o $@ -lm

dev/bin/emulated/train_gecko: dev/bin/emulated/sources.done dev/cuda/emulate.h dev/gecko/gecko.c $(SOURCES)
	$(EMULATED) -x c++ dev/bin/emulated/gecko.cu -x none $(MPI) $(if $(MPI),-DUSE_NCCL) -o $@ -lm
dev/bin/emulated/test_gecko: dev/bin/emulated/sources.done dev/cuda/emulate.h dev/gecko/gecko.c $(SOURCES)
	$(EMULATED) -D__CUDA_ARCH__=800 -DPROGRAM='"gecko.cu"' -x c++ dev/bin/emulated/test_megalodon.c -x none $(MPI) $(if $(MPI),-DUSE_NCCL) -o $@ -lm

dev/bin/test_gecko_long: dev/gecko/test_long.c dev/gecko/gecko.c $(SOURCES)
	@mkdir -p dev/bin
	$(CC) $(THIS_CFLAGS) -I. $< -o $@ -lm

test-gecko: gecko dev/bin/test_gecko_long
	@sh dev/gecko/test.sh
	@dev/bin/test_gecko_long

train: train_megalodon
	./train_megalodon $(if $(wildcard out/train/step_*),--resume,--sample-every 1000 --out) out/train

test: train_megalodon test_megalodon dev/bin/test_tokens dev/bin/test_safetensors
	@./test_megalodon $(if $(VERBOSE),-v)
	@sh dev/test_cli.sh
	@dev/bin/test_safetensors
	@dev/bin/test_tokens
	@sh dev/test_tokens.sh
	@sh dev/test_break.sh data/reference/one_state.safetensors
	@echo "make test: all passed"

test-long: train_megalodon test_megalodon gecko $(addprefix dev/bin/emulated/,train_megalodon test_megalodon \
           train_gecko test_gecko)
	./test_megalodon --long
	sh dev/test_break.sh
	sh dev/test_kill.sh
	sh dev/test_stream.sh
	sh dev/test_mpi.sh
	sh dev/test_mpi.sh dev/bin/emulated/train_megalodon dev/bin/emulated/test_megalodon "--precision fp32"
	sh dev/cuda/test_carry.sh dev/bin/emulated/train_megalodon
	dev/bin/emulated/test_gecko --precision bf16
	sh dev/test_mpi.sh dev/bin/emulated/train_gecko dev/bin/emulated/test_gecko "--precision fp32"
	sh dev/cuda/test_carry.sh dev/bin/emulated/train_gecko dev/gecko/train_gecko
	$(PYTHON) dev/test_data.py

test-emulated: dev/bin/emulated/test_megalodon dev/bin/emulated/check dev/bin/emulated/test_gecko
	dev/bin/emulated/test_megalodon --precision fp32
	dev/bin/emulated/test_megalodon --precision bf16
	dev/bin/emulated/test_gecko --precision fp32
	OMP_NUM_THREADS=1 dev/bin/emulated/check --quick

bench: dev/bin/bench
	dev/bin/bench $(PYTHON)
	@if nvidia-smi >/dev/null 2>&1; then $(MAKE) dev/bin/check && dev/bin/check --bench 0 5 && dev/bin/check --kernels; fi

clean:
	rm -rf train_megalodon test_megalodon train_megalodon_cuda test_megalodon_cuda dev/bin
	rm -f dev/gecko/train_gecko dev/gecko/test_gecko dev/gecko/train_gecko_cuda dev/gecko/test_gecko_cuda

FORCE:

.PHONY: FORCE all cuda gecko gecko-cuda test-gecko train test test-long test-emulated bench clean
