#!/bin/sh
# What the command line refuses and what it must do, with a model so small that a run takes milliseconds.
# From the project folder, after make: sh dev/test_cli.sh [PROGRAM]
export LC_ALL=C OMP_NUM_THREADS=1 # a second thread would only wait for the first
program=$(realpath "${1:-train_megalodon}") table=$PWD/train_megalodon.c
. dev/test_common.sh


byte() { printf "$(printf '\\%03o' $(($1 & 255)))"; }
int32() { for n; do byte "$n"; byte $((n >> 8)); byte $((n >> 16)); byte $((n >> 24)); done; }
bin() { int32 "$1" "$2" "$3"; head -c 1012 /dev/zero; cat; }           # MAGIC VERSION COUNT < tokens
safetensors() { int32 ${#1} 0; printf %s "$1"; head -c "$2" /dev/zero; } # HEADER BYTES
wide() { printf "$(od -An -v -to1 "$1" | tr -d '\n' | sed "s/ \(...\)/\\\\\1$2/g")"; } # bytes to wider integers

small="--seq 16 --batch 2"
model="--num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --chunk-size 16
       --norm-num-groups 2 --cema-ndim 2"
seq 1 500 > text.txt
seq 1 40000 > long.txt
works "trains and saves" "step 20: val loss" $small $model --train text.txt --steps 20 --checkpoint-every 10 --out tiny
tiny=tiny/step_00000020.safetensors

# The command line
refuses 'unknown option "--step".*--help' --step 10
refuses 'unknown option "-x"' -x
refuses 'unknown option "--step=10"' --step=10
refuses '--steps "": expected a whole number' --steps=
refuses '--dry-run takes no value' --dry-run=1
refuses '--prompt needs --generate' --prompt ROMEO: --load $tiny
refuses 'unknown option "10"' --steps 10 10
refuses 'unknown option ""' ""
refuses '--steps needs a value' --steps
refuses '--steps stands twice' --steps 1 --steps 2
refuses '--lr "1e-3x": expected a number' --lr 1e-3x
refuses '--lr "nan": expected a number from 0' --lr nan
refuses '--lr "-1": expected a number from 0' --lr -1
refuses '--steps "10.5": expected a whole number' --steps 10.5
refuses '--steps "": expected a whole number' --steps ""
refuses '--steps "0": expected a whole number from 1' --steps 0
refuses '--steps "99999999999": expected' --steps 99999999999
refuses '--swiglu "yes": expected' --swiglu yes
refuses '--swiglu "2": expected' --swiglu 2
refuses '--threads "65536": expected a whole number from 0' --threads 65536
refuses '--generate "0": expected a whole number from 1' --generate 0
refuses '--top-p "1.5": expected a number from 0 to 1' --top-p 1.5
refuses '--beta1 1' --beta1 1
refuses '--dropout "1": expected a number from 0 to 0.99' --dropout 1
refuses '--preset big: expected one of tiny' --preset big
refuses '--schedule step: expected cosine, linear or constant' --schedule step
refuses 'model_dim 128 must be divisible by norm_num_groups 3' --norm-num-groups 3
refuses 'z_dim 6 must be divisible by .*4' --num-heads 2 --z-dim 6
refuses 'value_dim 7 must be divisible by num_heads 2' --num-heads 2 --value-dim 7
refuses '--checkpoint-every needs a folder' --checkpoint-every 10 --out none
refuses '--generate and --eval' --generate 5 --eval text.txt --load $tiny
refuses '--generate.* need.* --load FILE or --resume DIR' --generate 5
refuses '--eval.* need.* --load FILE or --resume DIR' --eval text.txt
refuses '--load.*--resume' --load $tiny --resume tiny
for flag in --load --resume --eval --out --train; do refuses "$flag" $flag "" $small; done # "$UNSET" in the shell

# Files of weights
printf '\377\377\377\377\377\377\377\177{}' > huge
printf '\004\000' > short
safetensors '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' 7 > cut
safetensors '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' 9 > long
safetensors '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}' 4 > size
safetensors '{"embed.weight":{"dtype":"F64","shape":[256,16],"data_offsets":[0,32768]}}' 32768 > dtype
safetensors '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}' 0 > overflow
two() { safetensors "{\"a\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[0,4]},
    \"$1\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[$2]}}" "$3"; }
two b 2,6 6 > overlap
two b 8,12 12 > hole
two a 4,8 8 > twice
safetensors '{"a":{"dtype":"I32"' 0 > json
safetensors '{"__metadata__":{"num_layers":"1x"}}' 0 > number
safetensors '{}' 0 > none
: > empty
refuses 'missing: No such file' --load missing
refuses '--load \.: a folder' --load .
for file in empty short huge; do refuses "$file: not a safetensors file" --load $file; done
refuses "cut: truncated" --load cut
refuses "dtype: tensor 'embed.weight'.* F64" --load dtype --train text.txt $small $model
refuses "long: bytes follow" --load long
for file in size overflow overlap hole twice json; do refuses "$file: tensor '[ab]'" --load $file; done
refuses 'number: --num-layers "1x": expected a whole number' --load number
refuses "none: tensor 'embed.weight' is missing" --load none --train text.txt $small $model
refuses "model_dim 16, the flags say 32" --load $tiny --model-dim 32
refuses "num_layers 1, the flags say 12" --load $tiny --preset mega200M
edited() { sed "s/\"$1\":\"$2\"/\"$1\":\"$3\"/" $tiny > "$1"; } # the same file with another value in its metadata
edited num_layers 1 2
edited model_dim 16 32
edited swiglu 1 0
refuses "num_layers: tensor 'layers.1.mega.timenorm.weight' is missing" --load num_layers --train text.txt $small
refuses "model_dim: tensor 'embed.weight' has shape .*16.* expected .*32" --load model_dim --train text.txt $small
refuses "swiglu: unexpected tensor 'layers.0.nffn.fc3.weight'" --load swiglu --train text.txt $small
mkdir folder bad; cp cut bad/step_00000007.safetensors
refuses '--resume missing: ' --resume missing
refuses '--resume folder: no valid step_' --resume folder
refuses '--resume bad: no valid step_' --resume bad
result "and says which it skips, and why" "$(grep -q '^skipping bad/step_00000007.*truncated' err || cat err)"
refuses '--out tiny holds checkpoints: --resume' --out tiny --train text.txt $small $model
cp -r tiny other
refuses '--out other holds checkpoints' --resume tiny --out other
refuses 'text.txt' --out text.txt --train text.txt $small $model

# Data
printf '123456789' > few.txt
printf '1' > one.txt
int32 20240520 1 > header.bin
wide few.txt '\\000' | bin 20240520 2 9 > version.bin
wide few.txt '\\000' | bin 20240521 1 9 > magic.bin
wide few.txt '\\000' | bin 20240520 1 10 > count.bin
(wide few.txt '\\000'; printf '\054\001\007\000') | bin 20240520 1 11 > id.bin
refuses 'no file is named missing.txt' --train missing.txt $small $model
refuses 'no file is named missing\*' --train 'text.txt,missing*' $small $model
refuses 'no file is named missing.txt' --train missing.txt --dry-run $small $model
refuses 'few.txt: .*tokens.*--seq 16' --train few.txt --dry-run $small $model
refuses 'unknown option "few.txt".*quote' --train text.txt few.txt $small $model
refuses 'empty: empty' --train empty $small $model
refuses 'folder: not a regular file' --train folder $small $model
refuses 'few.txt: .*tokens.*--seq 16' --train few.txt $small $model
refuses 'no file is named missing' --train text.txt --val missing $small $model
refuses 'one.txt: at least 2 tokens' --eval one.txt --load $tiny
refuses 'header.bin: truncated' --train header.bin $small $model
refuses 'version.bin: magic 20240520 version 2' --train version.bin $small $model
refuses 'magic.bin: magic 20240521' --train magic.bin $small $model
refuses 'count.bin: 10 tokens .*1042' --train count.bin $small $model
refuses 'id.bin: token 9 is 300, vocab_size is 256' --eval id.bin --load $tiny
refuses 'text.txt: token [0-9]+ is 5[0-9], vocab_size is 50' --train text.txt $small $model --vocab-size 50
run $small $model --train text.txt --steps 1 --out digits --vocab-size 64
(cat text.txt; echo z) > z.txt
refuses 'z.txt: token 1892 is 122, vocab_size is 64' \
    --val z.txt --out z $small $model --train text.txt --steps 2 --vocab-size 64
grep -q "^step  *1/" out && [ ! -e z/step_00000002.safetensors ]
result "and loses no run by it" "$([ $? != 0 ] || echo "trained, but did not save")"
refuses '--prompt: byte 122 .* vocab_size 64' --prompt z --generate 3 --resume digits

# What goes wrong while training
n=$(od -An -tu4 -N4 $tiny)
(head -c $((8 + n)) $tiny; printf '\000\000\300\177'; tail -c +$((13 + n)) $tiny) > nan
for mode in '--eval text.txt' '--generate 5' '--train text.txt'; do
    refuses "nan: tensor 'embed.weight' holds nan at 0" --load nan $mode $small
done
run $small $model --train text.txt --steps 20 --lr 1000 --checkpoint-every 1 --out diverged
step=$(sed -n 's/^error: step \([0-9]*\): loss.*/\1/p' err)
[ $status = 1 ] && [ "$(ls diverged | tail -n 1)" = "step_$(printf %08d $((step - 1))).safetensors" ]
result "divergence names the step, keeps the checkpoint before it" "$([ $? = 0 ] || echo "status $status: $(cat err)")"
works "that checkpoint loads" "eval: tokens" --eval text.txt --resume diverged

cp -r tiny full && rm full/step_00000020.safetensors
(trap '' XFSZ && ulimit -f 50 && exec "$program" --resume full > out 2> err) # 25 or 50 KB: enough for the log
[ $? = 1 ] && grep -q '^error: .*full/step_00000020.safetensors' err && [ "$(ls full | wc -l)" -eq 2 ]
result "a full disk: the file is named, nothing is left of it" "$([ $? = 0 ] || ls full err | cat - err)"
works "the checkpoint before it loads" "full/step_00000010.*" --eval text.txt --resume full

stopped() { # NAME: waits for the program; it must have saved its last step
    wait $!
    status=$? last=$(tail -n 1 run/log.tsv | cut -f1)
    [ $status = 0 ] && [ -e "run/step_$(printf %08d "$last").safetensors" ]
    result "$1" "$([ $? = 0 ] || echo "exit status $status, step $last, in the folder: $(echo run/*))")"
    rm -r run
}
(exec "$program" $small $model --train text.txt --steps 1000000 --out run > out 2> err) &
until [ -e run/log.tsv ] && [ "$(wc -l < run/log.tsv)" -gt 3 ]; do sleep 0.05; done
kill -TERM $!
stopped "SIGTERM: finishes the step, saves, exit status 0"
(exec "$program" $small $model --train text.txt --val long.txt --val-every 1 --steps 1000 --out run > out 2> err) &
sleep 1
kill -TERM $!
stopped "SIGTERM during validation: the same"
(exec "$program" $small $model --accum 1000000 --train text.txt --steps 10 --out twice_stopped > out 2> err) &
until [ -e twice_stopped/log.tsv ]; do sleep 0.05; done
sleep 0.5; kill -INT $!; sleep 0.1; kill -INT $!; wait $!
status=$?
result "a second SIGINT exits at once" "$([ $status = 130 ] || echo "exit status $status")"
for signal in HUP USR1 "TERM twice"; do
    (exec "$program" $small $model --train text.txt --steps 1000000 --out run > out 2> err) &
    until [ -e run/log.tsv ] && [ "$(wc -l < run/log.tsv)" -gt 3 ]; do sleep 0.05; done
    kill -${signal% *} $!
    [ "$signal" = "${signal% *}" ] || kill -TERM $! # timeout, parallel and scancel send it twice
    stopped "SIG$signal: the same"
done
status=0
(timeout 60 "$program" $small $model --train text.txt --steps 1000000 --out run 2> err; echo $? > code) | head -n 20 > out
last=$(tail -n 1 run/log.tsv | cut -f1)
[ "$(cat code)" = 1 ] && [ -e "run/step_$(printf %08d "$last").safetensors" ] && tail -n 1 err | grep -q "^error: stdout"
result "a reader of stdout that goes away: saves, and says so" "$([ $? = 0 ] || cat code err)"
rm -r run

(exec "$program" $small $model --train text.txt --steps 1000000 --out run --checkpoint-minutes 1e-4 > out 2> err) &
until [ -e run/log.tsv ] && [ "$(wc -l < run/log.tsv)" -gt 99 ]; do sleep 0.05; done
refuses '--out run: another run is writing there' --resume run
kill -9 $! 2> err; wait $! 2> err
result "saves by time, and keeps the newest" "$([ "$(ls run/step_*.safetensors | wc -l)" -le 2 ] || ls run)"
works "after kill -9 the newest resumes, and no lock is left" "^step [0-9]+/[0-9]+ .*" --resume run \
    --steps $(($(tail -n 1 run/log.tsv | cut -f1) + 1))
rm -r run
(exec "$program" $small $model --train text.txt --val long.txt --val-tokens 0 --val-every 1 --steps 9 --out run > out 2> err) &
until grep -q '^step 1/' out; do sleep 0.05; done
kill -TERM $!
stopped "SIGTERM during the first validation, whose step is printed before it"

# What must work
sed -n 's/^    X([A-Z]*, *\([a-z0-9_]*\),.*".*/\1/p' "$table" | tr _ - > flags
run --help
missing=$(while read -r flag; do grep -q -e "^  --$flag " out || echo "--$flag"; done < flags)
[ $status = 0 ] && [ -s flags ] || missing="$missing exit status $status"
result "--help lists all $(wc -l < flags) flags" "$missing"
cp out help; run -h
same "-h is --help" out help
result "--help fits 100 columns" "$(awk 'length > 100' help)"
works "--flag=value" "steps 7 .*lr 0.5" --dry-run --steps=7 --lr=0.5
works "the built-in data is found from any folder" "^tokens: [0-9]{6} to train on" $small $model --steps 1
for preset in mega200M=220627968 mega1.3B=1342832640 mega1.3B_pg19=1327628288 mega7.1B=7117381632 mega7.3B=7385817088 \
              paper7B=7385817088; do
    works "--dry-run --preset ${preset%=*}" "^num_parameters: ${preset#*=}$" --dry-run --preset ${preset%=*}
done
works "names what it runs on" "^device: (CPU|.+, bf16)$" --dry-run
works "a flag before the preset" "model_dim 64 " --model-dim 64 --dry-run --preset mega200M

# Straight through 20 steps, and killed after the checkpoint of step 10; each in its own folder, as files record names
drop="--dropout 0.2 --hidden-dropout 0.1 --attention-dropout 0.3"
arguments="$model $drop --steps 20 --checkpoint-every 10 --batch 64 --seq 64 --threads 2 --train ../text.txt --out run"
mkdir straight killed
(cd straight && "$program" $arguments > out)
(cd killed && exec "$program" $arguments > out) &
until [ -e killed/run/step_00000010.safetensors ]; do :; done
kill -9 $! 2> err; wait $! 2> err
rm -f killed/run/step_00000020.safetensors # should the kill have come late
(cd killed && "$program" --resume run > out)
for f in straight killed; do weights $f/run/step_00000020.safetensors > $f/weights; steps $f/run > $f/steps; done
same "killed and resumed: same weights and moments" straight/weights killed/weights
same "killed and resumed: same log" straight/steps killed/steps

for n in 1 2; do
    run $model --seq 32 --batch 4 --train text.txt --steps 10 --threads $n --out threads$n
    steps threads$n > steps$n
done
strange='a	b\c"d[1]*'
run $small $model --train text.txt --steps 1 --out "$strange"
for threads in 0 1; do
    OMP_NUM_THREADS=2 "$program" $small $model --train text.txt --steps 1 --threads $threads --out kept$threads > out
    works "the machine's number of threads is not kept: $threads" "threads $threads |" --resume kept$threads
done
works "--resume of a folder with a strange name" "eval: tokens" --resume "$strange" --eval text.txt
refuses 'holds checkpoints: --resume' --out "$strange" $small $model --train text.txt --steps 1
same "1 thread and 2 threads: same losses" steps1 steps2
drops() { # NAME ARGUMENTS: a run with dropout
    name=$1
    shift
    run $model $drop --seq 32 --train text.txt --steps 10 --out "$name" "$@"
    steps "$name" > "$name.steps"
}
drops drop1 --batch 4 --threads 1
drops drop2 --batch 4 --threads 2
drops recomputed --batch 4 --recompute 1
drops accumulated --batch 2 --accum 2
result "dropout changes the loss" "$(cmp -s steps1 drop1.steps && echo "it does not")"
same "dropout: 1 thread and 2 threads: same losses" drop1.steps drop2.steps
same "dropout: --recompute: same losses" drop1.steps recomputed.steps
result "dropout: masks do not depend on how a step is split" "$(paste drop1.steps accumulated.steps |
    awk 'NR > 1 && ($3 - $8)^2 > 1e-10 { print $1, $3, $8 }')"
for rate in 0 0.5; do
    run $model --dropout $rate --train text.txt $small --steps 2 --lr 0
    grep "val loss" out > val$rate
done
same "dropout: none in validation" val0 val0.5
works "--load trains on from weights" "step 3/3" --load $tiny --train text.txt --steps 3 $small

for n in 1 2; do run --load $tiny --generate 50 --prompt 12 --temperature 0; cp out greedy$n; done
same "--generate: greedy twice is the same, and stdout holds only the sample" greedy1 greedy2
run --load $tiny --generate 50 --prompt 12 --temperature 1e-300; cp out greedy3
same "--generate: next to no temperature is none" greedy1 greedy3
if [ -e /dev/full ]; then
    "$program" --load $tiny --generate 50 > /dev/full 2> err
    result "a full disk under stdout" "$([ $? = 1 ] && tail -n 1 err | grep -q '^error: .*stdout' || tail -n 1 err)"
fi
result "--generate 50 writes the prompt and 50 bytes" \
    "$([ "$(wc -c < greedy1)" -eq 52 ] && [ "$(head -c 2 greedy1)" = 12 ] || cat greedy1)"
printf 12 | "$program" --load $tiny --generate 50 --temperature 0 > piped 2> err
same "a prompt by pipe" greedy1 piped
printf 12 > prompt
"$program" --load $tiny --generate 50 --temperature 0 < prompt > piped 2> err
same "a prompt from a file" greedy1 piped
sleep 2 | timeout 5 "$program" --load $tiny --generate 50 > piped 2> err
result "a pipe that stays empty is no prompt" "$([ "$(wc -c < piped)" -eq 50 ] || cat piped err)"
for try in 1.a 1.b 2.c; do run --load $tiny --generate 50 --seed ${try%.*}; cp out sample.$try; done
same "--generate: same seed, same sample" sample.1.a sample.1.b
result "--generate: another seed, another sample" "$(cmp -s sample.1.a sample.2.c && echo "it is the same")"
run --load $tiny --generate 50 --seed 1 --samples 3
head -c 50 out > first
same "--samples 3: the first is the one made alone" first sample.1.a
result "--samples 3: 3 times 50 bytes and 2 lines between them" "$([ "$(wc -c < out)" -eq 186 ] || wc -c < out)"

# Where a run is saved, and what it says
mkdir elsewhere
for n in 1 2; do (cd elsewhere && "$program" $small $model --train ../text.txt --steps 1 > ../out); done
result "without --out a run makes runs/1, then runs/2" \
    "$([ -e elsewhere/runs/2/step_00000001.safetensors ] || find elsewhere)"
(cd elsewhere && eval "$(sed -n 's/^sample: //p' ../out)" > ../out 2> ../err)
result "and says the command that samples" "$([ "$(wc -c < out)" -eq 500 ] || cat out err)"
(cd elsewhere && "$program" $small $model --train ../text.txt --steps 1 --out none > ../out)
result "--out none saves nothing" "$([ ! -e elsewhere/runs/3 ] && grep -q '^not saved' out || cat out)"
works "--out a/b/c is made" "^saved: a/b/c/step" --out a/b/c --train text.txt $small $model --steps 35 --warmup 5
result "the first and every tenth step are printed, and the last" \
    "$([ "$(sed -n 's,^step \([0-9]*\)/.*,\1,p' out | tr '\n' ' ')" = "1 10 20 30 35 " ] || cat out)"
"$program" $small $model --train text.txt --steps 1 --out closed >&- 2> err <&-
result "what a closed stdout loses lands in no file" "$([ "$(wc -l < closed/log.tsv)" -eq 2 ] || cat closed/log.tsv)"
(cd elsewhere && run() { "$program" "$@"; }; run --resume ../a/b/c --steps 36 > ../out 2> ../err)
result "--resume from another folder says what to do" \
    "$(grep -q '^error: --train (start in the folder where the run began.*text.txt' err || cat out err)"
works "a longer schedule is named" "^note: .*learning rate goes on at 0.00295; .* has 0.0002 here" --resume a/b/c --steps 90

# Tokens are those that are predicted, not padding
printf 123456789 > d1; printf 98 > d2
run $model --train d1,d2 --val d1,d2 --eod 0 --seq 64 --batch 2 --steps 2 --out documents
result "tokens are counted without padding" \
    "$([ "$(cut -f2 documents/log.tsv | tr '\n' ' ')" = "tokens 13 26 " ] || cat documents/log.tsv)"
run --eval d1,d2 --resume documents --losses losses
result "--losses writes where documents end" "$([ "$(tr '\n' ' ' < losses.documents)" = "9 2 " ] || cat err losses.*)"
head -c 101 text.txt > text101.txt
for val in "text.txt --val-tokens 100" text101.txt; do
    run $small $model --train text.txt --val $val --steps 1
    grep "val loss" out > "val.${val#* }"
done
same "--val-tokens 100 are the first 100" "val.--val-tokens 100" val.text101.txt

# The same text as bytes, as llm.c's uint16 and as its uint32; and cut into pieces named by commas and *
wide text.txt '\\000' | bin 20240520 1 "$(wc -c < text.txt)" > text16.bin
wide text.txt '\\000\\000\\000' | bin 20240801 7 "$(wc -c < text.txt)" > text32.bin
for f in text.txt text16.bin text32.bin; do
    run --load $tiny --eval $f
    sed -n 's/ bits.*//; /^eval:/p' out > eval.$f # tokens, nats and perplexity
done
count=$(($(wc -c < text.txt) - 1))
result "--eval scores every token but the first" "$(grep -q "tokens $count " eval.text.txt || cat eval.text.txt)"
same "--eval: uint16 .bin as text" eval.text.txt eval.text16.bin
same "--eval: uint32 .bin as text" eval.text.txt eval.text32.bin
head -c 600 text.txt > a1.txt; head -c 1300 text.txt | tail -c 700 > a2.txt; tail -c +1301 text.txt > b.txt
run $small $model --train text.txt --val text.txt --steps 5; grep -E '^tokens|val loss' out > whole
run $small $model --train 'a*.txt,b.txt' --val a1.txt,a2.txt,b.txt --steps 5; grep -E '^tokens|val loss' out > pieces
same "--train, --val: pieces named by * and commas as one file" whole pieces

# The test program's flags, in any order
program=$(dirname "$program")/test_megalodon
if [ -x "$program" ] && cp "$(dirname "$program")/data/reference/one.safetensors" dump; then
    works "test_megalodon: a dump" "overall okay: 1" dump
    works "test_megalodon: a flag after the file" "overall okay: 1" dump --chunk-parallel=1
    works "test_megalodon --help" "usage: test_megalodon" --help
    run dump --break logits
    result "test_megalodon --break, after the file" "$([ $status = 1 ] && grep -q '^overall okay: 0' out || cat err)"
    refuses 'unknown option "--precisio"' --precisio fp32
    refuses '--precision: the CPU program' --precision fp32 dump
    refuses '--chunk-parallel 2: 1 processes' dump --chunk-parallel 2
fi

summary dev/test_cli.sh
