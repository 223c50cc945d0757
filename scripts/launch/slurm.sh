#!/usr/bin/env bash
# Runs one training run on several SLURM nodes, one process per GPU: sbatch scripts/launch/slurm.sh CONFIG OUTPUT_DIR [...]
#
# The processes find each other. Before the time limit SLURM sends SIGTERM, all processes save the same step, and the job
# requeues itself and continues. Only the first process uses output_dir; all of them read the data and the base model.
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
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM # to the processes of srun: srun itself would kill them
code=0
wait $running || code=$?
while kill -0 $running 2>/dev/null; do # SIGTERM ends the first wait
  code=0
  wait $running || code=$?
done
# Exit code 2: the user must change something. Otherwise requeue until there is an adapter: after SIGTERM the code is 0.
if [[ $code -ne 2 && ! -d $output/adapter ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
