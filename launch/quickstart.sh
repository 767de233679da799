#!/usr/bin/env bash
# Trains a small DiT on real handwritten digits, draws some, and judges them: bash launch/quickstart.sh
# Run it again and it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare
run=runs/digits
python=.venv/bin/python
# A training step on a CPU asks for gigabytes anew each time: let malloc take large pages, and keep them between steps.
# Without tcache_count=0 a thread may keep the few bytes left over beside them, and then they do not fit there again.
malloc=hugetlb=1:mmap_max=0:arena_max=1:trim_threshold=68719476736:tcache_count=0
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.${malloc//:/:glibc.malloc.}}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$run/compiled}

echo "== training on 1,797 digits of 8x8 pixels (about four minutes on two cores)"
$python -m dit_jax.train --config=configs/digits.py --workdir=$run

echo "== drawing: a labelled grid, then 1,000 digits with guidance and 1,000 without"
$python -m dit_jax.sample --weights=$run --out=$run/grid.png --count=80
$python -m dit_jax.sample --weights=$run --out=$run/guided.npz --count=1000 --batch=500
$python -m dit_jax.sample --weights=$run --out=$run/unguided.npz --count=1000 --batch=500 --guidance=1

echo "== judging"
$python -m dit_jax.judge --samples=$run/guided.npz --data=digits --out=$run/judgement_guided.json
$python -m dit_jax.judge --samples=$run/unguided.npz --data=digits --out=$run/judgement_unguided.json
echo "== done: look at $run/grid.png; the numbers are in $run/judgement_*.json"
