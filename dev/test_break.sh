#!/bin/sh
# Can the test fail? For each tensor of a dump: change it (--break), and test_megalodon must fail and name it. Inputs
# (param.*, state.*) are not compared themselves: there, any other tensor must fail. From the project folder, after
# make: sh dev/test_break.sh [DUMP]...     default: all of data/reference; VERBOSE=1 shows what becomes of each change
export LC_ALL=C OMP_NUM_THREADS=1
test=${TEST:-./test_megalodon} # of another program
[ $# -gt 0 ] || set -- data/reference/*.safetensors
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
out=$folder/out header=$folder/header
tried=0 noticed=0 missed=0

zero() { # NAME: does it stand in the dump, all zeros?
    set -- $(tr "{" "\n" < "$header" | grep -aA 1 -F "\"$1\":" | tail -n 1 |
             sed -n "s/.*\"data_offsets\": *\[\([0-9]*\), *\([0-9]*\)\].*/\1 \2/p")
    [ $# = 2 ] || return 1
    tail -c +$(($(wc -c < "$header") + $1 + 1)) "$dump" | head -c $(($2 - $1)) | tr -d '\000\200' > "$out"
    [ ! -s "$out" ]
}

for dump; do
    "$test" "$dump" > "$out" || { echo "FAILED $dump: fails unbroken"; exit 1; }
    head -c $((8 + $(od -An -tu4 -N4 "$dump"))) "$dump" > "$header"
    # What is compared with a tensor of the file (a name with a comma stands for another comparison), and the inputs.
    for name in $(sed -n 's/^ok  *\([^ ,:]*\) .*/\1/p' "$out") \
                $(grep -ao '"\(param\|state\)\.[^"]*"' "$header" | tr -d '"'); do
        "$test" --break "$name" "$dump" > "$out" 2>&1
        status=$? by=$(sed -n 's/^FAILED  *\([^ ]*\).*/\1/p' "$out") excuse= tried=$((tried + 1))
        case $name in param.* | state.*) by=${by%%
*} ;; *) by=$(echo "$by" | grep -Fx -e "$name") ;; esac
        if [ $status = 1 ] && [ -n "$by" ]; then
            noticed=$((noticed + 1))
            [ -z "$VERBOSE" ] || echo "ok $dump $name: $by"
            continue
        fi
        case $name in
            param.*) if zero "grad.${name#param.}"; then excuse="nothing depends on it: its gradient is zero"; fi ;;
            state.*.count | state.*.chunks) excuse="1% of a long past moves little" ;;
            # 1% of one of n entries moves a tensor that started at 0 by 0.01/sqrt(n) of its way; the bound is 0.001
            final.*) excuse="within the bound on its norm, $(grep -F " $name " "$out" | grep -o 'error.*')" ;;
            *) if zero "$name"; then excuse="it is zero"; fi ;;
        esac
        if [ $status = 0 ] && [ -n "$excuse" ]; then [ -z "$VERBOSE" ] || echo "passes $dump $name: $excuse"
        else missed=$((missed + 1)); echo "FAILED $dump $name: exit status $status"; fi
    done
done
printf '%-6s dev/test_break.sh: ' "$([ $missed = 0 ] && echo ok || echo FAILED)"
echo "$tried tensors broken, $noticed noticed, $((tried - noticed - missed)) may pass, $missed missed"
[ $missed = 0 ] && [ $noticed -gt 0 ]
