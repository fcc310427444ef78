#!/usr/bin/env bash
# Prepares the data of a config on a Slurm cluster: Ray over all nodes of the job, one worker per GPU.
#
#     rac3 encoders CONFIG ... --workdir DIR               first, on one GPU
#     sbatch --nodes 8 launch/slurm.sh CONFIG ... --workdir DIR
#
# All nodes must share the file system of the config, the data, DIR, and the environment with rac3[ray] (Ray 2.49 or
# later). A job that hits its time limit resumes where it stopped when it is submitted again.
#SBATCH --job-name=rac3-prepare
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail

address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):6379
if ray get-auth-token --generate >/dev/null 2>&1; then # if this Ray supports tokens: in the shared home folder
    export RAY_AUTH_MODE=token
fi

# Starts Ray on every node, runs the command on the first one once all have joined, then stops Ray.
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_ON_NODE" -- \
    rac3 prepare "$@" --executor ray --ray.address "$address"
