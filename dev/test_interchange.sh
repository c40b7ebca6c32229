# Weights go between the C program and dev/reference.py, both ways: the same file gives the same loss on the same text.
# Needs torch and safetensors: PYTHON=/usr/bin/python3 sh dev/test_interchange.sh
set -eu
PYTHON=${PYTHON:-python3}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
head -c 3001 train_megalodon.c >"$dir/text.txt"
loss() { sed -n 's/.*nats\/token \([0-9.]*\).*/\1/p'; }
compare() { # name, loss in C, loss in PyTorch
    awk -v name="$1" -v a="$2" -v b="$3" 'BEGIN { d = a - b; if (d < 0) d = -d
        printf "%s %s: C %s, PyTorch %s\n", d < 2e-6 * b ? "ok" : "FAILED", name, a, b; exit !(d < 2e-6 * b) }'
}
./train_megalodon --train "$dir/text.txt" --steps 5 --out "$dir/run" >/dev/null
file=$dir/run/step_00000005.safetensors
compare "a checkpoint of the C program, read in Python" "$(./train_megalodon --load "$file" --eval "$dir/text.txt" | loss)" \
    "$($PYTHON dev/reference.py eval "$file" "$dir/text.txt" | loss)"
$PYTHON dev/reference.py init "$dir/init.safetensors" --num-layers 2 --model-dim 48 --num-heads 2 --z-dim 24 --value-dim 64 \
    --ffn-hidden-dim 80 --chunk-size 64 --norm-num-groups 3 --cema-ndim 6 --swiglu 1 --rescale-nffn 1 >/dev/null
compare "weights written in Python, read by the C program" \
    "$(./train_megalodon --load "$dir/init.safetensors" --eval "$dir/text.txt" | loss)" \
    "$($PYTHON dev/reference.py eval "$dir/init.safetensors" "$dir/text.txt" | loss)"
