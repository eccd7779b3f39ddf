#!/usr/bin/env bash
# Trains here against a policy:
#
#   recipes/dual_policy_checkpoint.sh [URI] [STEPS] [WORKERS] [key=value ...]
#
# URI: path, wandb://, s3:// or builtin:// (else DUAL_POLICY_NPC_URI, else builtin://arena/medium); a path with an = in
# it begins with ./ or /. STEPS: learner steps (two million). WORKERS: processes of a foreign env. Whatever follows goes
# to `dual-policy train` as it is, for example run=first (the run stands in train_dir/first, else in train_dir/default).
#
# Then:
#
#   dual-policy report train_dir/first --open     how it went (the run has written train_dir/first/report.html)
#   dual-policy replay train_dir/first --open     how it plays
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/words.sh"

help_if_asked "$@"
take_positions "$@"
exec "$program" train "${words[@]}" ${rest[@]+"${rest[@]}"}
