#!/bin/sh
# --eval streams: 1.25 MB of text must take at most 4 MB more memory than its first 100 KB, and at most 5% more time a
# token. From the project folder, after make, on Linux: [PROGRAM=...] sh dev/test_stream.sh [TEXT]     default: the project's sources
export LC_ALL=C OMP_NUM_THREADS=1 # so that CPU time measures the work, whatever else the machine does
program=$(realpath "${PROGRAM:-train_megalodon}") text=$1
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
if [ -z "$text" ]; then
    text=$folder/text
    for n in $(seq 12); do cat train_megalodon.c; done > "$text" # more than 100 KB each time
fi
head -c 1250000 "$text" > "$folder/long"
head -c 100000 "$text" > "$folder/short"
cd "$folder" || exit 1
"$program" --train long --val short --seq 128 --steps 20 --out run > out || exit 1

# FILE: prints peak memory in kB and CPU time in ms. VmHWM is the peak of a process so far: what is seen last counts.
measure() {
    (
        "$program" --load run/step_00000020.safetensors --eval "$1" > out 2>&1 &
        while now=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$!/status") && [ -n "$now" ]; do
            peak=$now
            sleep 0.1
        done
        wait $! || exit
        times > used # the second line is the children's; in a pipe it would be another shell's
        sed '1d; s/[ms]/ /g' used | awk -v peak="$peak" '{ print peak, 1000 * (60 * ($1 + $3) + $2 + $4) }'
    ) 2> err
}

for attempt in 1 2 3; do # a busy machine disturbs even CPU time
    set -- $(measure short) $(measure long) $(measure short)
    [ $# = 6 ] || { cat out err; exit 1; }
    echo "$@" | awk '{
        more = ($3 - $1) / 1024; ratio = $4 / 12.5 / (($2 + $6) / 2); good = more <= 4 && $2 > 0 && ratio <= 1.05
        printf "%s 100 KB: %.1f MB, %.1f us/token; 1.25 MB: %+.1f MB, %.1f us/token, %.3f times\n",
               good ? "ok" : "FAILED", $1 / 1024, ($2 + $6) / 200, more, $4 / 1250, ratio; exit !good }' && exit 0
done
exit 1
