#!/usr/bin/env bash
# A real Slurm on this machine, for tests: munge, slurmctld and a slurmd for each of a few nodes, on
# loopback, in one folder, without systemd; as root or as an ordinary user.
#
#   tools/slurm_local.sh install          the packages (Debian or Ubuntu, root)
#   tools/slurm_local.sh start            returns when every node is idle; again: does nothing
#   tools/slurm_local.sh status           0: all is up
#   tools/slurm_local.sh env              prints 'export SLURM_CONF=...', to be eval'd
#   tools/slurm_local.sh exec -- CMD...   starts, runs CMD, stops; the exit code is CMD's
#   tools/slurm_local.sh kill-node n2     ends a node as a power cut does
#   tools/slurm_local.sh start-node n2    and brings it back
#   tools/slurm_local.sh logs [LINES]     the ends of all logs
#   tools/slurm_local.sh stop             ends what belongs to this folder, and nothing else
#
# In the environment:
#   SLURM_LOCAL_DIR    the folder             (/tmp/slurm_local.$UID)
#   SLURM_LOCAL_NODES  nodes, n1 n2 ...       (2)
#   SLURM_LOCAL_CPUS   CPUs of each           (4; more than there are is fine)
#   SLURM_LOCAL_MEM    MiB of each            (4000)
#   SLURM_LOCAL_GPUS   GPUs of each, not real (2)
#   SLURM_LOCAL_PORT   the first port         (a free block in 20000..29999)
#   SLURM_LOCAL_EXTRA  more lines for slurm.conf, for instance SlurmctldParameters=preempt_send_user_signal
set -u
umask 022

dir=${SLURM_LOCAL_DIR:-/tmp/slurm_local.$(id -u)}
number=${SLURM_LOCAL_NODES:-2}
cpus=${SLURM_LOCAL_CPUS:-4}
memory=${SLURM_LOCAL_MEM:-4000}
gpus=${SLURM_LOCAL_GPUS:-2}
me=$(id -un)
host=$(cat /proc/sys/kernel/hostname 2>/dev/null || hostname)
host=${host%%.*}
host=${host:-localhost}
conf=$dir/etc/slurm.conf
socket=$dir/munge/munge.socket.2
packages="slurmctld slurmd slurm-client munge"
export PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$conf
unset SLURM_JOB_ID SLURM_JOBID

say() { printf 'slurm_local: %s\n' "$*" >&2; }
die() {
    say "ERROR: $*"
    exit 1
}
nodes() { seq -f 'n%.0f' 1 "$number"; }
within() { # within TENTHS COMMAND...: whether it succeeds before so many tenths of a second are over
    local left=$1
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 0.1
    done
}

# --- processes of this folder -----------------------------------------------------------------------

alive() { # a zombie is dead, though nobody may ever wait for it
    case $(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) in '' | Z* | X*) return 1 ;; esac
}
dead() { ! alive "$1"; }
pid_of() { # pid_of NAME: only of a process that is ours, for numbers come back
    local pid
    pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] && alive "$pid" || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$dir/"; } 2>/dev/null || return 1
    echo "$pid"
}
has() { pid_of "$1" >/dev/null; }
end() { # end NAME [SECONDS]
    local pid
    if pid=$(pid_of "$1"); then
        kill "$pid" 2>/dev/null
        within $((${2:-10} * 10)) dead "$pid" || kill -9 "$pid" 2>/dev/null
    fi
    rm -f "$dir/run/$1.pid"
}
steps() { # steps [NODE]: its slurmstepds, known by the log of slurmd that they hold open
    local process file
    for process in /proc/[0-9]*; do
        [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] || continue
        for file in "$process"/fd/*; do
            case $(readlink "$file" 2>/dev/null) in
                "$dir/log/slurmd-${1:-}"*.log)
                    echo "${process#/proc/}"
                    break
                    ;;
            esac
        done
    done
}
jobs_of() { # jobs_of [NODE]: the processes of its jobs, known by their environment
    local process env
    for process in /proc/[0-9]*; do
        [ "${process#/proc/}" != $$ ] || continue
        env=$({ tr '\0' '\n' <"$process/environ"; } 2>/dev/null)
        grep -qxF "SLURM_CONF=$conf" <<<"$env" || continue
        grep -q '^SLURM_JOB_ID=' <<<"$env" || continue
        [ -z "${1:-}" ] || grep -qx "SLURMD_NODENAME=$1" <<<"$env" || continue
        echo "${process#/proc/}"
    done 2>/dev/null
}

# --- what would fail with a message that nobody understands -----------------------------------------

guard() {
    local lost="" program folder mode owner free
    for program in munged slurmctld slurmd sinfo scontrol sbatch; do
        command -v $program >/dev/null || lost="$lost $program"
    done
    [ -z "$lost" ] || die "missing:$lost; as root: $0 install, or apt-get install $packages"
    [ ${#dir} -le 80 ] || die "SLURM_LOCAL_DIR is too long for a socket's name: $dir"
    mkdir -p "$dir" || die "cannot make $dir"
    [ -O "$dir" ] || die "$dir is not owned by $me"
    chmod 755 "$dir"
    folder=$dir # munge wants it and all above it to be safe
    while :; do
        mode=$(stat -c %a "$folder") owner=$(stat -c %u "$folder")
        [ "$owner" = 0 ] || [ "$owner" = "$(id -u)" ] || die "munge refuses $folder: it is owned by user $owner"
        [ $((8#$mode & 8#022)) = 0 ] || [ $((8#$mode & 8#1000)) != 0 ] ||
            die "munge refuses $folder: others may write there (mode $mode)"
        [ $((8#$mode & 1)) != 0 ] || die "munge refuses $folder: others may not pass (mode $mode)"
        [ "$folder" != / ] || break
        folder=$(dirname "$folder")
    done
    (exec 3<>/dev/tcp/127.0.0.1/1) 2>&1 | grep -qi unreachable && die "loopback is down: ip link set lo up"
    free=$(df -Pk "$dir" | awk 'NR == 2 { print $4 }')
    [ "${free:-0}" -gt 102400 ] || die "less than 100 MiB free in $dir"
}
busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_block() { # free_block PORT: whether it and those after it that are needed are free
    local i
    for i in $(seq 0 "$number"); do ! busy $(($1 + i)) || return 1; done
}
pick_port() {
    local try port
    if [ -n "${SLURM_LOCAL_PORT:-}" ]; then
        free_block "$SLURM_LOCAL_PORT" && echo "$SLURM_LOCAL_PORT"
        return
    fi
    for try in $(seq 50); do
        port=$((20000 + (RANDOM % 990) * 10))
        free_block $port && echo $port && return
    done
    say "no free ports after $try tries"
    return 1
}

# --- configuration ----------------------------------------------------------------------------------

network() { # what this machine's names and addresses allow
    local addresses params=""
    # NoInAddrAny binds to what the host's name means, which must be where clients ask.
    addresses=$(getent ahosts "$host" | awk '{ print $1 }' | sort -u)
    case $addresses in *$'\n'*) ;; 127.*) params=NoInAddrAny,NoCtldInAddrAny ;; esac
    # With no network but loopback, IPv4 alone is not even asked for 127.0.0.1.
    getent ahostsv4 127.0.0.1 >/dev/null || params=${params:+$params,}EnableIPv6
    [ -z "$params" ] || echo "CommunicationParameters=$params"
}
write_conf() { # write_conf PORT
    local life i=0 node gres=""
    mkdir -p "$dir"/{etc,run,log,state,spool,dev,munge}
    # A job's number that comes back makes an earlier life's files look like its own.
    life=$(($(cat "$dir/.life" 2>/dev/null || echo 0) + 1))
    echo "$life" >"$dir/.life"
    cat >"$conf" <<CONF
ClusterName=local
FirstJobId=$((life * 1000 + 1))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# cred_expire is also how long a job that was put back waits. It must be well above KillWait, or the
# job meets its old self, which still dies, and is held.
AuthInfo=socket=$socket,cred_expire=10
KillWait=5
$(network)
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# No control groups, no binding: runs in any container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# Nodes may have more than the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=1,max_rpc_cnt=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# Tests do not have the patience of a computing centre.
OverTimeLimit=0
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=60
InactiveLimit=0
ReturnToService=2
UnkillableStepTimeout=30
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
CONF
    if [ "$gpus" -gt 0 ]; then
        # Slurm counts only what is a device.
        for i in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$dir/dev/gpu$i"; done
        echo "NodeName=n[1-$number] Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]" >"$dir/etc/gres.conf"
        echo "GresTypes=gpu" >>"$conf"
        gres="Gres=gpu:$gpus"
    else
        : >"$dir/etc/gres.conf"
    fi
    i=0
    for node in $(nodes); do
        i=$((i + 1))
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$(($1 + i)) CPUs=$cpus" \
            "RealMemory=$memory $gres State=UNKNOWN"
    done >>"$conf"
    cat >>"$conf" <<CONF
PartitionName=gpu Nodes=n[1-$number] Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=cpu Nodes=n[1-$number] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=n[1-$number] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
${SLURM_LOCAL_EXTRA:-}
CONF
    # slurmd looks for control groups all the same, and ends where none are mounted. Slurm 22 does not
    # know "disabled", but its first plugin starts without any.
    case $(slurmctld -V | awk '{ print $2 }') in
        1?.* | 20.* | 21.*) rm -f "$dir/etc/cgroup.conf" ;;
        22.*) echo "CgroupPlugin=cgroup/v1" >"$dir/etc/cgroup.conf" ;;
        *) echo "CgroupPlugin=disabled" >"$dir/etc/cgroup.conf" ;;
    esac
}
hosts() { # hosts add|del: node names that resolve, in one marked line of /etc/hosts; root only
    local mark="# slurm_local:$dir" rest names
    [ "$(id -u)" = 0 ] && [ -w /etc/hosts ] || return 0
    if grep -qF "$mark" /etc/hosts; then # not sed -i: in containers the file is mounted
        rest=$(grep -vF "$mark" /etc/hosts)
        printf '%s\n' "$rest" >/etc/hosts
    fi
    [ "$1" = add ] || return 0
    names=$(nodes | tr '\n' ' ')
    getent hosts "$host" >/dev/null || names="$names$host "
    printf '127.0.0.1 %s%s\n' "$names" "$mark" >>/etc/hosts
}

# --- daemons ----------------------------------------------------------------------------------------

daemon() { # daemon NAME COMMAND...: its output is shown if it does not start
    local name=$1
    shift
    "$@" >"$dir/log/$name.out" 2>&1 </dev/null && return
    cat "$dir/log/$name.out" >&2
    return 1
}
start_munge() {
    [ -s "$dir/munge/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/munge.key")
    chmod 600 "$dir/munge/munge.key"
    rm -f "$socket"*
    daemon munged munged --socket="$socket" --key-file="$dir/munge/munge.key" \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
        --seed-file="$dir/munge/munge.seed" --num-threads=2 --origin=127.0.0.1 || return 1
    munge -S "$socket" -n | unmunge -S "$socket" >/dev/null
}
answers() { scontrol ping 2>/dev/null | grep -q 'is UP'; }
start_controller() {
    daemon slurmctld slurmctld -f "$conf" -L "$dir/log/slurmctld.log" || return 1
    within 100 answers || { tail -5 "$dir/log/slurmctld.log" >&2 && return 1; }
}
listens() { has "slurmd-$1" && busy "$2"; } # it is in the background before it has its port
start_node() {
    local port
    ! has "slurmd-$1" || return 0
    port=$(sed -n "s/^NodeName=$1 .* Port=\([0-9]*\) .*/\1/p" "$conf")
    [ -n "$port" ] || die "no node $1; there are: $(nodes | tr '\n' ' ')"
    rm -f "$dir/run/slurmd-$1.pid"
    mkdir -p "$dir/spool/$1"
    daemon "slurmd-$1" slurmd -f "$conf" -N "$1" || return 1
    within 50 listens "$1" "$port" || { grep -E 'error|fatal' "$dir/log/slurmd-$1.log" | tail -3 >&2 && return 1; }
}
usable() { # all nodes take jobs
    local found
    found=$(sinfo -h -N -p gpu -t idle,mixed,allocated,completing -o '%N %t' 2>/dev/null | grep -vc '\*')
    [ "$found" -ge "$number" ]
}
up() {
    local node
    [ -s "$conf" ] && has munged && has slurmctld || return 1
    for node in $(nodes); do has "slurmd-$node" || return 1; done
    usable
}
idle() { [ -z "$(timeout 5 squeue -h 2>/dev/null)" ]; }
stop() {
    local file pid
    if [ -s "$conf" ] && has slurmctld && has munged; then
        timeout 5 scancel -u "$me" --state=PENDING 2>/dev/null
        timeout 5 scancel -u "$me" 2>/dev/null
        within 50 idle
    fi
    for file in "$dir"/run/slurmd-*.pid; do
        [ ! -e "$file" ] || end "$(basename "$file" .pid)"
    done
    end slurmctld 20
    for pid in $(steps) $(jobs_of); do kill -9 "$pid" 2>/dev/null; done
    end munged
}
bring_up() { # bring_up PORT
    local node
    write_conf "$1"
    # Jobs of an earlier life are of no use, and another version of Slurm refuses them.
    rm -rf "$dir/state" "$dir/spool" "$dir/run"
    mkdir -p "$dir/state" "$dir/spool" "$dir/run"
    start_munge && start_controller || return 1
    for node in $(nodes); do start_node "$node" || return 1; done
    within 600 usable
}
start() {
    local try port
    guard
    if up; then
        say "is up in $dir"
        return
    fi
    stop
    hosts add
    for try in 1 2 3; do # another program may take a port that was free
        port=$(pick_port) || die "no free block of $((number + 1)) ports${SLURM_LOCAL_PORT:+ at $SLURM_LOCAL_PORT}"
        if bring_up "$port"; then
            say "up: $number nodes with $gpus GPUs each, port $port, $dir"
            return
        fi
        say "did not come up (try $try)"
        logs >&2
        stop
    done
    die "gave up; logs are in $dir/log"
}
logs() {
    local file
    for file in "$dir"/log/*; do
        [ ! -s "$file" ] || { echo "== $file" && tail -n "${1:-6}" "$file"; }
    done
}
locked() { # one at a time
    mkdir -p "$dir" || die "cannot make $dir"
    exec 9>"$dir/.lock"
    flock -w 180 9 || die "another slurm_local.sh holds $dir/.lock"
    "$@" 9>&-
}

case $dir in /*) ;; *) die "SLURM_LOCAL_DIR must be absolute: $dir" ;; esac
case ${1:-} in
    install)
        [ "$(id -u)" = 0 ] || die "install needs root"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq || say "apt-get update failed; trying the lists there are"
        # Runlevel 1 keeps the packages from starting their daemons.
        # shellcheck disable=SC2086
        RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $packages
        ;;
    start) locked start ;;
    stop)
        [ -d "$dir" ] || exit 0
        locked stop
        hosts del
        say "stopped $dir"
        ;;
    status) up || { say "not up" && exit 3; } ;;
    env) echo "export SLURM_CONF='$conf'" ;;
    exec)
        shift
        [ "${1:-}" != -- ] || shift
        "$0" start || exit 1
        trap '"$0" stop' EXIT
        "$@"
        exit $?
        ;;
    kill-node)
        pid=$(pid_of "slurmd-${2:-}") || die "no such node up: ${2:-}"
        # Steps too, or they tell the controller that the job was killed.
        # shellcheck disable=SC2046
        kill -9 "$pid" $(steps "$2") $(jobs_of "$2") 2>/dev/null
        ;;
    start-node) start_node "${2:-}" ;;
    logs) logs "${2:-20}" ;;
    *)
        sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
