#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker of a pod. The run's log is dit_jax.log in the home folder.
#   tpu_worker.sh install         makes .venv in this checkout, with JAX for TPU
#   tpu_worker.sh start COMMAND   starts COMMAND in the background, in this checkout; it outlives the ssh connection
#   tpu_worker.sh status          idle, running, finished, stopped (as asked), preempted (this machine goes, or went and
#                                 came back, or another one is missing), or failed
#   tpu_worker.sh stop            asks the run to save and end
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
state=$HOME/.dit_jax
log=$HOME/dit_jax.log
boot=/proc/sys/kernel/random/boot_id # another one after each start of the machine

install() {
    # shellcheck source=environment.sh
    source "$checkout/launch/environment.sh"
    cd "$checkout"
    if ! .venv/bin/python -c '' 2>/dev/null && ! find_python >/dev/null; then
        echo "== this runtime's Python is older than 3.11: fetching one with uv"
        python3 -m pip install --quiet --user uv
        rm -rf .venv
        python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
    prepare tpu
}

start() {
    if [ "$(status)" = running ]; then
        echo "error: $(hostname) runs something already; stop it first: tpu_pod.sh stop" >&2
        exit 2
    fi
    rm -rf "$state"
    mkdir "$state"
    cat "$boot" >"$state/boot"
    # What JAX asks for at its start on TPUs: without it the runtime starts and ends slowly.
    sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null || true
    setsid bash "${BASH_SOURCE[0]}" supervise "$@" >>"$log" 2>&1 </dev/null &
    echo $! >"$state/supervisor"
}

# Runs COMMAND and leaves its end in $state/end. When the machine is taken away, everything on it gets SIGTERM: so
# this only notes the signal, or the run would get it twice.
supervise() {
    local status=0 ended=finished
    trap 'touch "$state/preempted"' TERM
    cd "$checkout"
    # shellcheck source=xla_flags.sh
    source launch/xla_flags.sh
    export PATH=$checkout/.venv/bin:$PATH
    echo "== $(date -Is) $(hostname): $*"
    "$@" &
    echo $! >"$state/run"
    while wait $! || status=$?; kill -0 $! 2>/dev/null; do status=0; done
    if [ "$status" -eq 75 ]; then # another host is missing
        ended=preempted
    elif [ "$status" -ne 0 ]; then
        ended=failed
    elif [ -e "$state/asked" ]; then
        ended=stopped
    elif [ -e "$state/preempted" ]; then
        ended=preempted
    fi
    echo "== $(date -Is) $(hostname): $ended, exit status $status"
    echo "$ended" >"$state/end"
}

status() {
    if [ -e "$state/end" ]; then
        cat "$state/end"
    elif [ ! -e "$state/supervisor" ]; then
        echo idle
    elif [ "$(cat "$boot")" != "$(cat "$state/boot")" ]; then
        echo preempted
    elif kill -0 "$(cat "$state/supervisor")" 2>/dev/null; then
        echo running
    elif [ -e "$state/preempted" ]; then
        echo preempted
    else
        echo failed
    fi
}

stop() {
    if [ "$(status)" = running ]; then
        touch "$state/asked"
        kill -TERM "$(cat "$state/run")"
    fi
}

"$@"
