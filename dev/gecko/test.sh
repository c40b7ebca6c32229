#!/bin/sh
# Gecko's tests: all dumps, those of Megalodon too; every tensor broken; five ways to get Gecko wrong, each of which the
# dumps must notice. From the project folder, after make gecko: sh dev/gecko/test.sh     under two minutes
export LC_ALL=C
test=dev/gecko/test_gecko
failed=0
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
$test || failed=1
TEST=$test sh dev/test_break.sh dev/gecko/reference/state.safetensors dev/gecko/reference/short.safetensors || failed=1

# NAME TENSOR OLD NEW: with OLD, a line of gecko.c, changed to NEW, this tensor must fail in the dump `window` or `state`.
wrong() {
    sed "s|../../train_megalodon.c|$PWD/train_megalodon.c|; s~$3~$4~" dev/gecko/gecko.c > "$folder/gecko.c"
    cmp -s "$folder/gecko.c" dev/gecko/gecko.c && { echo "FAILED $1: nothing to change"; failed=1; return; }
    ${CC:-gcc} -std=gnu11 -O1 -w -I. -DPROGRAM="\"$folder/gecko.c\"" test_megalodon.c -o "$folder/wrong" -lm || exit 1
    "$folder/wrong" dev/gecko/reference/window.safetensors dev/gecko/reference/state.safetensors > "$folder/out"
    if grep -q "^FAILED $2 " "$folder/out"; then echo "ok     noticed: $1 ($2)"
    else echo "FAILED $1: $2 passes"; failed=1; fi
}
wrong "no delta term" act.layers.0.mega.memory ' : 0.0f) - \*u;' ' : 0.0f);'
wrong "the memory a chunk early" act.layers.0.mega.memory 'config->sliding ? 2 : 1;' '1;'
wrong "the norm's correction a step late" act.layers.0.mega.timenorm 'expm1(stats.count \*' 'expm1((stats.count + 1) *'
wrong "a gate on the memory" act.layers.0.mega 'a.gated\[i\] += a.memory\[i\];' \
    'a.gated[i] += a.memory[i] * a.wr[i] * sigmoid(a.wr[i]);'
wrong "the chunk before without gradient" grad.layers.0.mega.wz.weight 'if (!dk_to) { continue; }' 'continue;'
[ $failed = 0 ] && echo "dev/gecko/test.sh: all passed"
