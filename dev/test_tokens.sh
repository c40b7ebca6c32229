#!/bin/sh
# Tokenizers, documents, carried states and what --eval says about a text, by the command line, with a tiny model.
# From the project folder, after make: sh dev/test_tokens.sh [PROGRAM]
export LC_ALL=C OMP_NUM_THREADS=1
program=$(realpath "${1:-train_megalodon}") reference=$PWD/data/reference/tokens
. dev/test_common.sh
close_to() { # NAME A B: two numbers, to 1e-6 of them
    result "$1" "$(echo "$2 $3" | awk '{ d = $1 - $2; if (!(d <= 1e-6 * $1 && -d <= 1e-6 * $1)) print $1, "and", $2 }')"
}
loss() { awk -F'\t' -v step="$2" '$1 == step { print $3 }' "$1/log.tsv"; } # DIR STEP

model="--num-layers 2 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --chunk-size 16 --norm-num-groups 2
       --cema-ndim 2"
cp "$reference"/* .

# Files of tokenizers
broken() { sed "$2" own.tok > "$1.tok"; } # NAME SED
head -c 1000 own.tok > cut.tok
head -n 400 own.tok > lines.tok
: > empty.tok
printf 'megalodon.c tokenizer 1' > first.tok
broken magic '1s/1/3/'; broken old '1s/1/2/'; broken kind '2s/unigram/other/'; broken few '3s/500/499/'
broken many '3s/500/16000000/'
broken zero '3s/500/0/'; broken sign '3s/500/+500/'; broken eod '4s/1/500/'; broken both '4s/1/0/'; broken end '4s/1/7/'
broken score '6s/ .*/ nan/'; broken space '7s/ keep/  keep/'; broken type '20s/^b/q/'; broken number '20s/0.0/0.0x/'
broken quote '20s/"$//'; broken escape '20s/x/y/'; broken digit '20s/x0/xA/'; broken byte '20s/"\\x..*"/"ab"/'
broken again '20s/x08/x07/'; broken bytes '20s/^b 0.0 .*/c 0.0 ""/'; broken control '9s/""/"a"/'
broken raw '20s/"\\x..*"/"	"/'
broken twice '400s/ ".*"/ " the"/; 401s/ ".*"/ " the"/'; broken nothing '400s/ ".*"/ ""/'
broken more '$s/$/\nc 0.0 ""/'
sed "400s/\"\$/$(printf '%01100d' 7)\"/" own.tok > long.tok
# Rules: line 9 counts them, and they are the lines 510 to 552
broken() { sed "$2" rules.tok > "$1.tok"; } # NAME SED
broken new '1s/2/1/'; broken no_rules 9d; broken many_rules '9s/43/5000000/'; broken more_rules '9s/43/3000/'
broken few_rules '9s/43/42/'; broken sign_rules '9s/43/-1/'; broken from_nothing '520s/".*" /"" /'
broken no_quote '520s/"$//'; broken no_second '520s/ .*//'; broken one_space '520s/ /  /'; broken rest '520s/$/ /'
broken rule_escape '520s/" "/" "\\xg/'; broken raw_rule '520s/" "/" "	/'; broken piece_for_rule '520s/.*/n 0.0 "a"/'
broken order '520h; 520d; 521G'; broken same_rule '520p'; broken last_rule '552d'
sed "520s/\"\$/$(printf '%01100d' 7)\"/" rules.tok > long_rule.tok
tok() { refuses "$1.tok: $2" --tokenizer "$1.tok" --train text.txt $model; }
tok missing "No such file"; tok empty "not a tokenizer"; tok first "truncated: line 1"; tok magic "not a tokenizer"
tok cut truncated
tok lines "truncated: line 401 does not end or is missing"; tok many "truncated: no room for 16000000"
tok kind "line 2: expected \"kind unigram\" or bpe"; tok few "something follows the last of 499"
tok zero "line 3: .*whole number from 2"; tok sign "line 3"; tok eod "line 4: .*from 0 to 499"; tok score "line 6"
tok space "line 7"; for name in type number quote escape digit byte raw again; do tok $name "line 20: "; done
tok bytes "255 byte pieces"; tok control "line 9: 1 bytes in a piece of type c"
tok twice "pieces .* have the same bytes"
tok nothing "line 400: 0 bytes"; tok more "something follows"; tok long "line 400"; tok both ".*two pieces of type c"
tok old "line 9: expected \"rules \.\.\.\""; tok new "line 9: expected a piece"; tok no_rules "line 9: expected \"rules"
tok many_rules "line 9: .*whole number from 0"; tok sign_rules "line 9: .*whole number from 0"
tok more_rules "truncated: no room for 500 pieces and 3000 rules"; tok few_rules "something follows the last of 500"
tok last_rule "truncated: line 552 does not end or is missing"
for name in from_nothing no_quote no_second one_space rest rule_escape raw_rule piece_for_rule long_rule; do
    tok $name "line 520: expected a rule"
done
tok order "line 521: rules must be sorted"; tok same_rule "line 521: rules must be sorted"
tok end ".*two pieces of type c"; refuses "\.: not a regular file" --tokenizer . --train text.txt $model

# Files that belong together: .bin and .info, a tokenizer, the weights that were trained with it
mkdir pair
cp own.tok own.bin own.info pair
seq 1 300 > pair/text.txt
sed 's/^tokens .*/tokens 1328/' own.info > pair/count.info; cp own.bin pair/count.bin
sed 's/^vocab_size .*/vocab_size 501/' own.info > pair/size.info; cp own.bin pair/size.bin
(cat own.info; echo tokenizer_crc32 00000000) > pair/other.info; cp own.bin pair/other.bin
crc=$(gzip -c pair/own.tok | tail -c 8 | od -An -tx4 -N4 | tr -d ' ')
(cat own.info; echo "tokenizer_crc32 $crc") > pair/same.info; cp own.bin pair/same.bin
refuses 'count.bin holds 1329 tokens, pair/count.info says 1328' --train pair/count.bin $model
refuses 'size.bin was made with 501 tokens, --tokenizer pair/own.tok has 500' --train pair/size.bin $model
refuses "other.bin was made with another tokenizer: .*00000000 .*pair/own.tok.* $crc" --train pair/other.bin $model
grep -v ^tokenizer own.info > pair/plain.info; cp own.bin pair/plain.bin
refuses '--eod 5: by pair/plain.info documents end with token 1' --train pair/plain.bin $model --eod 5 --vocab-size 500
works "the .info names tokenizer and vocabulary" "^saved: paired" --train pair/same.bin --val pair/text.txt $model --eod 1 \
    --seq 16 --steps 1 --out paired
result "both are used" "$(grep -q '^tokenizer pair/own.tok .*eod 1' out && grep -q 'vocab_size 500' out || cat out)"
paired="--load paired/step_00000001.safetensors"
works "and recorded" "^eval: tokens" $paired --eval pair/text.txt
refuses "other.bin was made with another tokenizer" $paired --eval pair/other.bin
sed '20s/0.0/0.5/' own.tok > pair/own.tok
for mode in "--eval pair/text.txt" "--generate 5" "--train pair/text.txt"; do
    refuses "pair/own.tok is another one than the weights were trained with: its CRC-32 is .*, expected $crc" $paired $mode
done
mv pair/own.tok pair/moved.tok
refuses '--tokenizer pair/own.tok: No such file.* --tokenizer FILE says where it is now' $paired --generate 5
cp own.tok pair/moved.tok
works "a tokenizer that was moved" "tok/s" $paired --generate 5 --tokenizer pair/moved.tok
works "a text without a tokenizer is named" "^note: pair/text.txt is read as bytes, although vocab_size is 500" \
    --train pair/text.txt $model --vocab-size 500 --seq 16 --steps 1 --out none

# Flags
documents="--train text.txt --batch 1"
works "the tokenizer brings its vocabulary" "vocab_size 500 " --tokenizer own.tok --dry-run
refuses "own.tok has 500 tokens, vocab_size is 300" --tokenizer own.tok --vocab-size 300 --train text.txt $model
refuses "--eod 0: in --tokenizer own.tok documents end with token 1" --tokenizer own.tok --eod 0 --train text.txt $model
refuses "--eod 256: .*vocab_size 256" --eod 256 --train text.txt $model
refuses "--carry needs documents: --eod" --carry 1 --train text.txt $model
refuses "--seq 24 .*--chunk-size 16" --carry 1 --eod 0 --seq 24 --train text.txt $model
refuses "--losses needs --eval" --losses x --train text.txt $model
refuses "90 pieces of --seq 32 tokens, a step takes 92" --eod 0 --seq 32 --batch 46 --accum 2 --train text.txt $model
works "and takes all of them" "read once in 1.0 steps" \
    --eod 0 --seq 32 --batch 45 --accum 2 --train text.txt --steps 1 $model

# A text and its .bin; what a checkpoint remembers; samples
for kind in own fold bpe rules; do
    eod=$(sed -n 's/^eod //p' $kind.tok)
    run $model --tokenizer $kind.tok --eod "$eod" --train $kind.bin --steps 20 --seq 32 --lr 1e-2 --warmup 0 \
        --out run_$kind
    last=run_$kind/step_00000020.safetensors
    run --load $last --eval text.txt --losses text.losses; sed -n '/^eval:/,$p' out > text.out
    run --load $last --eval $kind.bin --losses bin.losses; sed -n '/^eval:/,$p' out > bin.out
    same "$kind: losses of the text and of the .bin" text.losses bin.losses
    same "$kind: and what is said about them" text.out bin.out
    count=$(($(od -An -td4 -j8 -N4 $kind.bin) - 1))
    result "$kind: every token is scored" "$([ $((count * 4)) = "$(wc -c < text.losses)" ] &&
        grep -q "tokens $count " text.out || cat text.out)"
done
# --losses against the numbers printed, by awk: mean, bits per byte, per word, per word and line, table
run --resume run_own --eval text.txt --losses text.losses
od -An -v -tf4 -w4 text.losses | awk -v bytes="$(wc -c < text.txt)" -v words="$(sed -n 's/^words //p' own.info)" \
    -v lines="$(wc -l < text.txt)" '
    { s += $1; if (NR <= 1024) first += $1 }
    END { printf "tokens %d nats/token %.4f perplexity %.3f ", NR, s / NR, exp(s / NR)
          printf "bits/byte %.3f\nwords %d perplexity per word %.5g\n", s / log(2) / bytes, words, exp(s / words)
          printf "words + lines %d perplexity per word %.5g\n", words + lines, exp(s / (words + lines))
          printf "0-1K 1024 %.4f\n1K-2K %d %.4f\n", first / 1024, NR - 1024, (s - first) / (NR - 1024) }' > expected
awk '/^eval:/ { printf "tokens %d nats/token %.4f perplexity %.3f bits/byte %.3f\n", $3, $5, $7, $9 }
     /^words [0-9]/ { printf "words %d perplexity per word %.5g\n", $2, $6 }
     /^words \+/ { printf "words + lines %d perplexity per word %.5g\n", $4, $8 }
     / 0-1K / || / 1K-2K / { printf "%s %d %.4f\n", $1, $2, $3 }' out > printed
same "--eval: mean, bits per byte, perplexity per word, table" expected printed
works "a tokenizer that drops characters is named" "bits/byte .* drops characters" --resume run_fold --eval fold.bin
rm own.info
works "a .bin without .info: words unknown" "^words unknown" --resume run_own --eval own.bin
works "and bits/byte" "bits/byte unknown" --resume run_own --eval own.bin
printf 'words x\n' > own.info
refuses 'own.info: expected "words" and a whole number' --resume run_own --eval own.bin
refuses "--losses missing/x: No such file" --resume run_own --eval text.txt --losses missing/x
mv own.tok moved.tok
refuses "own.tok: No such file" --resume run_own --generate 5
works "--load remembers eod, --tokenizer may move" "" \
    --resume run_own --tokenizer moved.tok --generate 30 --prompt "Chunks, "
result "samples are text" "$(grep -qa '[a-z]' out && ! grep -qaE '([0-9]+ ){4}' out || cat out)"
"$program" --resume run_fold --generate 20 --prompt "   " > out 2> err
result "a prompt that the tokenizer drops" "$([ -s out ] || cat err)"

# One document: with --carry, steps of 16 tokens are the whole document cut, and with lr 0 have its losses
head -c 250 text.txt > one.txt
flat="$model --train one.txt --val one.txt --eod 0 --batch 1 --lr 0 --val-every 0"
run $flat --seq 256 --steps 1 --out whole
run $flat --seq 16 --steps 18 --carry 1 --out carried
run $flat --seq 16 --steps 16 --out dropped
cut_loss() { # DIR: the first 15 steps have 16 predictions each, the next one the last 11
    awk -F'\t' 'NR > 1 && NR <= 17 { s += $3 * (NR < 17 ? 16 : 11) } END { printf "%.9g", s / 251 }' "$1/log.tsv"
}
close_to "--carry 1: the pieces' losses are the whole's" "$(loss whole 1)" "$(cut_loss carried)"
result "without it they are not" "$([ "$(cut_loss carried)" != "$(cut_loss dropped)" ] || echo they are)"
close_to "the first piece is read again after the last, from an empty past" "$(loss carried 1)" "$(loss carried 17)"
close_to "and the second from where the first ended" "$(loss carried 2)" "$(loss carried 18)"

# Rows and micro-steps; recomputation; killed and resumed, bit for bit
head -c 600 text.txt > b.txt; tail -c 900 text.txt > c.txt
many="$model --train one.txt,b.txt,c.txt --val one.txt --eod 0 --seq 32 --carry 1 --steps 20 --checkpoint-every 10"
run $many --batch 6 --out rows
run $many --batch 2 --accum 3 --out micro
run $many --batch 6 --recompute 1 --out again
close_to "2 rows in 3 micro-steps are 6 rows" "$(loss rows 20)" "$(loss micro 20)"
close_to "--recompute 1 changes nothing" "$(loss rows 20)" "$(loss again 20)"
cp -r micro resumed && rm resumed/step_00000020.safetensors
run --resume resumed
for run in micro resumed; do steps $run > $run.steps; weights $run/step_00000020.safetensors > $run.weights; done
same "--carry 1, resumed: same log" micro.steps resumed.steps
same "--carry 1, resumed: same weights, moments and states" micro.weights resumed.weights
rm -r resumed && cp -r micro resumed && rm resumed/step_00000020.safetensors
refuses "tensor 'state.*count' has shape .*6.* expected .*8" --resume resumed --batch 8 --accum 1
works "weights of such a run load" "eval: tokens" --load micro/step_00000020.safetensors --eval one.txt

summary dev/test_tokens.sh
