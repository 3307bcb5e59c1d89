#!/usr/bin/env bash
# On a machine with a GPU: the tests of the kernels at full lengths, the machine's profile, their errors and their speed.
#   bash launch/kernel_check.sh OUTPUT_DIR
# Uses the Python environment at hand, which has the project's dependencies.
set -uo pipefail
out=${1:?usage: launch/kernel_check.sh OUTPUT_DIR}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
failed=0
python3 -m pytest tests/kernels 2>&1 | tee "$out/tests.txt" | tail -n 15 || failed=1
torchrun --nproc_per_node 1 -m ds_lvxattn.calibrate --layouts 32/8/128,8/8/64,16/16/80 --output "$out/profile.json" || failed=1
python3 benchmarks/kernels.py --check --profile "$out/profile.json" --output "$out/kernels.json" 2>&1 | tee "$out/kernels.txt" || failed=1
exit $failed
