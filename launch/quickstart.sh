#!/usr/bin/env bash
# Set up .venv and fine-tune the quickstart model on the needle task: 2 ranks, strategy chosen by the plan.
#   bash launch/quickstart.sh [further arguments of train/finetune.py]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment quickstart
if [ "${DS_ACCELERATOR:-}" != cpu ] && [ "$(nvidia-smi -L | wc -l)" -lt 2 ]; then
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1  # two ranks need two GPUs
fi
# exec: a signal to this script is one to the launcher, with which the ranks end.
exec deepspeed --num_gpus 2 --master_port "$(free_port)" train/finetune.py --ds_config ds_configs/quickstart.json \
  --output_dir "runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
