#!/usr/bin/env bash
# A real `sky launch` of sky/train.yaml, by hand: two nodes of a small SLURM on this machine stand for the cloud, shared
# folders for the buckets. Trains, is cancelled, goes on with one node, finishes. About five minutes.
#
#   PYTHON=.venv/bin/python SKY=~/skypilot-venv/bin/sky tests/sky/launch_on_slurm.sh
#
# Needs root on Debian or Ubuntu, uv and SkyPilot 0.14 (a virtual environment of its own is best), /usr/bin/python3 of the
# same version as PYTHON, and a python3.10 with its library (PYTHON310: its prefix; SkyPilot would download one). Changed beyond its folder, and put back at the end: a user skytest, /etc/hosts,
# /usr/local/bin/python3.10, /etc/ld.so.conf.d. The task's resources and mounts are replaced; setup and run are not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=$(command -v "${PYTHON:-.venv/bin/python}"); SKY=$(command -v "${SKY:-sky}"); UV=${UV:-$(dirname "$SKY")/uv}
SLURM=${SLURM:-tests/slurm}; user=skytest; cluster=skytest$RANDOM
fail() { echo "error: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "expected root, got $(id -un)"
[ -x "$UV" ] || fail "expected uv beside sky, got none; set UV"
[ -x "${PYTHON310:-}/bin/python3.10" ] || fail "expected PYTHON310 to be the prefix of a Python 3.10"
for file in "$SLURM/start.sh" /usr/sbin/sshd; do [ -x "$file" ] || fail "expected $file"; done
command -v rsync slurmctld >/dev/null || fail "expected rsync and slurmctld"
id "$user" 2>/dev/null && fail "the user $user exists already"
dir=$(mktemp -d /tmp/sky-launch.XXXXXX); chmod 755 "$dir"
free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

down() {
  set +e
  [ -z "${HOME_OF_SKY:-}" ] || { "$SKY" down -y "$cluster"; "$SKY" api stop; } >"$dir/down.log" 2>&1
  "$SLURM/stop.sh" "$dir/slurm"
  for pid in $(cat "$dir"/*.pid 2>/dev/null) $(ps -u "$user" -o pid= 2>/dev/null); do kill "$pid" 2>/dev/null; done
  sleep 1
  for pid in $(ps -u "$user" -o pid= 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
  userdel "$user" 2>/dev/null
  [ ! -e "$dir/linked" ] || { rm -f /usr/local/bin/python3.10 /etc/ld.so.conf.d/zz-skytest.conf; ldconfig; }
  [ -n "${KEEP:-}" ] && echo "kept: $dir" || rm -rf "$dir"
}
trap down EXIT

# a cluster, its login user, sshd for SkyPilot
"$SLURM/start.sh" "$dir/slurm"
. "$dir/slurm/env.sh"
useradd -m -d "$dir/home" -s /bin/bash -p '*' "$user"   # no password; a locked account is refused by sshd
ssh-keygen -q -t ed25519 -N '' -f "$dir/host"
ssh-keygen -q -t ed25519 -N '' -f "$dir/id"
install -d -m 700 -o "$user" -g "$user" "$dir/home/.ssh"
install -m 600 -o "$user" -g "$user" "$dir/id.pub" "$dir/home/.ssh/authorized_keys"
port=$(free_port); mkdir -p /run/sshd
cat >"$dir/sshd_config" <<CONF
Port $port
ListenAddress 127.0.0.1
HostKey $dir/host
PidFile $dir/sshd.pid
AuthorizedKeysFile .ssh/authorized_keys
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
SetEnv SLURM_CONF=$SLURM_CONF UV_SYSTEM_CERTS=true UV_NATIVE_TLS=true
CONF
/usr/sbin/sshd -f "$dir/sshd_config"

# what SkyPilot's runtime on a node would download: Python 3.10, and uv into each cluster's own home
if ! command -v /usr/local/bin/python3.10 >/dev/null; then
  cp -a "$PYTHON310" "$dir/python310"; chmod -R a+rX "$dir/python310"; touch "$dir/linked"
  echo "$dir/python310/lib" >/etc/ld.so.conf.d/zz-skytest.conf; ldconfig
  ln -s "$dir/python310/bin/python3.10" /usr/local/bin/python3.10
fi
cp "$UV" "$dir/uv"; chmod 755 "$dir/uv"
(while [ -d "$dir/home" ]; do
  for home in "$dir"/home/.sky_clusters/*/; do
    [ ! -d "$home" ] || [ -x "$home.local/bin/uv" ] || {
      install -d -o "$user" -g "$user" "$home.local" "$home.local/bin"
      install -o "$user" -g "$user" -m 755 "$dir/uv" "$home.local/bin/uv"; }
  done; sleep 0.1; done) </dev/null >/dev/null 2>&1 &
echo $! >"$dir/uv.pid"

# the training's environment: this one's packages under a Python that the user may run
/usr/bin/python3 -m venv --without-pip "$dir/venv"
site=$("$dir/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$PYTHON" -c 'import sys; [print(f"import site; site.addsitedir({p!r})") for p in sys.path if p.endswith("-packages")]' \
  >"$site/tests.pth"
su "$user" -c "$dir/venv/bin/python -c 'import torch, dinov2_custom'" || fail "expected $user to be able to import torch"

# 24 images in two tars
"$PYTHON" - "$dir/shards" <<'PY'
import io, sys, tarfile
from pathlib import Path
import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
Path(sys.argv[1]).mkdir()
for shard in range(2):
    with tarfile.open(f"{sys.argv[1]}/{shard}.tar", "w") as archive:
        for i in range(12):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(file, "png")
            member = tarfile.TarInfo(f"{i}.png")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
PY
# the task: other machines, no mount; setup, run and the rest as they are
install -d -m 777 "$dir/checkpoints"
"$PYTHON" - "$dir" <<'PY'
import sys
import yaml
from tests.train.batches import TINY

task = yaml.safe_load(open("sky/train.yaml"))
task["resources"] = {"infra": "slurm/sandbox", "cpus": 2, "memory": 2}
del task["file_mounts"]
length = ["train.OFFICIAL_EPOCH_LENGTH=600", "optim.epochs=1", "optim.warmup_epochs=0.1", "checkpointing.period=5"]
task["envs"] |= {
    "RUN_NAME": "run-1", "DATA": "unused", "CHECKPOINTS": "unused", "DATASET": f"Tar:path={sys.argv[1]}/shards",
    "CHECKPOINT_DIR": f"{sys.argv[1]}/checkpoints", "VENV": f"{sys.argv[1]}/venv", "CONFIG": "configs/vits.yaml",
    "GLOBAL_BATCH": 8, "OVERRIDES": " ".join([*TINY, *length, "train.num_workers=0"]),
    "WANDB_MODE": "offline", "OMP_NUM_THREADS": 1,
}  # fmt: skip
yaml.safe_dump(task, open(f"{sys.argv[1]}/task.yaml", "w"))
PY

# SkyPilot's own home
export HOME_OF_SKY=$dir/skyhome
mkdir -p "$HOME_OF_SKY/.slurm" "$HOME_OF_SKY/.sky/catalogs/v8/common"
export HOME=$HOME_OF_SKY SKYPILOT_DISABLE_USAGE_COLLECTION=1 WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567
printf 'Host sandbox\n HostName 127.0.0.1\n Port %s\n User %s\n IdentityFile %s\n' "$port" "$user" "$dir/id" \
  >"$HOME/.slurm/config"
echo 'allowed_clouds: [slurm]' >"$HOME/.sky/config.yaml"
printf 'AcceleratorName,Clouds\nH100,"['"'Slurm'"']"\n' >"$HOME/.sky/catalogs/v8/common/accelerators.csv"
printf 'GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\n' >"$HOME/.sky/catalogs/v8/common/metadata.csv"

say() { echo "== $(date -u +%T) $*"; }
run=$dir/checkpoints/run-1

say "sky launch: two nodes"
"$SKY" launch -y -d -c "$cluster" --num-nodes 2 --secret WANDB_API_KEY "$dir/task.yaml" >"$dir/launch.log" 2>&1 ||
  { tail -n 40 "$dir/launch.log"; fail "sky launch failed"; }
for _ in $(seq 600); do [ -e "$run/last_checkpoint" ] && break; sleep 0.5; done
[ -e "$run/last_checkpoint" ] || { "$SKY" logs --no-follow "$cluster" || true; fail "no checkpoint came"; }
say "checkpoint: $(cat "$run/last_checkpoint"); sky cancel"
"$SKY" cancel -y -a "$cluster" >>"$dir/launch.log" 2>&1
[ ! -e "$run/model_final" ] || fail "the run had ended before it could be cancelled"

say "sky exec: one node goes on"
code=0; "$SKY" exec -c "$cluster" --num-nodes 1 --secret WANDB_API_KEY "$dir/task.yaml" >"$dir/exec.log" 2>&1 || code=$?
[ "$code" = 0 ] || { tail -n 40 "$dir/exec.log"; fail "sky exec ended with $code"; }

# what has to be true now
grep -q "resumed from=" "$dir/exec.log" || fail "the second run did not resume"
grep -q "4 per process x 2 processes x 1 accumulated = 8" "$run/logs/log.txt" || fail "no run on two nodes in the log"
grep -q "4 per process x 1 processes x 2 accumulated = 8" "$run/logs/log.txt" || fail "no run on one node in the log"
"$PYTHON" -c "
import json, sys
rows = [json.loads(line)['iteration'] for line in open('$run/training_metrics.json')]
sys.exit(rows != sorted(set(rows)) or rows[-1] != 599)" || fail "training_metrics.json is not in order"
[ "$(cat "$run/logs/wandb_run_id")" = run-1 ] || fail "another W&B id"
! grep -rqF -e "$WANDB_API_KEY" "$run" "$dir/launch.log" "$dir/exec.log" || fail "a secret was written"
say "done: $(ls -d "$run/model_final"), $(wc -l <"$run/training_metrics.json") rows, W&B id run-1, no secret in a file"
