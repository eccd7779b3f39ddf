#!/usr/bin/env bash
# Trains against a policy on a cloud, with SkyPilot:
#
#   recipes/dual_policy_sky.sh NAME [URI] [STEPS] [WORKERS] [--gpus=1 --dry-run ...] [key=value ...]
#
# NAME: of the run. URI: path, wandb://, s3:// or builtin:// (else DUAL_POLICY_NPC_URI, else builtin://arena/medium).
# STEPS: learner steps. WORKERS: processes of a foreign env. What follows are options and overrides of `dual-policy launch
# sky`; --dry-run shows the task and launches nothing.
#
# With trainer.sync_uri=s3://bucket/prefix/ the run's files stand under s3://bucket/prefix/NAME/, report.html too. Copied
# from there into train_dir/NAME:
#
#   dual-policy report train_dir/NAME --open     how it went
#   dual-policy replay train_dir/NAME --open     how it plays
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/words.sh"

help_if_asked "$@"
if [ "$#" -eq 0 ] || is_option "$1"; then
  printf 'error: the name of the run is missing; recipes/dual_policy_sky.sh NAME [URI] [STEPS] [WORKERS], or --help\n' >&2
  exit 2
fi
name="$1"
shift
take_positions "$@"
exec "$program" launch sky train "${words[@]}" "$(override run "$name")" ${rest[@]+"${rest[@]}"}
