#!/usr/bin/env bash
# Run torchrun over all nodes, configured by SkyPilot's variables; every node runs this script. A run resumes from its latest
# checkpoint, also on a different number of GPUs, with the same global batch. Variables: the envs of the task, WANDB_API_KEY
# (secret, may be empty), VENV (default ~/dinov2-venv), CHECKPOINT_DIR (default ~/checkpoints), MASTER_PORT (default 29500).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 1; }
[[ ${RUN_NAME:-} =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] ||
  fail "expected RUN_NAME of letters, digits, '_', '-' and '.', got '${RUN_NAME:-}'; it names the folder and the W&B run"

wandb=()
if [ -n "${WANDB_API_KEY:-}" ]; then   # passed in the environment, because other users can read command lines
  export WANDB_RUN_ID=${WANDB_RUN_ID:-$RUN_NAME}
  wandb=(wandb.mode=online "wandb.name=$RUN_NAME")
else
  unset WANDB_API_KEY
fi

read -ra overrides <<<"${OVERRIDES:-}"
exec "${VENV:-$HOME/dinov2-venv}/bin/python" -m dinov2_custom.run.local \
  --nnodes "$SKYPILOT_NUM_NODES" --node_rank "$SKYPILOT_NODE_RANK" \
  --nproc_per_node $((SKYPILOT_NUM_GPUS_PER_NODE > 0 ? SKYPILOT_NUM_GPUS_PER_NODE : 1)) \
  --master_addr "$(head -n 1 <<<"$SKYPILOT_NODE_IPS")" --master_port "${MASTER_PORT:-29500}" \
  run/train/train.py --launcher inline --config-file "$CONFIG" --output-dir "${CHECKPOINT_DIR:-$HOME/checkpoints}/$RUN_NAME" \
  "train.dataset_path=$DATASET" "optim.global_batch=$GLOBAL_BATCH" ${wandb[@]+"${wandb[@]}"} ${overrides[@]+"${overrides[@]}"}
