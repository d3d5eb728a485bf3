#!/usr/bin/env bash
# Stop what start.sh started in DIR and remove DIR: its jobs, and the daemons of its pid files, by number.
set -uo pipefail
dir=$(realpath -m "$1")
[ -f "$dir/env.sh" ] || exit 0
. "$dir/env.sh"

steps() { # step managers of this cluster
  for pid in $(pgrep -x slurmstepd); do
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" && echo "$pid"
  done
}
jobs=$(timeout 10 squeue -h -o %A | sort -u)
[ -z "$jobs" ] || { timeout 10 scancel --signal=KILL --full $jobs; timeout 10 scancel $jobs; } 2>/dev/null
for _ in $(seq 50); do [ -z "$(steps)" ] && break; sleep 0.1; done

pids=$(steps)
for file in "$dir"/pid/*; do
  daemon=$(basename "$file")
  pid=$(cat "$file") && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${daemon%%-*}" ] && pids+=" $pid"
done
[ -z "$pids" ] || kill $pids
for _ in $(seq 60); do
  left=$(for pid in $pids; do [ -d "/proc/$pid" ] && echo "$pid"; done)
  [ -z "$left" ] && break
  sleep 0.1
done
[ -z "$left" ] || kill -9 $left
prefix=$(cat "$dir/node_prefix")
( # in place: in a container the file is a mount
  flock 9
  hosts=$(grep -v " ${prefix}[123] # tests/slurm\$" /etc/hosts)
  echo "$hosts" >/etc/hosts
) 9</etc/hosts
rm -rf "$dir"
