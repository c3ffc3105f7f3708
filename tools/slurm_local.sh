#!/usr/bin/env bash
# slurm_local.sh - a real Slurm (munged + slurmctld + N slurmd [+ slurmdbd]) on loopback,
# in one folder, without systemd, as root or as an ordinary user.
#
#   slurm_local.sh install            apt-get the packages (root only)
#   slurm_local.sh fetch              without root: unpack the packages under SLURM_LOCAL_PREFIX
#   slurm_local.sh start              idempotent; returns when every node is idle
#   slurm_local.sh status             0 = all daemons up and all nodes usable
#   slurm_local.sh stop               idempotent; ends only the daemons/steps of this folder
#   slurm_local.sh env                prints "export SLURM_CONF=... PATH=..."; eval it
#   slurm_local.sh exec -- CMD...     start, run CMD with the env, stop, keep CMD's exit code
#   slurm_local.sh kill-node n2       end one slurmd (node-failure tests)
#   slurm_local.sh start-node n2      bring it back
#   slurm_local.sh logs               tails of all logs
#
# Settings (environment):
#   SLURM_LOCAL_DIR    state folder            (default /tmp/slurm_local.$UID)
#   SLURM_LOCAL_NODES  number of nodes         (2)
#   SLURM_LOCAL_CPUS   CPUs each node claims   (4; over-claiming is fine)
#   SLURM_LOCAL_MEM    MiB each node claims    (4000)
#   SLURM_LOCAL_GPUS   fake GPUs per node      (2)
#   SLURM_LOCAL_PORT   first port              (picked: a free block in 20000..29999)
#   SLURM_LOCAL_DBD    1 = slurmdbd + private mariadbd, so that sacct works (0)
#   SLURM_LOCAL_EXTRA  more lines for slurm.conf, e.g. "SlurmctldParameters=preempt_send_user_signal"
#                      (24.11 also takes "PreemptParameters=send_user_signal"; 22.05 calls that a fatal error)
#   SLURM_LOCAL_HOSTS  1 = as root, make the node names resolve: a marked line in /etc/hosts, gone at stop (1)
#   SLURM_LOCAL_ETC    1 = as root, link /etc/slurm/slurm.conf to ours where there is none, for tools that scrub
#                      SLURM_* from the environment of their jobs (snakemake does) (0)
#   SLURM_LOCAL_PREFIX root of unpacked .debs, for machines where apt-get is not ours ("" = /)
#   SLURM_LOCAL_WAIT   seconds to wait for idle (60)
set -u
umask 022
D=${SLURM_LOCAL_DIR:-/tmp/slurm_local.$(id -u)}
NN=${SLURM_LOCAL_NODES:-2} CPUS=${SLURM_LOCAL_CPUS:-4} MEM=${SLURM_LOCAL_MEM:-4000} GPUS=${SLURM_LOCAL_GPUS:-2}
DBD=${SLURM_LOCAL_DBD:-0} PFX=${SLURM_LOCAL_PREFIX:-} WAIT=${SLURM_LOCAL_WAIT:-60}
ME=$(id -un)
H=$(cat /proc/sys/kernel/hostname 2>/dev/null || hostname); H=${H%%.*}; H=${H:-localhost}
say() { printf 'slurm_local: %s\n' "$*" >&2; }
die() { say "ERROR: $*"; exit 1; }
export PATH="$PFX/usr/sbin:$PFX/usr/bin:$PATH:/usr/sbin:/sbin"
libdir=$PFX/usr/lib/$(uname -m)-linux-gnu
[ -n "$PFX" ] && export LD_LIBRARY_PATH="$libdir:$libdir/slurm-wlm:$libdir/slurm${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
nodes() { local i; for i in $(seq 1 "$NN"); do echo "n$i"; done; }
pick() { local c; for c in "$@"; do c=$(command -v "$c") && { echo "$c"; return; }; done; return 1; }

# ---------------------------------------------------------------- processes of this folder
alive() { case "$(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)" in ''|Z*|X*) return 1 ;; esac; } # a zombie is dead, though PID 1 may never reap it
environ() { { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null; }
pid_of() {  # name -> pid, only if it is alive and is really ours (guards against pid reuse)
  local p; p=$(cat "$D/run/$1.pid" 2>/dev/null) && [ -n "$p" ] && alive "$p" || return 1
  # slurmdbd takes no -f: it is known by the SLURM_CONF it was started with
  { tr '\0' ' ' <"/proc/$p/cmdline" | grep -qF -- "$D/"; } 2>/dev/null || environ "$p" | grep -qxF "SLURM_CONF=$D/etc/slurm.conf" || return 1
  echo "$p"
}
end_pid() {  # name [seconds]
  local p t=${2:-10} i; p=$(pid_of "$1") || { rm -f "$D/run/$1.pid"; return 0; }
  kill "$p" 2>/dev/null
  for i in $(seq 1 $((t * 10))); do alive "$p" || break; sleep 0.1; done
  alive "$p" && { say "$1 ($p) ignored TERM, KILL"; kill -9 "$p" 2>/dev/null; sleep 0.2; }
  rm -f "$D/run/$1.pid"
}
stepd_pids() { # [node]: slurmstepds of this folder, known by the slurmd log they hold open (their environ is blank)
  local p l; for p in /proc/[0-9]*; do
    [ "$(cat "$p/comm" 2>/dev/null)" = slurmstepd ] || continue
    for l in "$p"/fd/*; do case "$(readlink "$l" 2>/dev/null)" in "$D/log/slurmd-${1:-}"*.log) echo "${p#/proc/}"; break;; esac; done
  done
}
job_pids() { # [node]: job processes, known by SLURM_CONF and SLURM_JOB_ID in their environment
  local e env; for e in /proc/[0-9]*; do
    [ "${e#/proc/}" != $$ ] || continue
    env=$(environ "${e#/proc/}"); [ -n "$env" ] || continue
    grep -qxF "SLURM_CONF=$D/etc/slurm.conf" <<<"$env" || continue
    grep -q '^SLURM_JOB_ID=' <<<"$env" || continue
    [ -z "${1:-}" ] || grep -qx "SLURMD_NODENAME=$1" <<<"$env" || continue
    echo "${e#/proc/}"
  done 2>/dev/null
}
# ---------------------------------------------------------------- guards
guards() {
  local miss="" b
  for b in munged slurmctld slurmd sinfo scontrol sbatch; do command -v $b >/dev/null || miss="$miss $b"; done
  [ -z "$miss" ] || die "missing:$miss - as root: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge (or '$0 install')"
  if [ "$DBD" = 1 ]; then for b in slurmdbd sacct; do command -v $b >/dev/null || die "missing $b (SLURM_LOCAL_DBD=1)"; done
    pick mariadbd mysqld >/dev/null || die "missing mariadbd (apt-get install mariadb-server-core)"; fi
  [ ${#D} -le 80 ] || die "SLURM_LOCAL_DIR too long for a unix socket (${#D} > 80): $D"
  mkdir -p "$D" || die "cannot make $D"
  [ -O "$D" ] || die "$D is not owned by $ME"
  chmod 755 "$D"
  # munged refuses: any parent group/world-writable without sticky bit, or owned by another non-root
  # user, or (socket) not executable by all. Say so in plain words before munged does.
  local p=$D m o
  while :; do
    m=$(stat -c %a "$p") o=$(stat -c %u "$p")
    [ "$o" = 0 ] || [ "$o" = "$(id -u)" ] || die "munge will refuse: $p is owned by uid $o"
    [ $((8#$m & 8#022)) = 0 ] || [ $((8#$m & 8#1000)) != 0 ] || die "munge will refuse: $p is group/world-writable without sticky bit (mode $m)"
    [ $((8#$m & 1)) != 0 ] || die "munge will refuse: $p lacks o+x (mode $m)"
    [ "$p" = / ] && break; p=$(dirname "$p")
  done
  # loopback up?
  (exec 3<>/dev/tcp/127.0.0.1/1) 2>&1 | grep -qi 'unreachable' && die "loopback is down: ip link set lo up"
  local free; free=$(df -Pk "$D" | awk 'NR==2{print $4}'); [ "${free:-0}" -gt 102400 ] || die "less than 100 MiB free at $D"
  return 0
}
busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
pick_port() {
  local need=$((NN + 3)) b t i
  if [ -n "${SLURM_LOCAL_PORT:-}" ]; then
    for i in $(seq 0 $need); do ! busy $((SLURM_LOCAL_PORT + i)) || { say "port $((SLURM_LOCAL_PORT + i)) is in use"; return 1; }; done
    echo "$SLURM_LOCAL_PORT"; return
  fi
  for t in $(seq 1 50); do
    b=$((20000 + (RANDOM % 990) * 10)); for i in $(seq 0 $need); do busy $((b + i)) && continue 2; done
    echo "$b"; return
  done; return 1
}

# ---------------------------------------------------------------- configuration
write_conf() {
  local base=$1 ver maj i n plug=""
  ver=$(slurmctld -V | awk '{print $2}'); maj=${ver%.*}
  [ -n "$PFX" ] && { for plug in "$libdir/slurm-wlm" "$libdir/slurm"; do [ -e "$plug/auth_munge.so" ] && break; done; plug="PluginDir=$plug"; }
  mkdir -p "$D"/{etc,run,log,state,spool,dev,munge,db}
  # must be character devices, or slurmd logs "not a valid character or block device" and sets no CUDA_VISIBLE_DEVICES
  for i in $(seq 0 $((GPUS - 1))); do ln -sfn /dev/null "$D/dev/fakegpu$i"; done
  # every life of the cluster numbers its jobs from a new thousand: a job id that comes back makes
  # slurm-%j.out files, sacct records and submitit's result pickles of an earlier life look like this job's
  local life; life=$(($(cat "$D/.life" 2>/dev/null || echo 0) + 1)); echo "$life" >"$D/.life"
  cat >"$D/etc/slurm.conf" <<C
ClusterName=local
FirstJobId=$((life * 1000 + 1))
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=$base
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again (default 120 s); keep it well above KillWait,
# or the job comes back to a node where its old self still dies: "launch failed requeued held"
AuthInfo=socket=$D/munge/munge.socket.2,cred_expire=10
$(comm_params)
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
$plug
# no cgroups, no task binding: works in any container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# over-claiming CPUs/memory of the host is allowed
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=1,max_rpc_cnt=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# short timers: tests should not wait for a data centre's patience
KillWait=5
OverTimeLimit=0
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
ReturnToService=2
UnkillableStepTimeout=30
MailProg=/bin/true
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
C
  if [ "$DBD" = 1 ]; then cat >>"$D/etc/slurm.conf" <<C
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((base + 1))
AccountingStoragePass=$D/munge/munge.socket.2
AccountingStorageTRES=gres/gpu
C
  else echo "AccountingStorageType=accounting_storage/none" >>"$D/etc/slurm.conf"; fi
  i=2
  for n in $(nodes); do i=$((i + 1))
    echo "NodeName=$n NodeHostname=$H NodeAddr=127.0.0.1 Port=$((base + i)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"
  done >>"$D/etc/slurm.conf"
  cat >>"$D/etc/slurm.conf" <<C
PartitionName=gpu  Nodes=n[1-$NN] Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=cpu  Nodes=n[1-$NN] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low  Nodes=n[1-$NN] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
C
  [ -z "${SLURM_LOCAL_EXTRA:-}" ] || printf '%s\n' "$SLURM_LOCAL_EXTRA" >>"$D/etc/slurm.conf"
  if [ "$GPUS" -gt 0 ]; then
    echo "NodeName=n[1-$NN] Name=gpu File=$D/dev/fakegpu[0-$((GPUS - 1))]" >"$D/etc/gres.conf"
  else : >"$D/etc/gres.conf"; sed -i '/^GresTypes/d; s/ Gres=gpu:0//' "$D/etc/slurm.conf"; fi
  # slurmd looks for cgroups even with proctrack/linuxproc, and dies where none are mounted, unless told not to:
  # 23.02+ knows "disabled"; 22.05 does not, but its v1 plugin starts without any mount
  case $maj in 1?.*|20.*|21.*) rm -f "$D/etc/cgroup.conf" ;; 22.*) echo "CgroupPlugin=cgroup/v1" >"$D/etc/cgroup.conf" ;; *) echo "CgroupPlugin=disabled" >"$D/etc/cgroup.conf" ;; esac
  if [ "$DBD" = 1 ]; then
    cat >"$D/etc/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$D/munge/munge.socket.2
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((base + 1))
SlurmUser=$ME
LogFile=$D/log/slurmdbd.log
PidFile=$D/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((base + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
$plug
C
    chmod 600 "$D/etc/slurmdbd.conf"
  fi
}

# ---------------------------------------------------------------- daemons
start_munge() {
  [ -s "$D/munge/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$D/munge/munge.key")
  chmod 600 "$D/munge/munge.key"; rm -f "$D"/munge/munge.socket.2*
  munged --socket="$D/munge/munge.socket.2" --key-file="$D/munge/munge.key" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/munge.seed" --num-threads=2 --origin=127.0.0.1 \
    >"$D/log/munged.out" 2>&1 </dev/null || { cat "$D/log/munged.out" >&2; return 1; }
  munge -S "$D/munge/munge.socket.2" -n | unmunge -S "$D/munge/munge.socket.2" >/dev/null
}
start_db() {
  local port dd=$D/db srv; srv=$(pick mariadbd mysqld)
  port=$(awk -F= '/^StoragePort/{print $2}' "$D/etc/slurmdbd.conf")
  local u=; [ "$(id -u)" = 0 ] && u=--user=root
  if [ ! -d "$dd/mysql" ]; then
    mariadb-install-db --no-defaults $u --datadir="$dd" --auth-root-authentication-method=normal --skip-test-db >"$D/log/mariadb-install.log" 2>&1 || return 1
    cat >"$D/etc/db-init.sql" <<C
DROP DATABASE IF EXISTS slurm_acct;
CREATE DATABASE slurm_acct;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';
GRANT ALL ON slurm_acct.* TO 'slurm'@'localhost';
C
  fi
  setsid "$srv" --no-defaults $u --datadir="$dd" --socket="$D/run/mysqld.sock" --pid-file="$D/run/mariadbd.pid" \
    --bind-address=127.0.0.1 --port="$port" --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --skip-name-resolve=0 \
    --init-file="$D/etc/db-init.sql" >"$D/log/mariadbd.log" 2>&1 </dev/null &
  local i; for i in $(seq 1 300); do busy "$port" && break; sleep 0.1; done
  busy "$port" || { tail -5 "$D/log/mariadbd.log" >&2; return 1; }
  # slurmdbd must be given a foreground-independent life of its own; its conf sits next to slurm.conf
  SLURM_CONF=$D/etc/slurm.conf slurmdbd >"$D/log/slurmdbd.out" 2>&1 </dev/null || { cat "$D/log/slurmdbd.out" >&2; return 1; }
  port=$(awk -F= '/^DbdPort/{print $2}' "$D/etc/slurmdbd.conf")
  for i in $(seq 1 300); do busy "$port" && return 0; sleep 0.1; done
  tail -5 "$D/log/slurmdbd.log" >&2; return 1
}
start_ctld() {
  slurmctld -f "$D/etc/slurm.conf" -L "$D/log/slurmctld.log" >"$D/log/slurmctld.out" 2>&1 </dev/null || { cat "$D/log/slurmctld.out" >&2; return 1; }
  local i; for i in $(seq 1 100); do
    scontrol ping 2>/dev/null | grep -q 'is UP' && return 0
    pid_of slurmctld >/dev/null || [ "$i" -lt 20 ] || break; sleep 0.1
  done
  tail -5 "$D/log/slurmctld.log" >&2; return 1
}
start_node() {
  local a="" i port; pid_of "slurmd-$1" >/dev/null && return 0
  port=$(sed -n "s/^NodeName=$1 .* Port=\([0-9]*\) .*/\1/p" "$D/etc/slurm.conf"); [ -n "$port" ] || { say "no node $1"; return 1; }
  mkdir -p "$D/spool/$1"; [ -n "$PFX" ] && a="-d $(pick slurmstepd slurmstepd-wlm)"
  # shellcheck disable=SC2086
  slurmd -f "$D/etc/slurm.conf" -N "$1" $a >"$D/log/slurmd-$1.out" 2>&1 </dev/null || { cat "$D/log/slurmd-$1.out" >&2; tail -3 "$D/log/slurmd-$1.log" >&2; return 1; }
  # it goes to the background before it binds its port: only now is it known whether it lives
  for i in $(seq 1 50); do pid_of "slurmd-$1" >/dev/null && busy "$port" && return 0; sleep 0.1; [ "$i" -gt 10 ] && ! pid_of "slurmd-$1" >/dev/null && break; done
  grep -E 'error|fatal' "$D/log/slurmd-$1.log" | grep -v -i -E 'pmix' | tail -3 >&2; return 1
}
usable() { # all nodes in a state that takes jobs
  [ "$(sinfo -h -N -p gpu -t idle,mixed,allocated,completing -o '%N %t' 2>/dev/null | grep -vc '\*')" -ge "$NN" ]
}
up() {
  local n; pid_of munged >/dev/null && pid_of slurmctld >/dev/null || return 1
  [ "$DBD" != 1 ] || { pid_of slurmdbd >/dev/null && pid_of mariadbd >/dev/null; } || return 1
  for n in $(nodes); do pid_of "slurmd-$n" >/dev/null || return 1; done
  usable
}

hosts_line() { # add|del: our one marked line in /etc/hosts (root only)
  local m="# slurm_local:$D" t names; names=$(nodes | tr '\n' ' ')
  [ "${SLURM_LOCAL_HOSTS:-1}" = 1 ] && [ "$(id -u)" = 0 ] || return 0
  [ -e /etc/hosts ] || { [ "$1" = add ] && echo "127.0.0.1 localhost" >/etc/hosts; }
  [ -w /etc/hosts ] || return 0
  # not sed -i: /etc/hosts is a bind mount in containers
  if grep -qF "$m" /etc/hosts; then t=$(grep -vF "$m" /etc/hosts); printf '%s\n' "$t" >/etc/hosts; fi
  if [ "$1" = add ]; then
    getent hosts "$H" >/dev/null || names="$names$H "   # a fresh sandbox often cannot resolve its own name
    printf '127.0.0.1 %s%s\n' "$names" "$m" >>/etc/hosts   # and code which takes MASTER_ADDR from SLURM_STEP_NODELIST needs n1
  fi
}
etc_link() { # add|del
  local l=/etc/slurm/slurm.conf
  [ "$(id -u)" = 0 ] || return 0
  [ "$(readlink $l 2>/dev/null)" = "$D/etc/slurm.conf" ] && rm -f $l
  [ "$1" = add ] && [ "${SLURM_LOCAL_ETC:-0}" = 1 ] || return 0
  [ -e $l ] || [ -L $l ] && { say "$l exists, left alone"; return 0; }
  mkdir -p /etc/slurm && ln -s "$D/etc/slurm.conf" $l
}
comm_params() { # which CommunicationParameters this network allows
  local a c=
  # bind to loopback only where our own name is loopback: NoInAddrAny binds to whatever the hostname resolves to
  a=$(getent ahosts "$H" | awk '{print $1}' | sort -u)
  case $a in 127.*) [ "$(wc -l <<<"$a")" = 1 ] && c=NoInAddrAny,NoCtldInAddrAny ;; esac
  # in a network namespace with nothing but 127.0.0.1, glibc's AI_ADDRCONFIG refuses even "127.0.0.1" for
  # AF_INET, which is what Slurm asks for; with EnableIPv6 it asks for AF_UNSPEC, and gets it
  getent ahostsv4 127.0.0.1 >/dev/null || c=${c:+$c,}EnableIPv6
  [ -z "$c" ] || echo "CommunicationParameters=$c"
}
stop_all() {
  local n p i
  if [ -s "$D/etc/slurm.conf" ] && pid_of slurmctld >/dev/null && pid_of munged >/dev/null; then
    timeout 5 scancel -u "$ME" --state=PENDING 2>/dev/null; timeout 5 scancel -u "$ME" 2>/dev/null
    for i in $(seq 1 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  for p in "$D"/run/slurmd-*.pid; do [ -e "$p" ] && end_pid "$(basename "$p" .pid)"; done
  end_pid slurmctld 20
  [ -e "$D/run/slurmdbd.pid" ] && end_pid slurmdbd
  [ -e "$D/run/mariadbd.pid" ] && end_pid mariadbd 20
  for p in $(stepd_pids) $(job_pids); do kill -9 "$p" 2>/dev/null; done
  end_pid munged
}
start_all() {
  guards
  if [ -s "$D/etc/slurm.conf" ] && up; then say "already up in $D"; return 0; fi
  local try base n i
  stop_all
  hosts_line add; etc_link add
  for try in 1 2 3; do
    base=$(pick_port) || die "no free port block"
    write_conf "$base"
    # job state of an earlier life is of no use to a test cluster, and a different slurm version refuses it
    rm -rf "$D/state" "$D/spool" "$D/run"; mkdir -p "$D/state" "$D/spool" "$D/run"
    start_munge || die "munged: see $D/log/munged.log"
    if [ "$DBD" = 1 ]; then start_db || { say "slurmdbd/mariadbd did not start on block $base"; stop_all; continue; }
      sacctmgr -i add cluster local >/dev/null 2>&1; fi
    start_ctld || { ! grep -q 'fatal: Unable to process conf' "$D/log/slurmctld.out" || die "bad slurm.conf (SLURM_LOCAL_EXTRA?)"; say "slurmctld did not start on port $base (try $try)"; stop_all; continue; }
    for n in $(nodes); do start_node "$n" || { say "slurmd $n did not start (try $try)"; stop_all; continue 2; }; done
    for i in $(seq 1 $((WAIT * 10))); do usable && { say "up: $NN nodes, $GPUS fake gpus each, port $base, $D"; return 0; }; sleep 0.1; done
    sinfo -N -l >&2; logs; stop_all; die "nodes not idle after $WAIT s"
  done
  logs; die "gave up"
}
logs() { local f; for f in "$D"/log/*.log "$D"/log/*.out; do [ -s "$f" ] && { echo "== $f"; tail -n "${1:-6}" "$f" | cut -c1-300; }; done >&2; }
print_env() {
  echo "export SLURM_CONF='$D/etc/slurm.conf'"
  [ -n "$PFX" ] && { echo "export PATH='$PFX/usr/bin:$PFX/usr/sbin':\"\$PATH\""; echo "export LD_LIBRARY_PATH='$LD_LIBRARY_PATH'"; }
  return 0
}
locked() { mkdir -p "$D" 2>/dev/null || die "cannot make $D"; exec 9>"$D/.lock" || die "cannot lock $D"; flock -w 180 9 || die "another slurm_local.sh holds $D/.lock"; "$@" 9>&-; }
case $D in /*) ;; *) die "SLURM_LOCAL_DIR must be absolute: $D" ;; esac
export SLURM_CONF="$D/etc/slurm.conf"
unset SLURM_JOB_ID SLURM_JOBID
case ${1:-} in
  install) [ "$(id -u)" = 0 ] || die "install needs root"
    export DEBIAN_FRONTEND=noninteractive; apt-get update -qq || say "apt-get update failed, trying the lists at hand"
    p="slurmctld slurmd slurm-client munge"; [ "$DBD" = 1 ] && p="$p slurmdbd mariadb-server-core mariadb-client-core"
    # a policy-rc.d of our own would outlive us; RUNLEVEL=1 keeps the packages from starting their daemons
    # shellcheck disable=SC2086
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $p ;;
  fetch) # no root, no packages: download the .debs and unpack them under SLURM_LOCAL_PREFIX
    [ -n "$PFX" ] || die "set SLURM_LOCAL_PREFIX"; command -v apt-get >/dev/null || die "fetch needs apt-get and package lists"
    p="slurmctld slurmd slurm-client munge"; [ "$DBD" = 1 ] && p="$p slurmdbd mariadb-server-core mariadb-client-core"
    { mkdir -p "$PFX/debs" && cd "$PFX/debs"; } || die "cannot make $PFX/debs"
    # shellcheck disable=SC2046,SC2086
    apt-get download $(LD_LIBRARY_PATH='' apt-get -s install --no-install-recommends $p | awk '/^Inst/{print $2}') >/dev/null || die "download failed"
    for d in *.deb; do dpkg -x "$d" "$PFX" || die "unpack $d"; done
    for d in "$PFX"/usr/sbin/*-wlm "$PFX"/usr/bin/*-wlm; do [ -e "$d" ] && ln -sf "$(basename "$d")" "${d%-wlm}"; done # update-alternatives did not run
    set -- ./*.deb; say "unpacked $# packages in $PFX" ;;
  start) locked start_all ;;
  stop) [ -d "$D" ] || { say "nothing at $D"; exit 0; }; locked stop_all; hosts_line del; etc_link del; say "stopped $D" ;;
  restart) locked stop_all; exec 9>&-; "$0" start ;;
  status) if [ -d "$D" ] && up; then sinfo -N -o '%N %P %t %c %m %G'; exit 0; else say "not up"; exit 3; fi ;;
  env) print_env ;;
  kill-node) p=$(pid_of "slurmd-${2:-}") || die "no such node up: ${2:-}"
    # the way a machine dies: nobody is left to report. stepds first, or they tell slurmctld that the job was killed
    kill -9 "$p"; for s in $(stepd_pids "$2") $(job_pids "$2"); do kill -9 "$s" 2>/dev/null; done; exit 0 ;;
  start-node) rm -f "$D/run/slurmd-$2.pid"; start_node "$2" ;;
  logs) logs "${2:-20}" ;;
  exec) shift; [ "${1:-}" = -- ] && shift; "$0" start || exit 1; trap '"$0" stop' EXIT; "$@"; exit $? ;;
  *) sed -n '2,30p' "$0"; exit 2 ;;
esac
