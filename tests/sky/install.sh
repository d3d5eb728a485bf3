#!/usr/bin/env bash
# What the tests of mounted buckets need from Debian or Ubuntu; does nothing when it is there, or without root.
set -euo pipefail
command -v rclone >/dev/null && command -v fusermount3 >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "no rclone or fuse3, and no root with apt-get to install them: tests in tests/sky are skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "apt-get update failed" >&2
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends rclone fuse3 >/dev/null ||
  echo "rclone and fuse3 could not be installed: tests in tests/sky are skipped" >&2
