#!/bin/sh
# kill -9 at a random moment while a checkpoint is written at every step: what is left must load, 50 times. From the
# project folder, after make: sh dev/test_kill.sh [TIMES]
export LC_ALL=C OMP_NUM_THREADS=1
program=$PWD/train_megalodon times=${1:-50}
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
cd "$folder" || exit 1
seq 1 500 > text.txt
head -c 40 text.txt > few.txt
bad=0 parts=0 resumed=0

# What --eval finds in the folder: the file with the weights and "scored", or nothing.
newest() {
    "$program" --resume run --eval few.txt 2> err |
        sed -n 's/^weights: //p; s/^eval: tokens 39 .*perplexity [0-9].*/scored/p' | tr '\n' ' '
}
check() { [ "$2" = "$3" ] || { bad=$((bad + 1)); echo "FAILED $1: expected \"$2\", got \"$3\": $(tail -n 1 err)"; }; }

# 5 MB a checkpoint, and next to no computing: most of the time goes into writing
"$program" --num-layers 1 --model-dim 256 --seq 16 --batch 1 --train text.txt --steps 1 --out run > out || exit 1
size=$(wc -c < run/step_00000001.safetensors)
for round in $(seq "$times"); do
    "$program" --resume run --steps 100000 --checkpoint-every 1 --val-every 0 > out 2>&1 &
    sleep "0.$(od -An -N1 -tu1 /dev/urandom | awk '{ printf "%03d", 100 + $1 }')" # 0.100 to 0.355 s
    kill -9 $! && wait $! 2> err
    latest=$(ls run/step_*.safetensors | tail -n 1)
    [ ! -e "$(echo run/*.part)" ] || parts=$((parts + 1))
    check "round $round" "$latest scored " "$(newest)"
    [ "$latest" = run/step_00000001.safetensors ] || resumed=$((resumed + 1))
    ls run/step_*.safetensors | head -n -3 | xargs rm -f # the last three will do
done

# Files that only look like checkpoints are passed over. The newest is damaged: the one before it is taken.
latest=$(ls run/step_*.safetensors | tail -n 1) before=$(ls run/step_*.safetensors | tail -n 2 | head -n 1)
echo > run/step_99999999.txt
echo > run/step_99999999.safetensors.part
check "other files there" "$latest scored " "$(newest)"
cp "$latest" whole
head -c $((size / 2)) whole > "$latest"
check "newest truncated" "$before scored " "$(newest)"
(head -c 20 whole; printf '\000\000\000\000'; tail -c +25 whole) > "$latest"
check "newest with a damaged header" "$before scored " "$(newest)"
: > "$latest"
check "newest empty" "$before scored " "$(newest)"
rm -f run/step_*.safetensors
check "none left" "" "$(newest)"
echo "$times kills, $parts left a .part file, $resumed times later checkpoints were there; $bad failed"
[ $bad = 0 ]
