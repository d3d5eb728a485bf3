#!/usr/bin/env bash
# Install what the SLURM tests need on Debian or Ubuntu, as root; nothing is configured or started.
set -euo pipefail
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null &&
  [ -d /usr/share/modules ] && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends slurm-wlm munge environment-modules >/dev/null
