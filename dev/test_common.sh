# What the tests of the command line share; to be read by `.` with $program set. Goes to a folder of its own. With
# VERBOSE=1 they print also what is good.
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
cd "$folder" || exit 1
passed=0 failed=0

result() { # NAME WHY: ok if WHY is empty
    if [ -z "$2" ]; then passed=$((passed + 1)); [ -z "$VERBOSE" ] || printf 'ok %s\n' "$1"
    else failed=$((failed + 1)); printf 'FAILED %s: %s\n' "$1" "$2"; fi
}

# Runs the program on the arguments: $status, files out and err.
run() { status=0; timeout 60 "$program" "$@" > out 2> err || status=$?; }

# REGEXP ARGUMENTS: exit status 1, and at the end of stderr one line, "error: ..." with this in it.
refuses() {
    regexp=$1 why=
    shift
    run "$@"
    [ "$status" = 1 ] || why="exit status $status; "
    tail -n 1 err | grep -Eq "^error: .*($regexp)" && [ "$(grep -c ^error: err)" = 1 ] ||
        why="${why}said: $(tail -n 2 err)"
    result "refuses $(printf "'%s' " "$@" | sed "s/ '--seq.*//")" "$why"
}

# NAME REGEXP ARGUMENTS: exit status 0 and this in the output.
works() {
    name=$1 regexp=$2 why=
    shift 2
    run "$@"
    [ "$status" = 0 ] || why="exit status $status: $(tail -n 1 err)"
    cat out err | grep -Eq "$regexp" || why="$why no \"$regexp\" in the output"
    result "$name" "$why"
}

same() { if cmp -s "$2" "$3"; then result "$1" ""; else result "$1" "$2 and $3 differ"; fi; } # NAME FILE FILE
weights() { tail -c +$((9 + $(od -An -tu4 -N4 "$1"))) "$1"; } # of a safetensors file, what follows the header
steps() { cut -f1-5 "$1/log.tsv"; }                           # the columns that do not depend on time

summary() { # NAME: of a script, at its end
    printf '%-6s %s: %d passed, %d failed\n' "$([ "$failed" = 0 ] && echo ok || echo FAILED)" "$1" "$passed" "$failed"
    [ "$failed" = 0 ]
}
