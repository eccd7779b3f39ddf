#!/bin/sh
# Installs what some tests start, on Debian and its kin; does nothing where it is there. Starts no service.
#   tests/install.sh TARGET "COMMANDS" "PACKAGES"    the target of the Makefile, what must be found, where it is from
set -eu
PATH="$PATH:/usr/local/sbin:/usr/sbin"
target="$1" needed="$2" packages="$3"

missing=""
for name in $needed; do
    command -v "$name" >/dev/null || missing="$missing $name"
done
if [ -z "$missing" ]; then
    echo "$target: installed are $needed"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "$target: no apt-get here; install $packages by hand, so that these are found:$missing" >&2
    exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "$target: needs root once; run: sudo apt-get install --no-install-recommends $packages" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $packages
echo "$target: installed are now $needed"
