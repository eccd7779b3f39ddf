#!/usr/bin/env bash
# Trains against a policy on a cloud, with SkyPilot:
#
#   recipes/dual_policy_sky.sh NAME [URI] [STEPS] [WORKERS] [--gpus=1 --dry-run ...] [key=value ...]
#
# NAME: of the run. The others as in dual_policy_checkpoint.sh; options are those of `dual-policy launch sky`.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/words.sh"

if [ "$#" -eq 0 ] || is_option "$1"; then
  printf 'error: the name of the run is missing; recipes/dual_policy_sky.sh NAME [URI] [STEPS] [WORKERS]\n' >&2
  exit 2
fi
name="$1"
shift
take_positions "$@"
exec "$program" launch sky train "${words[@]}" "$(override run "$name")" ${rest[@]+"${rest[@]}"}
