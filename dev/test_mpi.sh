#!/bin/sh
# Several processes: however the work is split, the run is the same; what one of them meets, all know. Under a minute.
# From the project folder, after make: sh dev/test_mpi.sh [PROGRAM TEST FLAGS], by default of the CPU programs
export LC_ALL=C OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 # MPI libraries leak
# Open MPI refuses root, and more ranks than cores, unless told
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_mpi_yield_when_idle=1
export MPIR_CVAR_ENABLE_HEAVY_YIELD=1 # MPICH takes more ranks than cores, but waits at the cost of the others
program=$(realpath "${1:-train_megalodon}") test=$(realpath "${2:-test_megalodon}") flags=$3 dump=$PWD/data/reference/slices.safetensors
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' INT TERM
cd "$folder" || exit 1
passed=0 failed=0

if ! mpirun -np 2 "$program" --dry-run > out 2>&1; then
    echo "SKIPPED, nothing about several processes was tested: $(command -v mpirun > /dev/null || echo "mpirun is not here")" \
         "$(grep ^error: out)"
    exit 0
fi

result() { # NAME WHY: ok if WHY is empty
    if [ -z "$2" ]; then passed=$((passed + 1)); printf 'ok %s\n' "$1"
    else failed=$((failed + 1)); printf 'FAILED %s: %s\n' "$1" "$2"; fi
}

# RANKS ARGUMENTS: files out and err, $status
run() {
    ranks=$1 status=0
    shift
    timeout 60 mpirun -np "$ranks" "$program" "$@" > out 2> err || status=$?
}

# REGEXP RANKS ARGUMENTS: an exit status that is not 0, and on stderr one "error: ..." with this in it
refuses() {
    regexp=$1 why=
    shift
    run "$@"
    [ "$status" != 0 ] || why="exit status 0; "
    grep -Eq "^error: .*$regexp" err && [ "$(grep -c ^error: err)" = 1 ] || why="${why}said: $(cat err)"
    result "refuses $(printf '%s' "$*" | sed 's/--num-layers.*--attention-dropout 0.2 //')" "$why"
}

# Waits for a file of the job in the background with so many lines, at most 30 s
appears() { # FILE LINES
    for _ in $(seq 300); do
        if [ -e "$1" ] && [ "$(wc -l < "$1")" -ge "$2" ]; then return; fi
        sleep 0.1
    done
    echo "$1 did not appear: $(cat out err)"
    exit 1
}

# The ranks of the job in the background: below mpirun (Open MPI), or below a process that it starts (MPICH)
rank_pids() { # [PID]
    for status_file in /proc/[0-9]*/status; do
        [ "$(sed -n 's/^PPid:[^0-9]*//p' "$status_file" 2> /dev/null)" = "${1:-$!}" ] || continue
        pid=${status_file#/proc/} pid=${pid%/status}
        if [ "$(readlink "/proc/$pid/exe")" = "$program" ]; then echo "$pid"; else rank_pids "$pid"; fi
    done
}

checkpoint() { printf '%s/step_%08d.safetensors' "$1" "$2"; } # DIR STEP
losses() { tail -n +2 "$1/log.tsv" | cut -f3; }
same_losses() { # DIR DIR: to 2e-6
    losses "$1" > losses1; losses "$2" > losses2
    paste losses1 losses2 | awk '{ d = ($1 - $2) / $2; if (d < 0) d = -d; if (!(d <= 2e-6)) print "step " NR ": " $0 }
                                 END { if (NR == 0) print "no steps" }'
}
compare() { # CHECKPOINT CHECKPOINT [START]: see test_megalodon.c
    "$test" --compare "$@" > compared 2>&1 || grep -v ^ok compared | head -n 3
}

seq 1 2000 > text.txt
model="--num-layers 2 --model-dim 24 --z-dim 8 --value-dim 20 --ffn-hidden-dim 16 --chunk-size 4 --norm-num-groups 3
       --cema-ndim 6 --train text.txt --warmup 3 --val-every 0
       --dropout 0.2 --hidden-dropout 0.1 --attention-dropout 0.2 $flags" # masks do not depend on the split either
long="--seq 48"

# The nearest launcher counts, whatever launchers started that one. What srun would set is set here.
launched() { # NAME NUMBER [VARIABLE=VALUE...] COMMAND
    name=$1 number=$2 status=0
    shift 2
    timeout 60 env "$@" $model $long --dry-run > out 2>&1 || status=$?
    case $number in
        1) found=$([ "$status" = 0 ] && ! grep ^processes: out && grep ^num_parameters: out) ;;
        2) found=$([ "$status" = 0 ] && grep '^processes: 2 ' out) ;;
        4) found=$([ "$status" != 0 ] && grep '^error: 4 processes were started, this one knows of 1: ' out) ;;
    esac
    result "launchers: $name" "$([ -n "$found" ] || echo "exit status $status, $(cat out)")"
}
task='SLURM_TASK_PID=$$ exec "$0" "$@"' # as srun starts a program
launched "mpirun in a step of one task" 2 SLURM_STEP_NUM_TASKS=1 SLURM_TASK_PID=$$ mpirun -np 2 "$program"
launched "mpirun in a step of four" 2 SLURM_STEP_NUM_TASKS=4 SLURM_TASK_PID=$$ mpirun -np 2 "$program"
launched "mpirun -np 1 in a step of four" 1 SLURM_STEP_NUM_TASKS=4 SLURM_TASK_PID=$$ mpirun -np 1 "$program"
launched "mpirun in a shell of another" 2 OMPI_COMM_WORLD_SIZE=1 PMI_SIZE=1 mpirun -np 2 "$program"
launched "another MPI's mpirun" 4 OMPI_COMM_WORLD_SIZE=4 "$program"
launched "srun, for another MPI" 4 SLURM_STEP_NUM_TASKS=4 sh -c "$task" "$program"
launched "a script under srun, for another MPI" 4 SLURM_STEP_NUM_TASKS=4 SLURM_TASK_PID=$$ "$program"
launched "srun -n 4 in a shell of mpirun -np 1" 4 OMPI_COMM_WORLD_SIZE=1 PMI_SIZE=1 SLURM_STEP_NUM_TASKS=4 \
    sh -c "$task" "$program"
launched "srun -n 1 in a shell of mpirun -np 4" 1 OMPI_COMM_WORLD_SIZE=4 PMI_SIZE=4 SLURM_STEP_NUM_TASKS=1 \
    sh -c "$task" "$program"
launched "no launcher, in a job of four" 1 SLURM_NTASKS=4 "$program"
launched "no launcher, in a step of one" 1 SLURM_STEP_NUM_TASKS=1 SLURM_TASK_PID=$$ "$program"

"$program" $model $long --batch 4 --lr 0 --steps 1 --out start > out
"$program" $model $long --batch 4 --steps 10 --checkpoint-every 1 --out one > out

# Four sequences a step: DATA CHUNK FLAGS
for split in "1 2 --batch 4" "2 1 --batch 1 --accum 2" "2 2 --batch 2" "1 3 --batch 4 --recompute 1" "1 4 --batch 2 --accum 2"; do
    set -- $split
    data=$1 chunk=$2 dir=run$1x$2
    shift 2
    run $((data * chunk)) $model $long "$@" --steps 10 --chunk-parallel $chunk --checkpoint-every 1 --out $dir
    name="data $data x chunk $chunk"
    result "$name: runs, and says how" "$([ $status = 0 ] || cat err
        grep -q "^processes: $((data * chunk)) = $data groups x $chunk slices, 1 thread" out || cat out)"
    result "$name: losses" "$(same_losses $dir one)"
    result "$name: gradients" "$(compare "$(checkpoint $dir 1)" "$(checkpoint one 1)")"
    result "$name: weights after 5 steps" \
        "$(compare "$(checkpoint $dir 5)" "$(checkpoint one 5)" "$(checkpoint start 1)")"
done

# Documents of many sequences (they end with a z) and carried states: the same, also resumed
seq 1 2000 | sed 's/37$/z/' > books.txt
books="$(echo $model | sed s/text.txt/books.txt/) $long --eod 122 --carry 1 --steps 12 --checkpoint-every 6"
"$program" $books --batch 4 --out books > out
for split in "1 3 --batch 4" "2 2 --batch 1 --accum 2" "2 1 --batch 1 --accum 2"; do
    set -- $split
    data=$1 chunk=$2 dir=books$1x$2
    shift 2
    run $((data * chunk)) $books "$@" --chunk-parallel $chunk --out $dir
    result "data $data x chunk $chunk, carried states: losses" "$([ $status = 0 ] || cat err; same_losses $dir books)"
done
mkdir carried && cp "$(checkpoint books2x1 6)" books2x1/log.tsv carried
run 3 --resume carried --chunk-parallel 3 --batch 2 --accum 2
result "carried states of 2 ranks, resumed on 3" "$([ $status = 0 ] || cat err; same_losses carried books)"

for ranks in 2 3 4; do
    timeout 60 mpirun -np $ranks "$test" $flags --chunk-parallel $ranks "$dump" > out 2> err
    result "the dump in $ranks slices" "$([ $? = 0 ] || grep -v ^ok out err)"
    result "and one line a tensor" "$([ "$(grep -c '^ok .* grad.embed.weight ' out)" = 1 ] || cat out)"
    timeout 60 mpirun -np $ranks "$test" $flags --chunk-parallel $ranks --break grad.layers.0.mega.cema.alpha "$dump" > out 2> err
    result "in $ranks slices, broken" "$([ $? = 1 ] && grep -q '^overall okay: 0' out || tail -n 1 out)"
done

# Resumed on other numbers of ranks: each goes on from the checkpoint of step 5
for from in run2x2 run1x3 one; do
    case $from in run2x2) flags="3 --chunk-parallel 3 --batch 4" ;; run1x3) flags="2 --batch 2" ;;
                  one) flags="4 --chunk-parallel 2 --batch 2" ;; esac
    mkdir "again_$from"
    cp "$(checkpoint $from 5)" $from/log.tsv "again_$from"
    set -- $flags
    ranks=$1
    shift
    run "$ranks" --resume "again_$from" "$@"
    result "$from, resumed on $ranks ranks" "$([ $status = 0 ] || cat err; same_losses "again_$from" one
        compare "$(checkpoint "again_$from" 10)" "$(checkpoint one 10)" "$(checkpoint start 1)")"
done

# A run that is resumed on the same number of ranks goes on with the same bits
for slices in 1 2 4; do
    dir=straight$slices
    run 4 $model $long --batch 1 --steps 12 --checkpoint-every 6 --chunk-parallel $slices --out $dir
    cp -r $dir again && rm "$(checkpoint $dir 12)"
    run 4 --resume $dir --chunk-parallel $slices
    cut -f1-4 again/log.tsv > log1; cut -f1-4 $dir/log.tsv > log2
    result "4 ranks, $slices slices, resumed: the same bits" "$([ "$status" = 0 ] || cat err
        [ "$(wc -l < log1)" = 13 ] || cat log1
        diff log1 log2; cmp "$(checkpoint again 12)" "$(checkpoint $dir 12)" 2>&1)"
    rm -r again
done

# A rank that is killed, one that is asked to stop, and one that fails
mpirun -np 3 "$program" $model $long --batch 4 --steps 1000000 --chunk-parallel 3 --checkpoint-every 1 --out killed > out 2> err &
appears "$(checkpoint killed 3)" 0
kill -9 "$(rank_pids | tail -n 1)"
before=$(date +%s)
wait $!
status=$?
result "kill -9 of a rank ends the job, with a message" \
    "$([ $status != 0 ] && [ $(($(date +%s) - before)) -lt 60 ] && cat out err | grep -q 'signal 9' ||
        echo "exit status $status, $(cat out err)")"
last=$(ls killed | sed -n 's/^step_0*\([0-9]*\).safetensors$/\1/p' | tail -n 1)
run 1 --resume killed --steps $((last + 2))
result "the last checkpoint resumes" "$([ $status = 0 ] && [ -e "$(checkpoint killed $((last + 2)))" ] || cat err)"
mpirun -np 2 "$program" $model $long --batch 4 --steps 1000000 --out stopped > out 2> err &
appears stopped/log.tsv 4
kill -TERM "$(rank_pids | tail -n 1)"
wait $!
status=$? last=$(tail -n 1 stopped/log.tsv | cut -f1)
result "SIGTERM to one rank: all save and stop" \
    "$([ $status = 0 ] && [ -e "$(checkpoint stopped "$last")" ] || echo "exit status $status, $(ls stopped) $(cat err)")"
refuses 'step [0-9]*: loss' 2 $model $long --steps 50 --lr 1000 --out diverged

# Refusals, by all ranks at once
refuses '36 tokens over --chunk-parallel 2: 18 each.*chunk_size 4' 2 $model --seq 36 --chunk-parallel 2
refuses '50 tokens over --chunk-parallel 4: 12.5 each.*chunk_size 4' 4 $model --seq 50 --chunk-parallel 4
refuses '--chunk-parallel 2: .*divides.*3' 3 $model $long --chunk-parallel 2
refuses '--chunk-parallel 2: .*divides.*1' 1 $model $long --chunk-parallel 2
refuses 'unknown option "--chunks"' 2 $model --chunks 2 --seq 48
run 2 --resume one --eval text.txt
result "--eval on two ranks prints once" "$([ $status = 0 ] && [ "$(grep -c ^eval: out)" = 1 ] || cat out err)"

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
