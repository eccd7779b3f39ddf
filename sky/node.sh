# Sourced by the `run` of every task: the environment that setup.sh made, and no empty keys.
set -euo pipefail
export PATH="${DUAL_POLICY_VENV:-$HOME/.dual-policy}/bin:$PATH"
# What was not given is empty, which a client would take for a key.
for name in "${!WANDB_@}" "${!AWS_@}" METTA_HOURLY_COST; do
  if [ -z "${!name:-}" ]; then unset "$name"; fi
done
# One process per GPU, on a node without one a single process.
processes="${SKYPILOT_NUM_GPUS_PER_NODE:-0}"
if [ "$processes" -lt 1 ]; then processes=1; fi
# What SkyPilot puts behind `run`, to wait for the uploads of a mounted bucket, has commands that fail.
set +euo pipefail
