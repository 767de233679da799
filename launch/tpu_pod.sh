#!/usr/bin/env bash
# Trains on a Cloud TPU pod, from your own machine, through queued resources.
#
#   launch/tpu_pod.sh create                ask for the pod and wait for it, then install this checkout on all workers
#   launch/tpu_pod.sh run -- COMMAND        start COMMAND in the background on all workers; logs shows what it does
#   launch/tpu_pod.sh run --forever -- COMMAND
#                                           the same, and stay: a pod that was preempted is deleted, asked for again,
#                                           installed, and COMMAND goes on from its last checkpoint, until it is done
#   launch/tpu_pod.sh logs [WORKER]         follow a worker's log (0); Ctrl-C leaves the run alone
#   launch/tpu_pod.sh status                the pod's state and each worker's
#   launch/tpu_pod.sh stop                  SIGTERM to the run: it saves and ends, the pod stays
#   launch/tpu_pod.sh delete                give the pod back
#
# Settings, as variables or options (--name=...):
#   NAME       of the pod (dit)                     PROJECT  of Google Cloud (gcloud's own)
#   ZONE       (us-west4-a)                         TYPE     v5litepod-16, v5p-8, v6e-16, v4-8 ... (v5litepod-16)
#   RUNTIME    software of the workers (by TYPE)    SLICES   pods that train as one (1)
#   SPOT       1: cheap, may be preempted (0)       CHECKOUT folder to install from (this one)
#   RETRIES    times that run --forever tries again after a request or, on a healthy pod, a run that failed (3)
#   --spot is --SPOT=1; --dry-run prints the commands and runs none.
#
# Of the checkout the workers get what git tracks, as it is on the disk, and new files of configs/, dit_jax/ and launch/.
# A pod's disks go with it. COMMAND's --workdir and data are paths, so put them on a disk that all workers share and that
# outlives them: Filestore (NFS), or a bucket that has a hierarchical namespace, mounted with gcsfuse, at the same place
# on every worker. SETUP is a command that each worker runs before each start, to mount it unless it is:
#   SETUP='mountpoint -q /mnt/runs || {
#     sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/runs && sudo mount 10.0.0.2:/runs /mnt/runs; }'
#
# Example:
#   launch/tpu_pod.sh --type=v5litepod-16 --spot create
#   launch/tpu_pod.sh --type=v5litepod-16 --spot run --forever -- \
#     python -m dit_jax.train --config=configs/imagenet256.py:DiT-XL/2 --workdir=/mnt/runs/xl \
#     --config.data.source=latents:/mnt/runs/imagenet256 --config.mesh.fsdp=16
set -euo pipefail

NAME=${NAME:-dit}
PROJECT=${PROJECT:-}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-}
SLICES=${SLICES:-1}
SPOT=${SPOT:-0}
CHECKOUT=${CHECKOUT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
SETUP=${SETUP:-}
RETRIES=${RETRIES:-3}
POLL=${POLL:-60} # seconds between two looks at the pod
DRY_RUN=

main() {
    local action='' forever=
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        case $1 in
        -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
        --dry-run) DRY_RUN=1 ;;
        --spot) SPOT=1 ;;
        --forever) forever=1 ;;
        --name=* | --project=* | --zone=* | --type=* | --runtime=* | --slices=* | --checkout=* | --setup=* | \
            --retries=* | --poll=*) set_option "$1" ;;
        -*) fail "unknown option $1; see --help" ;;
        *) [ -z "$action" ] || break && action=$1 ;;
        esac
        shift
    done
    [ "${1:-}" != -- ] || shift
    local location=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
    local describe=(gcloud compute tpus queued-resources describe "$NAME" "${location[@]}")
    local ask_state=("${describe[@]}" "--format=value(state.state)")
    case $action in
    create | status | stop | delete)
        [ $# -eq 0 ] || fail "$action takes no argument, got: $*"
        "$action"
        ;;
    logs) logs "${1:-0}" ;;
    run)
        [ $# -gt 0 ] || fail "the command is missing: tpu_pod.sh run -- COMMAND"
        if [ -n "$forever" ]; then run_forever "$@"; else run "$@"; fi
        ;;
    '') fail "say what to do: create, run, logs, status, stop or delete; see --help" ;;
    *) fail "unknown action $action; there are create, run, logs, status, stop and delete" ;;
    esac
}

set_option() {
    local name=${1%%=*}
    name=${name#--}
    printf -v "${name^^}" %s "${1#*=}"
}

create() {
    request && await && install
}

request() {
    local nodes=("--node-id=$NAME")
    [ "$SLICES" -eq 1 ] || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
    [ "$SPOT" != 1 ] || nodes+=(--spot)
    do_it gcloud compute tpus queued-resources create "$NAME" "${location[@]}" \
        "--accelerator-type=$TYPE" "--runtime-version=${RUNTIME:-$(runtime)}" "${nodes[@]}"
}

runtime() {
    case $TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

await() {
    local state
    if [ -n "$DRY_RUN" ]; then
        do_it "${ask_state[@]}"
        return
    fi
    while state=$(state) && [ "$state" != ACTIVE ]; do
        say "$NAME is $state"
        case $state in FAILED | SUSPENDING | SUSPENDED | NONE) return 1 ;; esac
        sleep "$POLL"
    done
}

# ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED ... of a queued resource, NONE, or UNKNOWN.
state() {
    local answer
    if answer=$("${ask_state[@]}" 2>&1); then
        echo "${answer##*$'\n'}"
    elif [[ ${answer,,} =~ not.?found ]]; then
        echo NONE
    else
        grep ERROR <<<"$answer" >&2 || echo "$answer" >&2
        echo UNKNOWN
    fi
}

install() {
    local archive=${TMPDIR:-/tmp}/dit_jax-$NAME.tar.gz node
    pack "$archive"
    for node in $(nodes); do
        do_it gcloud compute tpus tpu-vm scp "$archive" "$node:dit_jax.tar.gz" "${location[@]}" --quiet --worker=all ||
            return
    done
    on_all "mkdir -p dit_jax && tar -xzf dit_jax.tar.gz -C dit_jax && bash dit_jax/launch/tpu_worker.sh install && touch dit_jax/.installed"
}

# The checkout's files, as they are on the disk, without what runs in it have made.
pack() {
    local own=(configs dit_jax launch)
    if [ -n "$DRY_RUN" ]; then
        echo "tar -C $CHECKOUT -czf $1 (the files of the checkout)"
    elif git -C "$CHECKOUT" rev-parse 2>/dev/null; then
        { git -C "$CHECKOUT" ls-files -z && git -C "$CHECKOUT" ls-files -z --others --exclude-standard "${own[@]}"; } |
            tar -C "$CHECKOUT" --null --files-from=- --ignore-failed-read -czf "$1"
    else
        tar -C "$CHECKOUT" -czf "$1" "${own[@]}" pyproject.toml requirements.txt README.md LICENSE
    fi
}

run() {
    on_all "${SETUP:+{ $SETUP; \} && }bash dit_jax/launch/tpu_worker.sh start$(printf ' %q' "$@")" || return
    say "started; see: $0 status, $0 logs"
}

run_forever() {
    local state workers failures=0
    if [ -n "$DRY_RUN" ]; then
        do_it "${ask_state[@]}"
        run "$@"
        workers
        echo "# and when the pod was preempted:"
        delete
        create
        run "$@"
        return
    fi
    [ "$(state)" != UNKNOWN ] || fail "gcloud does not answer: log in, and set the project; it said the above"
    while [ "$failures" -le "$RETRIES" ]; do
        state=$(state)
        case $state in
        NONE) if create; then failures=0; else failures=$((failures + 1)); fi ;;
        FAILED | SUSPENDED)
            say "$NAME is $state: deleting it and asking for another"
            [ "$state" != FAILED ] || "${describe[@]}" "--format=yaml(state)" >&2 || true
            delete || sleep "$POLL"
            ;;
        ACTIVE)
            workers=$(workers) || workers=silent
            case $workers in
            *running*) sleep "$POLL" ;;
            *bare*) install || failures=$((failures + 1)) ;;
            *idle*) run "$@" || failures=$((failures + 1)) ;;
            *failed*)
                failures=$((failures + 1))
                say "the run failed ($failures)"
                [ "$failures" -gt "$RETRIES" ] || run "$@" || true
                ;;
            *preempted*)
                sleep "$POLL"
                [ "$(state)" != ACTIVE ] || run "$@" || true
                ;;
            *stopped*) say "the run was stopped; the same command goes on with it" && return ;;
            *finished*) say "the run is finished" && return ;;
            *) say "the workers do not answer" && sleep "$POLL" ;;
            esac
            ;;
        *) say "$NAME is $state" && sleep "$POLL" ;;
        esac
    done
    fail "given up after $failures failures; see: $0 logs"
}

logs() {
    on_node "$(nodes | head -n 1)" "$1" "tail -n 100 -F dit_jax.log"
}

status() {
    if [ -n "$DRY_RUN" ]; then
        do_it "${ask_state[@]}"
        workers
        return
    fi
    local state
    state=$(state)
    echo "$NAME is $state"
    [ "$state" != ACTIVE ] || workers
}

workers() {
    # shellcheck disable=SC2016 # the worker's shell expands it
    on_all 'echo "$(hostname): $([ ! -e dit_jax/.installed ] && echo bare || bash dit_jax/launch/tpu_worker.sh status)"'
}

stop() {
    on_all "bash dit_jax/launch/tpu_worker.sh stop"
}

delete() {
    do_it gcloud compute tpus queued-resources delete "$NAME" "${location[@]}" --force --quiet
}

# The pod is one node a slice.
nodes() {
    if [ "$SLICES" -eq 1 ]; then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi
}

on_all() {
    local node
    for node in $(nodes); do
        on_node "$node" all "$1" || return
    done
}

on_node() {
    do_it gcloud compute tpus tpu-vm ssh "$1" "${location[@]}" --quiet "--worker=$2" "--command=$3"
}

do_it() {
    local word line=
    if [ -z "$DRY_RUN" ]; then
        "$@"
        return
    fi
    for word in "$@"; do
        [[ $word =~ ^[a-zA-Z0-9_=:,./@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="$word "
    done
    echo "${line% }"
}

say() {
    [ -n "$DRY_RUN" ] || echo "== $*"
}

fail() {
    echo "error: $*" >&2
    exit 2
}

main "$@"
