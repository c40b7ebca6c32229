#!/bin/sh
# The GPU program with documents and carried states: the CPU program's losses in fp32, resumed bit for bit, its samples.
# From the project folder, after make and make cuda: sh dev/cuda/test_carry.sh [PROGRAM [CPU_PROGRAM]]
export LC_ALL=C
gpu=$(realpath "${1:-train_megalodon_cuda}") cpu=$(realpath "${2:-train_megalodon}")
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
cd "$folder" || exit 1
failed=0

result() { # NAME WHY: ok if WHY is empty
    if [ -z "$2" ]; then printf 'ok %s\n' "$1"; else failed=$((failed + 1)); printf 'FAILED %s: %s\n' "$1" "$2"; fi
}
losses() { # DIR DIR BOUND: log.tsv of both, loss by loss and norm by norm
    tail -n +2 "$1/log.tsv" | cut -f3,4 > a
    tail -n +2 "$2/log.tsv" | cut -f3,4 > b
    paste a b | awk -v bound="$3" '{ for (k = 1; k <= 2; k++) { d = $k / $(k + 2) - 1; d = d < 0 ? -d : d
                                     if (!(d <= bound)) print "step " NR ": " $0; if (d > worst) worst = d } }
                                   END { if (NR == 0) print "no steps"
                                          printf "largest difference %g\n", worst > "/dev/stderr" }'
}
weights() { tail -c +$((9 + $(od -An -tu4 -N4 "$1"))) "$1"; }

seq 1 3000 | sed 's/37$/z/' > text.txt # documents of many pieces, which end with a z
model="--num-layers 2 --model-dim 64 --z-dim 32 --value-dim 64 --ffn-hidden-dim 64 --chunk-size 32 --norm-num-groups 4
       --train text.txt --eod 122 --seq 64 --batch 3 --accum 2 --steps 20 --checkpoint-every 10 --val-every 0"
for carry in 0 1; do
    "$cpu" $model --carry $carry --out cpu$carry > out 2>&1 || cat out
    "$gpu" $model --carry $carry --precision fp32 --out gpu$carry > out 2>&1 || cat out
    result "fp32, --carry $carry: the CPU's losses and norms" "$(losses gpu$carry cpu$carry 1e-4)"
done
result "--carry makes a difference" "$([ -z "$(losses gpu0 gpu1 1e-4 2>&1 | grep ^step)" ] && echo "it does not")"
"$gpu" $model --carry 1 --precision fp32 --recompute 1 --out again > out 2>&1 || cat out
result "--recompute 1" "$(losses again gpu1 1e-5)"
for precision in fp32 bf16; do
    "$gpu" $model --carry 1 --precision $precision --out whole_$precision > out 2>&1 || cat out
    cp -r whole_$precision resumed && rm resumed/step_00000020.safetensors
    "$gpu" --resume resumed > out 2>&1 || cat out
    weights resumed/step_00000020.safetensors > a
    weights whole_$precision/step_00000020.safetensors > b
    result "$precision: resumed, weights, moments and states bit for bit" "$(cmp a b 2>&1)"
    rm -r resumed
done
# What is made of the weights for one sample must be made again for the next.
model="--num-layers 2 --model-dim 64 --z-dim 32 --value-dim 64 --ffn-hidden-dim 64 --chunk-size 32 --norm-num-groups 4
       --train text.txt --seq 64 --batch 3 --steps 40 --lr 1e-2 --warmup 1 --sample-every 10 --temperature 0
       --val-every 0 --out none"
"$cpu" $model 2>&1 | grep -av ^step | sed -n '/sample ----/,$p' > a
"$gpu" $model --precision fp32 2>&1 | grep -av ^step | sed -n '/sample ----/,$p' > b
result "samples while training: the CPU's" "$(grep -ac 'sample ----' b | grep -v '^4$'; cmp a b 2>&1)"
[ $failed = 0 ]
