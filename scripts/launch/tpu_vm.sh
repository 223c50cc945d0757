#!/usr/bin/env bash
# Runs one training run on all workers of a TPU slice: scripts/launch/tpu_vm.sh NAME ZONE CONFIG [--config.KEY=VALUE ...]
#
# Copies this directory to all workers, installs it there (with uv, because the images have an old Python), and starts
# the same command on each; they find each other. Only the first worker writes output_dir. If started again, it continues
# where it stopped, even on a slice of another size: keep output_dir on a disk or bucket that the first worker mounts.
set -euo pipefail
name=$1 zone=$2 config=$3
shift 3
tpu() { gcloud compute tpus tpu-vm "$1" --zone="$zone" --worker=all "${@:2}"; }
packed=$(mktemp --suffix=.tar.gz)
trap 'rm "$packed"' EXIT
tar -czf "$packed" --exclude=.git --exclude=.venv --exclude=./output --exclude=./models -C "$(dirname "$0")/../.." .
tpu scp "$packed" "$name":jlora.tar.gz
tpu ssh "$name" --command="
  set -e
  mkdir -p jlora && tar -xzf jlora.tar.gz -C jlora && cd jlora
  python3 -m pip install --quiet --user uv
  [ -d .venv ] || python3 -m uv venv --quiet --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
  exec .venv/bin/python -m jlora.train --config $(printf '%q' "$config") --config.resume_from_checkpoint=auto ${*:+$(printf '%q ' "$@")}
"
