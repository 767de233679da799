#!/usr/bin/env bash
# Photographs to latents to a trained model to pictures, in a minute; the autoencoder has random weights.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare
run=runs/latents_tiny

echo "== cutting scikit-learn's two photographs into two classes of 48"
.venv/bin/python - "$run/photos" <<'PYTHON'
import sys
from pathlib import Path
from PIL import Image
from sklearn.datasets import load_sample_images

for name, photo in zip(("china", "flower"), load_sample_images().images):
    folder = Path(sys.argv[1]) / name
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(48):
        left, top = 60 * (i % 8), 50 * (i // 8)
        Image.fromarray(photo).crop((left, top, left + 160, top + 160)).save(folder / f"{i:02d}.jpg", quality=95)
PYTHON

echo "== making an autoencoder with random weights"
.venv/bin/python - "$run/autoencoder.safetensors" <<'PYTHON'
import sys
from flax import nnx
from dit_jax import AutoencoderConfig, AutoencoderKL
from dit_jax.checkpoints.autoencoder_layout import save_autoencoder

config = AutoencoderConfig(block_out_channels=(32, 64, 64, 64), layers_per_block=1, scaling_factor=1.0)
save_autoencoder(AutoencoderKL(config, rngs=nnx.Rngs(0)), sys.argv[1])
PYTHON

echo "== encoding"
.venv/bin/python -m dit_jax.encode --data="folder:$run/photos" --autoencoder="$run/autoencoder.safetensors" \
    --out="$run/latents" --image_size=64
echo "== training"
.venv/bin/python -m dit_jax.train --config=configs/latents_tiny.py --workdir="$run/run"
echo "== sampling"
.venv/bin/python -m dit_jax.sample --weights="$run/run" --out="$run/samples.png" --count=16
