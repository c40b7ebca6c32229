# make             the programs that can be built here
# make train       train the built-in default: a tiny model that learns to write this project's own sources
# make test        what must hold; a minute, needs nothing but a compiler
# make test-long   what takes longer: streams of 10 million timesteps, kills at random moments, every tensor broken
# make bench       speed, as ratios to OpenBLAS and PyTorch where they are there
CFLAGS ?= -O3 -march=native
PYTHON ?= python3
THIS_CFLAGS = -std=gnu11 -Wall -Wextra $(CFLAGS)

# Each is found by compiling and linking a probe.
probe = $(shell echo '$(1)' | $(CC) -x c - $(2) -o /dev/null 2>/dev/null && echo '$(3)')
OPENMP := $(call probe,int main(void) { return 0; },-fopenmp,-fopenmp)
ifeq ($(OPENMP),)
  OPENMP := $(call probe,int main(void) { return 0; },-Xclang -fopenmp -lomp,-Xclang -fopenmp -lomp)
endif
OPENBLAS = $(call probe,void cblas_sgemm(void); int main(void) { cblas_sgemm(); return 0; },-lopenblas,-DOPENBLAS -lopenblas)

all: train_megalodon test_megalodon
	@echo "OpenMP: $(if $(OPENMP),yes,not found - one thread)"

train_megalodon test_megalodon: %: %.c train_megalodon.c
	$(CC) $(THIS_CFLAGS) $< $(OPENMP) -o $@ -lm

dev/bin/bench: dev/bench.c train_megalodon.c
	@mkdir -p dev/bin
	$(CC) $(THIS_CFLAGS) $< $(OPENMP) $(OPENBLAS) -o $@ -lm

train: train_megalodon
	./train_megalodon --sample-every 1000

test: train_megalodon test_megalodon
	./test_megalodon
	sh dev/test_cli.sh
	sh dev/test_break.sh data/reference/one_state.safetensors

test-long: train_megalodon test_megalodon
	./test_megalodon --long
	sh dev/test_break.sh
	sh dev/test_kill.sh
	sh dev/test_stream.sh

bench: dev/bin/bench
	dev/bin/bench $(PYTHON)

clean:
	rm -rf train_megalodon test_megalodon dev/bin

.PHONY: all train test test-long bench clean
