#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster, one process a GPU: sbatch scripts/launch/slurm.sh CONFIG OUTPUT_DIR [...]
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
config=$1 output=$2
shift 2
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python -m jlora.train --config "$config" --config.output_dir="$output" --config.resume_from_checkpoint=auto "$@" &
running=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM # to srun's processes: srun itself would kill them
code=0
wait $running || code=$?
while kill -0 $running 2>/dev/null; do # the notice ends the first wait
  code=0
  wait $running || code=$?
done
# 2: something is to be changed. Else, until the adapter is there, it goes on: on SIGTERM the processes end with 0.
if [[ $code -ne 2 && ! -d $output/adapter ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
