#!/usr/bin/env bash
# Trains in N processes on this machine, among which its GPUs are divided.
#
#     launch/local.sh N CONFIG ... --workdir DIR
#
# Ctrl-C and SIGTERM reach all of them: they save and end with 75. If one fails, the others have 10 seconds to end by
# themselves; the script ends with the code of the one that was first.
set -uo pipefail

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh N CONFIG ... --workdir DIR; N is the number of processes" >&2
    exit 2
fi
processes=$1
shift
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
if ((gpus % processes)); then
    echo "local.sh: $processes processes can't have equal shares of $gpus GPUs; use a divisor of $gpus" >&2
    exit 2
fi
coordinator=localhost:$((61440 + $$ % 4096))

asked= # to stop; the trap comes before the first process, which would outlive this script otherwise
left=0
trap 'asked=yes; kill -TERM $(jobs -pr) 2>/dev/null' INT TERM
for ((process = 0; process < processes; process++)); do
    [[ -z $asked ]] || break
    if ((gpus)); then
        CUDA_VISIBLE_DEVICES=$(seq -s, $((process * gpus / processes)) $(((process + 1) * gpus / processes - 1)))
        export CUDA_VISIBLE_DEVICES
    fi
    rac3 train "$@" --distributed.coordinator "$coordinator" --distributed.processes "$processes" \
        --distributed.process "$process" &
    ((left += 1))
done

((left)) || exit 143
while ((left)); do
    code=0
    wait -n -p ended || code=$?
    if [[ -z ${ended:-} ]]; then # a signal came, and no process has ended; or none is left to wait for
        ((code == 127)) && exit 143
        continue
    fi
    ((left--))
    ((code)) || continue
    for ((tenth = 0; tenth < 100; tenth++)); do
        [[ -n $(jobs -pr) ]] || break
        sleep 0.1
    done
    kill -KILL $(jobs -pr) 2>/dev/null
    wait
    exit "$code"
done
