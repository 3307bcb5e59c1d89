#!/usr/bin/env bash
# On a machine with 2 GPUs: the distributed tests on NCCL, every strategy on the quickstart, one full-size step.
#   bash launch/gpu_check.sh OUTPUT_DIR
# Uses the Python environment at hand, which has the project's dependencies.
set -uo pipefail
out=${1:?usage: launch/gpu_check.sh OUTPUT_DIR}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" WANDB_MODE=${WANDB_MODE:-offline}
mkdir -p "$out"
failed=0
DS_LVXATTN_TEST_BACKEND=nccl python3 -m pytest tests/test_sp_attention.py tests/test_traffic.py tests/test_operators.py \
  --timeout 200 2>&1 | tee "$out/tests.txt" | tail -n 15 || failed=1
python3 train/compare.py --ds_config ds_configs/quickstart.json --steps "${STEPS:-60}" --num_gpus 2 \
  --strategies lv_xattn,lv_xattn:ring,ulysses,ring,auto,single --output_dir "$out/compare" || failed=1
python3 -m deepspeed.launcher.runner --num_gpus 2 benchmarks/full_size.py --ds_config ds_configs/zero3.json \
  --frames "${FRAMES:-8,32,64,96,128}" --output "$out/full_size.json" 2>&1 | tail -n 12
exit $failed
