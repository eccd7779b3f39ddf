#!/usr/bin/env bash
# Trains here against a policy:
#
#   recipes/dual_policy_checkpoint.sh [URI] [STEPS] [WORKERS] [key=value ...]
#
# URI: path, wandb://, s3:// or builtin:// (else DUAL_POLICY_NPC_URI, else builtin://arena/medium); a path with an = in
# it begins with ./ or /. STEPS: learner steps. WORKERS: processes of a foreign env. Whatever follows goes to
# `dual-policy train` as it is.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/words.sh"

take_positions "$@"
exec "$program" train "${words[@]}" ${rest[@]+"${rest[@]}"}
