#!/usr/bin/env bash
# What the SLURM tests need from Debian or Ubuntu; does nothing when it is there, or without root. Nothing is started.
set -euo pipefail
command -v slurmctld slurmd munged modulecmd >/dev/null 2>&1 && exit 0
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && [ -d /usr/share/modules ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "no SLURM and no root with apt-get to install it: the tests in tests/slurm are skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "apt-get update failed" >&2
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends slurm-wlm munge environment-modules \
  >/dev/null || echo "slurm-wlm could not be installed: the tests in tests/slurm are skipped" >&2
