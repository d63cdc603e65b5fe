#!/usr/bin/env bash
# Proves docker/ with real engines: buildah builds docker/Dockerfile on a Debian that mmdebstrap makes, and dockerd runs
# it: who it is, its health check, a job of two ranks, and docker/compose.yaml. Needs root on Debian. Not in CI: it takes
# minutes and installs mmdebstrap, buildah, docker-compose and iptables. dockerd is only unpacked, runs in a network
# namespace of its own, and is gone afterwards, as is all else but these packages. Figures: docs/howto/launch.md.
#
#   bash tests/launch/image.sh
#
#   TORCH_INDEX      as in docker/Dockerfile
#   PIP_CONF         a pip.conf for the build, which does not get into the image
#   BUILD_OPTIONS    of `buildah build`, as in '--volume /wheels:/wheels:ro'
#   ARCHIVE          the image: used if it is there, otherwise made and kept
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
namespace=dcd$$
engine=
base=localhost/distclip-base:bookworm image=distclip:cpu
archive=${ARCHIVE:-$scratch/image.tar}
export DOCKER_HOST=unix://$scratch/docker.sock
words=(data.max_chars=20000 data.length=16 data.held_out=0.1 model.width=16 model.layers=2 model.heads=2
    train.batch_size=12 train.eval_every=null train.steps=20)

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
fail() {
    say "FAILED: $*"
    tail -n 30 "$scratch"/*.log >&2 || true
    exit 1
}

stop() {
    local pid
    trap '' TERM INT # `timeout` sends its signal twice
    if [[ -n $engine ]]; then
        docker ps --all --quiet 2>/dev/null | xargs --no-run-if-empty docker rm --force >/dev/null 2>&1 || true
        kill "$engine" 2>/dev/null || true
        wait "$engine" 2>/dev/null || true
    fi
    for pid in $(ip netns pids "$namespace" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
    ip netns delete "$namespace" 2>/dev/null || true
    umount --recursive "$scratch"/docker "$scratch"/exec "$scratch"/storage/overlay 2>/dev/null || true
    rm -rf --one-file-system "$scratch"
}

install_packages() {
    local tool missing=
    for tool in mmdebstrap buildah docker-compose iptables ip; do
        command -v "$tool" >/dev/null || missing=yes
    done
    [[ -n $missing ]] || return 0
    say "installing"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        mmdebstrap buildah docker-compose iptables iproute2 >/dev/null
}

bah() { # buildah, with a storage of its own
    local command=$1
    shift
    buildah --root "$scratch/storage" --runroot "$scratch/run" "$command" "$@" >>"$scratch/buildah.log" 2>&1 ||
        fail "buildah $command"
}

build() {
    local options=()
    read -ra options <<<"${BUILD_OPTIONS:-}"
    [[ -z ${PIP_CONF:-} ]] || options+=(--secret "id=pip,src=$PIP_CONF")
    [[ -z ${TORCH_INDEX+set} ]] || options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$scratch/base.tar"
    bah from --name base scratch
    bah add base "$scratch/base.tar" /
    bah commit base "$base"
    say "the base is made"
    bah build --isolation chroot --pull-never --network host --format docker "${options[@]}" \
        --build-arg BASE_IMAGE="$base" --file "$root/docker/Dockerfile" --tag "$image" "$root"
    bah push "$image" "docker-archive:$archive:$image"
    say "the image is built"
}

start_engine() {
    (cd "$scratch" && apt-get download -qq docker.io containerd runc tini 2>/dev/null)
    for package in "$scratch"/*.deb; do dpkg --extract "$package" "$scratch/unpacked"; done
    PATH=$scratch/unpacked/usr/bin:$scratch/unpacked/usr/sbin:$PATH
    ip netns add "$namespace"
    ip -n "$namespace" link set lo up
    nsenter --net="/run/netns/$namespace" dockerd --data-root "$scratch/docker" --exec-root "$scratch/exec" \
        --pidfile "$scratch/docker.pid" --host "$DOCKER_HOST" --iptables=false >"$scratch/dockerd.log" 2>&1 &
    engine=$!
    for ((left = 120; left > 0; left--)); do
        ! docker version >/dev/null 2>&1 || break
        kill -0 "$engine" 2>/dev/null || fail "dockerd has ended"
        sleep 0.5
    done
    docker load --quiet --input "$archive" >/dev/null
    say "dockerd $(docker version --format '{{.Server.Version}}') has the image"
}

expect() { # what, wanted, found
    [[ $2 == "$3" ]] || fail "$1 is $3, not $2"
}

[[ $EUID == 0 ]] || { printf 'image.sh: needs root\n' >&2 && exit 1; }
install_packages
trap stop EXIT
[[ -f $archive ]] || build
start_engine
size=$(docker image inspect --format '{{.Size}}' "$image")
say "size $((size / 1000000)) MB, $(docker history --quiet "$image" | wc -l) layers"

# As the strictest cluster would: not root, nothing to write to but the run folder and /tmp, no capabilities.
strict=(--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --network none)
expect "the user" 10001 "$(docker run --rm "${strict[@]}" "$image" id -u)"
! docker run --rm "$image" touch /app/launch/x 2>/dev/null || fail "/app can be written to"
! docker run --rm "$image" python3 -m pip --version 2>/dev/null || fail "pip is in the image"
docker run --rm "${strict[@]}" --volume runs:/app/runs "$image" \
    distclip train configs/quickstart.yaml run.dir=runs/strict "${words[@]}" >"$scratch/strict.log" 2>&1 ||
    fail "the job of two ranks"
grep -q 'status *│ finished' "$scratch/strict.log" || fail "the job has not finished"
say "not root, read-only, without a network: two ranks trained 20 steps"

for config in classifier digits; do
    docker run --rm "$image" distclip train "configs/$config.yaml" train.epochs=null train.steps=5 >"$scratch/$config.log" 2>&1 ||
        fail "configs/$config.yaml"
done
say "so do the other tasks"

container=$(docker run --detach --health-interval=5s "$image" sleep 600)
for ((left = 120; left > 0; left--)); do
    health=$(docker inspect --format '{{.State.Health.Status}}' "$container")
    [[ $health == starting ]] || break
    sleep 1
done
expect "the health" healthy "$health"
say "healthy: $(docker inspect --format '{{(index .State.Health.Log 0).Output}}' "$container" | head -n 1)"
docker rm --force "$container" >/dev/null

STEPS=20 JOB=compose docker-compose --project-name dc --file "$root/docker/compose.yaml" up --no-build --no-color \
    >"$scratch/compose.log" 2>&1 || fail "docker-compose"
for service in node0 node1; do
    expect "the exit code of $service" 0 "$(docker inspect --format '{{.State.ExitCode}}' "$(docker ps --all --quiet \
        --filter label=com.docker.compose.service="$service")")"
done
grep -q 'ranks    2 (fsdp2)' "$scratch/compose.log" || fail "not two ranks"
docker run --rm --volume dc_runs:/app/runs "$image" grep -q '"status": "finished"' runs/compose/summary.json ||
    fail "the two services have not finished"
say "two services of docker/compose.yaml trained together"
