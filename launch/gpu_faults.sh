#!/usr/bin/env bash
# On a machine with 2 GPUs: ranks that are killed, stopped or raise, in a step, a save and an evaluation, under ZeRO 2
# and 3 with NCCL. Takes under 4 minutes.
#   bash launch/gpu_faults.sh OUTPUT_DIR
# Uses the Python environment at hand, which has the project's dependencies.
set -uo pipefail
out=${1:?usage: launch/gpu_faults.sh OUTPUT_DIR}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
rm -f "$out/faults.jsonl"
timeout 235 python3 -m benchmarks.campaign --gpu --output "$out/faults.jsonl" 2>&1 | tee "$out/faults.txt"
