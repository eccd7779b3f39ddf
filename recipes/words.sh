# Sourced by the recipes: the program, and [URI] [STEPS] [WORKERS] as overrides.

# With -h or --help as the first word: prints the comment at the head of the recipe, and ends.
help_if_asked() {
  if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' "$0"
    exit 0
  fi
}

program="$(command -v dual-policy || true)"
if [ -z "$program" ]; then # the environment that `make setup` makes
  program="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/dual-policy"
fi
if ! [ -x "$program" ]; then
  printf 'error: dual-policy is not installed; run `make setup` in the checkout\n' >&2
  exit 2
fi

# Whether a word is an option or an override (key=value, +key=value, ~key), and no position.
is_option() {
  [[ "$1" == -* || "$1" =~ ^[+~]*[A-Za-z_][A-Za-z0-9_./@]*= || "$1" == '~'[A-Za-z_]* ]]
}

# key="value" as Hydra reads any text.
override() {
  local value="${2//\"/\\\"}"
  printf '%s="%s"' "$1" "$value"
}

# Sets `words` from the positions and `rest` to what follows them.
take_positions() {
  local uri="${DUAL_POLICY_NPC_URI:-builtin://arena/medium}"
  words=(+dual_policy=checkpoint)
  if [ "$#" -gt 0 ] && ! is_option "$1"; then
    uri="${1:-$uri}"
    shift
  fi
  words+=("$(override trainer.dual_policy.checkpoint_npc.uri "$uri")")
  local key
  for key in trainer.total_timesteps trainer.num_workers; do
    if [ "$#" -gt 0 ] && ! is_option "$1"; then
      if ! [[ "$1" =~ ^[0-9][0-9_]*$ ]]; then
        printf 'error: %s stands where %s belongs, a whole number\n' "$1" "$key" >&2
        exit 2
      fi
      words+=("$key=${1//_/}")
      shift
    fi
  done
  rest=("$@")
}
