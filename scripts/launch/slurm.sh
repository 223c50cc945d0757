#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster, one process a GPU: sbatch scripts/launch/slurm.sh CONFIG [--config.K=V ...]
#
# The processes find each other. SLURM's notice before the end of the time makes them save the same step; the job then
# queues itself again and goes on there. output_dir is the first process's alone; all read the data and the base.
#SBATCH --job-name=jlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
config=$1
shift
srun .venv/bin/python -m jlora.train --config "$config" --config.resume_from_checkpoint=auto "$@" &
running=$!
trap 'stopped=yes; kill -TERM $running' TERM # srun tells its processes
wait $running || wait $running
if [[ -n "${stopped:-}" ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
