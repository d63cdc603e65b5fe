#!/usr/bin/env bash
# Proves launch/slurm.sbatch on a real Slurm: a controller and two nodes, each in a network namespace of its own with
# its own name, from Debian's packages. Needs root on Debian, installs slurm-wlm and munge, leaves no process behind.
# Not in CI: it takes minutes, because Slurm checks time limits every 30 to 60 s. Figures: docs/howto/launch.md.
#
#   bash tests/launch/slurm.sh          PYTHON names a Python with distclip[train] (default: .venv, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
id=dcs$$
hosts=(hub n0 n1)
daemons=()
words=(data.max_chars=20000 data.length=16 data.held_out=0.1 model.width=16 model.layers=2 model.heads=2
    train.batch_size=12 train.eval_every=null train.log_every=500 optim.decay=none)
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
export PYTHON=${PYTHON:-python3} SLURM_CONF=$scratch/slurm.conf

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
fail() {
    say "FAILED: $*"
    tail -n 40 "$scratch"/*.log >&2 || true
    exit 1
}

stop() {
    local host pid left
    trap '' TERM INT # `timeout` sends its signal twice
    on hub scancel --user=root 2>/dev/null || true
    for ((left = 20; left > 0; left--)); do
        [[ -n $(on hub squeue --noheader --states=running,completing 2>/dev/null) ]] || break
        sleep 1
    done
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do kill "${daemons[i]}" 2>/dev/null || true; done
    wait
    for host in "${hosts[@]}"; do
        for pid in $(ip netns pids "$id-$host" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
        ip netns delete "$id-$host" 2>/dev/null || true
    done
    rm -rf "$scratch"
}

# A command on a host: its network, its name, its /etc/hosts. (`ip netns exec` would hide /sys/fs/cgroup from slurmd.)
on() {
    local host=$1
    shift
    # shellcheck disable=SC2016 # the inner bash expands these
    nsenter --net="/run/netns/$id-$host" unshare --uts --mount bash -c \
        'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' - "$host" "$scratch/hosts" "$@"
}

daemon() { # host, name of the log, command...
    local host=$1 log=$2
    shift 2
    on "$host" "$@" >"$scratch/$log.log" 2>&1 &
    daemons+=($!)
}

install_packages() {
    if command -v sbatch >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null; then return; fi
    say "installing slurm-wlm and munge"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 >/dev/null
}

make_network() {
    local host
    for host in "${hosts[@]}"; do
        ip netns add "$id-$host"
        ip -n "$id-$host" link set lo up
    done
    ip -n "$id-hub" link add br0 type bridge
    ip -n "$id-hub" address add 10.77.0.9/24 dev br0
    ip -n "$id-hub" link set br0 up
    for i in 0 1; do
        ip link add eth0 netns "$id-n$i" type veth peer name "p$i" netns "$id-hub"
        ip -n "$id-hub" link set "p$i" master br0 up
        ip -n "$id-n$i" address add "10.77.0.1$i/24" dev eth0
        ip -n "$id-n$i" link set eth0 up
    done
    printf '127.0.0.1 localhost\n10.77.0.9 hub\n10.77.0.10 n0\n10.77.0.11 n1\n' >"$scratch/hosts"
}

configure() {
    mkdir -p "$scratch"/{state,n0,n1}
    cat >"$SLURM_CONF" <<END
ClusterName=distclip
SlurmctldHost=hub(10.77.0.9)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$scratch/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/%n
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
NodeName=n0 NodeAddr=10.77.0.10 CPUs=2 RealMemory=1000
NodeName=n1 NodeAddr=10.77.0.11 CPUs=2 RealMemory=1000
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE
END
    printf 'CgroupPlugin=cgroup/v1\n' >"$scratch/cgroup.conf"
    dd if=/dev/urandom of="$scratch/munge.key" bs=128 count=1 status=none
    chmod 400 "$scratch/munge.key"
}

start() {
    daemon hub munged munged --foreground --force --socket="$scratch/munge.socket" --key-file="$scratch/munge.key" \
        --pid-file="$scratch/munged.pid" --seed-file="$scratch/munged.seed" --log-file="$scratch/munged-own.log"
    for ((left = 50; left > 0; left--)); do
        [[ ! -S $scratch/munge.socket ]] || break
        sleep 0.1
    done
    daemon hub slurmctld slurmctld -D -c
    daemon n0 slurmd-n0 slurmd -D -N n0
    daemon n1 slurmd-n1 slurmd -D -N n1
    for ((left = 60; left > 0; left--)); do
        [[ $(on hub sinfo --noheader --states=idle --format=%D 2>/dev/null) != 2 ]] || return 0
        sleep 0.5
    done
    fail "the nodes are not idle after 30 s"
}

submit() { # name, options of sbatch... -- words of the trainer...: prints the job's number
    local name=$1 options=()
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    (cd "$root" && RUN_DIR=$scratch/$name NPROC_PER_NODE=1 on hub sbatch --parsable --chdir="$root" --output="$scratch/$name.log" \
        "${options[@]}" launch/slurm.sbatch configs/quickstart.yaml "${words[@]}" "$@")
}

wait_for_end() { # number, seconds
    local state=
    for ((left = $2; left > 0; left--)); do
        state=$(on hub scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
        [[ $state =~ ^(PENDING|CONFIGURING|RUNNING|COMPLETING|REQUEUED)$ ]] || break
        sleep 1
    done
    printf '%s\n' "$state"
}

expect() { # what, wanted, found
    [[ $2 == "$3" ]] || fail "$1 is $3, not $2"
}

field() { # run, key: of its summary
    "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$scratch/$1/summary.json" "$2"
}

[[ $EUID == 0 ]] || { printf 'slurm.sh: needs root\n' >&2 && exit 1; }
install_packages
trap stop EXIT
make_network
configure
start
say "a controller and two nodes are up: $(slurmd -V)"

job=$(submit plain --time=10 -- train.steps=50)
expect "the state of job $job" COMPLETED "$(wait_for_end "$job" 300)"
expect status finished "$(field plain status)"
grep -q 'ranks    2 (fsdp2)' "$scratch/plain.log" || fail "not two ranks"
seconds=$(field plain seconds)
say "job $job: one rank on each of two nodes, 50 steps to the end; training took ${seconds%.*} s"

job=$(submit wrong --time=10 -- train.stepss=20)
expect "the state of job $job" FAILED "$(wait_for_end "$job" 120)"
grep -q 'did you mean train.steps' "$scratch/wrong.log" || fail "no word about the wrong key"
say "job $job: a wrong key ends the job on both nodes"

# Slurm warns a minute or two before the limit of four: as many steps as should take four minutes need two starts.
steps=${STEPS:-$("$PYTHON" -c "print(int(50 / $seconds * 240))")}
job=$(submit cut --time=4 --signal=B:USR1@60 -- train.steps="$steps")
expect "the state of job $job" COMPLETED "$(wait_for_end "$job" 1800)"
expect status finished "$(field cut status)"
expect steps "$steps" "$(field cut steps)"
expect "lines of metrics" "$steps" "$(wc -l <"$scratch/cut/metrics.jsonl")"
grep -E '^job |^resumed' "$scratch/cut.log"
starts=$(grep -c ', start ' "$scratch/cut.log")
((starts > 1)) || fail "the job was never cut: STEPS=$((2 * steps)) takes longer"
say "job $job: cut by its time limit and queued again, $starts starts, $steps steps, each once"
