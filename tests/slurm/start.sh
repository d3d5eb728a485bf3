#!/usr/bin/env bash
# A SLURM of three nodes on this machine for the tests: private munge key, ports, state and node names; no systemd.
#
#   tests/slurm/start.sh DIR [PID] && . DIR/env.sh        ...        tests/slurm/stop.sh DIR
#
# With PID it stops by itself when that process is gone, however it ended.
# Needs root and the packages slurm-wlm and munge (tests/slurm/install.sh). Partitions: low (default; its jobs are
# requeued when the partition hard wants the nodes, after GRACE seconds), hard, and hidden (nobody may use it).
set -euo pipefail
dir=$(realpath -m "$1"); grace=${GRACE:-25}
[ ! -e "$dir" ] || { echo "$dir exists" >&2; exit 1; }
mkdir -p "$dir"/{state,log,pid,munge}
chmod 755 "$dir" "$dir/munge"

# five free ports below those the system hands out to clients
ports=($(python3 - <<'PY'
import random
import socket

found = []
while len(found) < 4:
    port = random.randrange(20000, 32000)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    found.append(port)
print(*found)
PY
))
prefix=dino$((RANDOM % 90 + 10))n # the nodes of two such clusters have different names
host=$(hostname -s)

head -c 1024 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
for n in 0 1; do # stand-ins for GPUs: SLURM sets CUDA_VISIBLE_DEVICES for character devices only
  mknod "$dir/gpu$n" c 1 3 2>/dev/null || : >"$dir/gpu$n"
done
echo "Name=gpu File=$dir/gpu[0-1] Flags=nvidia_gpu_env" >"$dir/gres.conf"

{
  cat <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/pid/slurmctld
SlurmdPidFile=$dir/pid/slurmd-%n
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
ReturnToService=2
FirstJobId=$((RANDOM % 9000 + 1000))
PropagateResourceLimits=NONE
GresTypes=gpu
CONF
  for n in 1 2 3; do
    echo "NodeName=$prefix$n NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$n]} CPUs=8 RealMemory=4000 Gres=gpu:2"
  done
  echo "PartitionName=low Nodes=ALL Default=YES MaxTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace"
  echo "PartitionName=hard Nodes=ALL MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF"
  echo "PartitionName=hidden Nodes=ALL AllowAccounts=nobody"
} >"$dir/slurm.conf"
echo "export SLURM_CONF=$dir/slurm.conf" >"$dir/env.sh"
echo "$prefix" >"$dir/node_prefix"
( # torch meets at the first node's name
  flock 9
  for n in 1 2 3; do echo "127.0.0.1 $prefix$n # tests/slurm"; done >>/etc/hosts
) 9</etc/hosts

. "$dir/env.sh"
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/pid/munged" \
  --log-file="$dir/log/munged" --seed-file="$dir/munge/seed" 2>>"$dir/log/munged.err"
slurmctld -c -f "$SLURM_CONF"
for n in 1 2 3; do
  mkdir "$dir/spool-$prefix$n"
  slurmd -N "$prefix$n" -f "$SLURM_CONF"
done
if [ -n "${2:-}" ]; then
  setsid bash -c 'while [ -d "$1" ] && kill -0 "$2" 2>/dev/null; do sleep 1; done; "$3" "$1"' watch "$dir" "$2" \
    "$(dirname "$(realpath "$0")")/stop.sh" </dev/null >/dev/null 2>&1 &
fi
for _ in $(seq 150); do
  [ "$(sinfo -h -N -p low -t idle 2>/dev/null | wc -l)" = 3 ] && exit 0
  sleep 0.1
done
echo "SLURM did not come up:" >&2
tail -n 20 "$dir"/log/* >&2
exit 1
