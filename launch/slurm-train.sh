#!/usr/bin/env bash
# Trains a config on a Slurm cluster: one process on each node, with all GPUs of the node.
#
#     sbatch --nodes 32 launch/slurm-train.sh CONFIG ... --workdir DIR
#
# Prepare the data first (launch/slurm.sh). All nodes must share the file system of the config, DIR, and the environment
# with rac3.
#
# Five minutes before the time limit, Slurm sends SIGTERM to all processes: they save the step they are in and end with
# code 75, and the job is queued again, to go on from there. The same happens after a process has stalled or died. A job
# that is done, that a defect ended (1) or that has bad input (2) stays ended. On preemption Slurm sends SIGTERM as well,
# and requeues the job itself; let the partition give a GraceTime in which your model can be saved.
#SBATCH --job-name=rac3-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -uo pipefail

# A process that fails tells the others, so they end by themselves; one that hangs is killed after a minute.
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --wait=60 rac3 train "$@"
code=$?

case $code in
    0 | 1 | 2) exit "$code" ;;
esac
if ((${SLURM_RESTART_COUNT:-0} >= 100)); then
    echo "slurm-train.sh: ended with code $code after 100 restarts; not queued again" >&2
    exit "$code"
fi
echo "slurm-train.sh: ended with code $code; queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
sleep 60 # until Slurm ends this script
