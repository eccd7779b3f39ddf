# The `setup` of every task: this checkout and what it needs, in an environment of its own on the node.
# On a restart nothing has changed, and nothing is done.
set -euo pipefail
if [ -n "${DUAL_POLICY_VENV:-}" ]; then # the node's image has everything
  venv="$DUAL_POLICY_VENV"
else
  venv="$HOME/.dual-policy"
  pins="$(pwd; cat pyproject.toml constraints.txt)"
  if [ "$(cat "$venv/.ready" 2>/dev/null || true)" != "$pins" ]; then
    uv="$(command -v uv || echo "$HOME/.local/bin/uv")" # SkyPilot brings one along
    if ! [ -x "$uv" ]; then
      python3 -m venv "$HOME/.dual-policy-uv"
      "$HOME/.dual-policy-uv/bin/pip" install --quiet uv==0.13.9
      uv="$HOME/.dual-policy-uv/bin/uv"
    fi
    "$uv" venv --quiet --allow-existing --python 3.11 "$venv"
    grep -v '^triton==' constraints.txt > "$venv/constraints.txt" # a torch for CUDA pins its own
    if [ -z "${UV_TORCH_BACKEND:-}" ]; then unset UV_TORCH_BACKEND; fi
    "$uv" pip install --quiet --python "$venv/bin/python" --constraints "$venv/constraints.txt" -e '.[wandb,s3]'
    printf '%s\n' "$pins" > "$venv/.ready"
  fi
fi
"$venv/bin/dual-policy" --version
