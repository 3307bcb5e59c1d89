#!/usr/bin/env bash
# Fine-tune on several nodes that share this folder.
#   with a hostfile ("node1 slots=8" a line, passwordless ssh):
#     HOSTFILE=hostfile bash launch/multi_node.sh DS_CONFIG [arguments of train/finetune.py]
#   under SLURM, from sbatch or salloc with one task a node:
#     sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 launch/multi_node.sh DS_CONFIG [arguments ...]
# Nothing is installed from here: make the environment once, with bash launch/environment.sh, on a disk that all nodes
# share, or set ENVIRONMENT=active for the environment or container of the job.
set -euo pipefail
config=${1:?usage: launch/multi_node.sh DS_CONFIG [arguments of train/finetune.py]}
shift
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source launch/environment.sh
ENVIRONMENT=${ENVIRONMENT:-ready} prepare_environment quickstart
port=${MASTER_PORT:-29500}
if [ -n "${SLURM_JOB_ID:-}" ]; then
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # One launcher a node, told its place by SLURM, so that no ssh is needed; the hostfile names the nodes.
  export CONFIG=$config FIRST=$first PORT=$port HOSTS="$PWD/.hostfile.$SLURM_JOB_ID"
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=${SLURM_GPUS_ON_NODE:?give --gpus-per-node}/" > "$HOSTS"
  trap 'rm -f "$HOSTS"' EXIT
  srun --kill-on-bad-exit=1 bash -c 'deepspeed --hostfile "$HOSTS" --no_ssh --node_rank "$SLURM_NODEID" \
    --master_addr "$FIRST" --master_port "$PORT" train/finetune.py --ds_config "$CONFIG" "$@"' launch "$@"
else
  deepspeed --hostfile "${HOSTFILE:?set HOSTFILE, or run under SLURM}" --master_port "$port" \
    train/finetune.py --ds_config "$config" "$@"
fi
