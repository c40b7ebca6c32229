#!/bin/sh
# emulate.sh FILE... : CUDA sources as C++ for dev/cuda/emulate.h, in dev/bin/emulated
for file in "$@"; do
    sed -E \
        -e '/#include <(cu|nccl)/d' \
        -e 's|#include "\.\./\.\./|#include "|' \
        -e 's/([A-Za-z_]+(<[A-Za-z0-9]+>)?)<<<(.*)>>>\(/emulated_launch(\1, \3, /' \
        -e 's/extern __shared__/extern/' \
        -e 's/asm volatile\("(prefetch|griddepcontrol).*\);//' \
        -e '/asm volatile\("mbarrier\.init/,/;$/c\    emulated_copy_init(barrier);' \
        -e '/asm volatile\("mbarrier\.arrive/,/;$/c\        emulated_copy_begin(to, from, n * sizeof(X), barrier);' \
        -e '/asm volatile\("\{\.reg/,/;$/c\        there = emulated_copy_there(barrier, parity);' \
        -e '/asm\("mma/,/;$/c\    emulated_mma(c.v, a, b);' \
        -e '/asm volatile\("ldmatrix/,/;$/c\        emulated_ldmatrix(a, from);' \
        "$file" > "dev/bin/emulated/$(basename "$file")"
done
