"""Published weights by name: where each is fetched from, under which licence, and where it is kept once fetched.

Nothing here touches the network; `python -m dit_jax.download NAME` does.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

OTHER_LIBRARIES = ("*.msgpack", "*.h5", "*.ckpt", "*.onnx", "*.onnx_data", "*.tflite", "*.ot")
"""Files of a Hub repository that hold its weights once more, for what we do not read."""


class DirectFile(NamedTuple):
    """One file behind one URL."""

    url: str
    licence: str
    sha256: str = ""
    """What is known of its SHA-256: the first digits, all 64, or none."""

    @property
    def path(self) -> Path:
        return downloads_folder() / self.url.rpartition("/")[2]


class HubRepository(NamedTuple):
    """A repository of the Hugging Face Hub, in the layout of diffusers."""

    repository: str
    licence: str = ""
    """Where its model card says none."""
    ignored: tuple[str, ...] = OTHER_LIBRARIES
    """Patterns of files that are not fetched."""


_DIT = "https://dl.fbaipublicfiles.com/DiT/models"
_TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_SAFETENSORS_SUFFICE = (*OTHER_LIBRARIES, "*.bin")

PUBLISHED: dict[str, DirectFile | HubRepository] = {
    "DiT-XL-2-256x256": DirectFile(f"{_DIT}/DiT-XL-2-256x256.pt", "CC BY-NC 4.0"),
    "DiT-XL-2-512x512": DirectFile(f"{_DIT}/DiT-XL-2-512x512.pt", "CC BY-NC 4.0"),
    "sd-vae-ft-ema": HubRepository("stabilityai/sd-vae-ft-ema", "MIT", _SAFETENSORS_SUFFICE),
    "sd-vae-ft-mse": HubRepository("stabilityai/sd-vae-ft-mse", "MIT", _SAFETENSORS_SUFFICE),
    "inception-fid": DirectFile(
        f"{_TORCH_FIDELITY}/weights-inception-2015-12-05-6726825d.pth", "Apache-2.0", sha256="6726825d"
    ),
}


def find(name: str) -> DirectFile | HubRepository | None:
    """What a published name, or a Hub repository id like owner/name, stands for; None if it is neither."""
    for known, published in PUBLISHED.items():
        if name in (known, getattr(published, "repository", None)):
            return published
    return HubRepository(name) if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def locate(name: str) -> Path | None:
    """Where a published name or Hub repository id is on this machine: a file or a folder, None if nowhere.

    A repository counts once its weights and configs are all there, whoever fetched them. Never touches the network.
    """
    published = find(name)
    if published is None:
        return None
    if isinstance(published, DirectFile):
        return published.path if published.path.is_file() else None

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            published.repository,
            allow_patterns=["*.json", "*.safetensors", "*.bin", "*.pt", "*.pth"],
            ignore_patterns=list(published.ignored),
            local_files_only=True,
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(folder)


def downloads_folder() -> Path:
    """Where direct files are kept: $XDG_CACHE_HOME/dit_jax, or ~/.cache/dit_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit_jax"
