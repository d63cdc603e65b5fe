#!/usr/bin/env bash
# This machine's part of a job on several machines. Start it on each, with the same settings, in any order:
#
#   NNODES=2 RDZV_ENDPOINT=10.0.0.1:29500 launch/multinode.sh configs/quickstart.yaml [key=value ...]
#
# Where the machines meet (one of the two is required; the first wins):
#   RDZV_ENDPOINT   host:port, a free port on one of the machines, which hosts the job's store (c10d)
#   PET_*           PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, as Kubeflow Trainer v2 sets them
#
# What runs:
#   NNODES          machines, or LEAST:MOST of an elastic job   required with RDZV_ENDPOINT
#   NPROC_PER_NODE  ranks on this machine                       auto: one per GPU, or per core without GPUs
#   JOB             a name, the same on all machines            the config's
#   RUN_DIR         the run folder, on a disk that all share    runs/JOB; an existing run resumes
#   MAX_RESTARTS    of all ranks, after one has failed          3
#
# How long it waits, in seconds unless a unit is given:
#   JOIN_TIMEOUT    for the other machines                      600
#   SAVE_TIMEOUT    for a checkpoint, after a signal to stop    120
#   DEADLINE        for the whole job, which is then stopped    24h; 0 is for ever
#
# If the defaults are wrong (found from the route to RDZV_ENDPOINT):
#   LOCAL_ADDR      the address at which the others reach this machine
#   IFNAME          the network interface with this address, for Gloo and NCCL
#   IS_HOST         1 on the machine that RDZV_ENDPOINT names, 0 on the others
#   PYTHON          a Python with distclip                      .venv/bin/python here, else python3
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

(($#)) || fail "which config? For example: launch/multinode.sh configs/quickstart.yaml [key=value ...]"
config=$1
shift
[[ -f $config ]] || fail "there is no config $config in $PWD"

name=$(basename "$config")
job=${JOB:-${name%.*}}
join_timeout=${JOIN_TIMEOUT:-600} save_timeout=${SAVE_TIMEOUT:-120} deadline=${DEADLINE:-24h}
[[ $job =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "JOB=$job names a folder: letters, digits, dots, - and _"
[[ $join_timeout =~ ^(0|[1-9][0-9]*)$ ]] || fail "JOIN_TIMEOUT=$join_timeout is no whole number of seconds"
[[ $save_timeout =~ ^(0|[1-9][0-9]*)$ ]] || fail "SAVE_TIMEOUT=$save_timeout is no whole number of seconds"
[[ $deadline =~ ^(0|[1-9][0-9]*[smhd]?)$ ]] || fail "DEADLINE=$deadline is no time: 3600, 90m, 24h, 7d, or 0 for none"

if [[ -z ${RDZV_ENDPOINT:-} && -n ${PET_MASTER_ADDR:-} ]]; then
    for needed in PET_NNODES PET_NODE_RANK PET_MASTER_PORT; do
        [[ -n ${!needed:-} ]] || fail "PET_MASTER_ADDR is set but $needed is not: set all four, or RDZV_ENDPOINT"
    done
    host=$PET_MASTER_ADDR port=$PET_MASTER_PORT machines=$PET_NNODES backend=static wait=()
    nproc=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-auto}} restarts=${MAX_RESTARTS:-${PET_MAX_RESTARTS:-3}}
else
    [[ -n ${RDZV_ENDPOINT:-} ]] || fail "where do the machines meet? RDZV_ENDPOINT=host:port, on one of them"
    [[ $RDZV_ENDPOINT =~ ^([A-Za-z0-9][A-Za-z0-9._-]*):([0-9]+)$ ]] || fail "RDZV_ENDPOINT=$RDZV_ENDPOINT is not host:port"
    host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]} backend=c10d wait=(wait)
    machines=${NNODES:-}
    [[ $machines =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "how many machines? NNODES=2, or NNODES=1:4 if elastic"
    nproc=${NPROC_PER_NODE:-auto} restarts=${MAX_RESTARTS:-3}
fi
[[ $port =~ ^[0-9]+$ ]] || fail "PET_MASTER_PORT=$port is no port"
[[ $nproc =~ ^([1-9][0-9]*|auto|gpu|cpu)$ ]] || fail "NPROC_PER_NODE=$nproc is neither a number nor auto, gpu or cpu"
[[ $restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$restarts is no number"

python=${PYTHON:-$venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
words=(run.dir="${RUN_DIR:-runs/$job}" resume=true "$@")
"$python" -c 'import importlib.util as u; exit(None in [u.find_spec(m) for m in ("distclip", "torch", "jsonargparse")])' ||
    fail "$python has no distclip[train]: run launch/quickstart.sh once, or name a Python that has it: PYTHON=..."
"$python" "$root/launch/check.py" "$config" "${words[@]}" || exit

# Without these, torch takes what this machine's own name resolves to, which on Debian is 127.0.1.1: ranks on other
# machines are refused there, and machines that do not know which one hosts the store wait for each other.
address=${LOCAL_ADDR:-} interface=${IFNAME:-} is_host=${IS_HOST:-}
if [[ -z $address || -z $interface || -z $is_host ]]; then
    found=$("$python" "$root/launch/address.py" "$host" "$port" "$join_timeout" "${wait[@]}") || exit
    read -r its_address its_interface is_it <<<"$found"
    address=${address:-$its_address} interface=${interface:-$its_interface} is_host=${is_host:-$is_it}
fi
if [[ $interface != - ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi

options=(--nproc-per-node "$nproc" --max-restarts "$restarts")
if [[ $backend == c10d ]]; then
    conf=join_timeout=$join_timeout
    [[ $is_host == - ]] || conf+=,is_host=$is_host
    options+=(--nnodes "$machines" --rdzv-backend "$backend" --rdzv-id "$job" --rdzv-endpoint "$host:$port")
    options+=(--rdzv-conf "$conf" --local-addr "$address")
    # Restarted ranks must not use the old store: Gloo would read addresses of dead ranks.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$save_timeout}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun does, but without a warning

printf 'machines %s, ranks on each %s; they meet at %s:%s, this one is %s (%s); deadline %s\n' \
    "$machines" "$nproc" "$host" "$port" "$address" "$interface" "$deadline"
until=()
if [[ $deadline != 0 ]]; then
    # A session of its own: Ctrl-C reaches only `timeout`, which forwards it. If torchrun got it twice, it would exit
    # without waiting for its ranks.
    until=(timeout --foreground --verbose --kill-after $((save_timeout + 30)) "$deadline" setsid)
fi
exec "${until[@]}" "$python" -m torch.distributed.run "${options[@]}" \
    -m distclip train "$config" "${words[@]}"
