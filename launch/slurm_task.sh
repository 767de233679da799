#!/usr/bin/env bash
# One task of launch/slurm.sbatch: runs its arguments. Slurm sends signals to every process of a task, so SIGTERM comes
# to the training too, which saves and ends with 0. As that would look finished, it becomes 143 here, "ended by SIGTERM".
stopped=
trap 'stopped=1' TERM
"$@" &
while
    wait $!
    status=$?
    kill -0 $! 2>/dev/null # else it was the trap that ended wait
do :; done
if [ -n "$stopped" ] && [ "$status" -eq 0 ]; then status=143; fi
exit "$status"
