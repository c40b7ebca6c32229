CC ?= gcc
CFLAGS ?= -O3 -march=native
OPENMP := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
all: train_megalodon test_megalodon
train_megalodon test_megalodon: %: %.c train_megalodon.c Makefile
	$(CC) -std=gnu11 $(CFLAGS) $(OPENMP) $< -o $@ -lm
clean:
	rm -f train_megalodon test_megalodon
