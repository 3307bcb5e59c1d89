#!/usr/bin/env bash
# Fine-tune on the GPUs of this node.
#   bash launch/single_node.sh DS_CONFIG [arguments of train/finetune.py]
# GPUS sets how many GPUs to use, all of them by default; MASTER_PORT the port, a free one by default.
set -euo pipefail
config=${1:?usage: launch/single_node.sh DS_CONFIG [arguments of train/finetune.py]}
shift
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment quickstart
# exec: a signal to this script is one to the launcher, with which the ranks end.
exec deepspeed ${GPUS:+--num_gpus "$GPUS"} --master_port "$(free_port)" train/finetune.py --ds_config "$config" "$@"
