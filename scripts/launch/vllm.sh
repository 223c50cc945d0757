#!/usr/bin/env bash
# Serves a base model and its adapters with vLLM: scripts/launch/vllm.sh BASE NAME=DIR [NAME=DIR ...] [-- VLLM_OPTION ...]
#
# The model names are those of `jlora serve`: base, and the names of the adapters. Export adapters with --for vllm first.
# RANK is the largest rank among them (16). Over several machines of a Ray cluster, run it on the head node, with
# `-- --distributed-executor-backend ray --tensor-parallel-size 8 --pipeline-parallel-size 2`.
set -euo pipefail
base=$1
shift
adapters=()
while [[ $# -gt 0 && $1 != -- ]]; do
  adapters+=("$1")
  shift
done
exec vllm serve "$base" --served-model-name base --port "${PORT:-8000}" --enable-lora --max-lora-rank "${RANK:-16}" \
  --max-loras "${#adapters[@]}" --lora-modules "${adapters[@]}" "${@:2}"
