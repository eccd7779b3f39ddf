#!/bin/sh
# Installs the Slurm that the tests start, on Debian and its kin; does nothing where it is there. Starts no service.
set -eu
PATH="$PATH:/usr/local/sbin:/usr/sbin"
needed="munged slurmctld slurmd srun sbatch squeue scancel"
packages="slurm-wlm munge"

missing=""
for name in $needed; do
    command -v "$name" >/dev/null || missing="$missing $name"
done
if [ -z "$missing" ]; then
    echo "Slurm is installed: $(slurmctld -V)"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "setup-cluster: no apt-get here; install Slurm and munge by hand, so that these are found:$missing" >&2
    exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "setup-cluster: needs root once; run: sudo apt-get install --no-install-recommends $packages" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $packages
echo "Slurm is installed: $(slurmctld -V)"
