#!/usr/bin/env bash
# What the tests of the data staging need from Debian or Ubuntu; does nothing when it is there, or without root.
set -euo pipefail
command -v rclone >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "no rclone and no root with apt-get to install it: the tests of the data staging are skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "apt-get update failed" >&2
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends rclone >/dev/null ||
  echo "rclone could not be installed: the tests of the data staging are skipped" >&2
