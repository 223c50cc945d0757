#!/usr/bin/env bash
# One run on every worker of a Cloud TPU slice: scripts/launch/tpu_vm.sh NAME ZONE CONFIG [--config.KEY=VALUE ...]
#
# Copies this directory to all workers, installs it there, and starts the same command on each; they find each other.
# Only the first worker writes output_dir. Started again, it goes on where it stopped, on a slice of another size too:
# keep output_dir where a new slice finds it (a disk or a bucket that the first worker mounts), or copy it back there.
set -euo pipefail
name=$1 zone=$2 config=$3
shift 3
gcloud compute tpus tpu-vm scp --recurse --worker=all --zone="$zone" "$(dirname "$0")/../.." "$name":jlora
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  cd jlora
  python3 -m venv .venv
  .venv/bin/pip install --quiet -e '.[tpu]'
  exec .venv/bin/python -m jlora.train --config $(printf '%q' "$config") --config.resume_from_checkpoint=auto $(printf '%q ' "$@")
"
