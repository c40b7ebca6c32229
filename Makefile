CC ?= gcc
CFLAGS ?= -O3 -march=native
OPENMP := $(shell printf '\#include <omp.h>\nint main(void) { return 0; }' | $(CC) -x c -fopenmp -o /dev/null - 2>/dev/null && echo -fopenmp)
all: train_megalodon test_megalodon
train_megalodon test_megalodon: %: %.c train_megalodon.c
	$(CC) -std=gnu11 $(CFLAGS) $(OPENMP) $< -o $@ -lm
clean:
	rm -f train_megalodon test_megalodon
