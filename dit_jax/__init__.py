"""Diffusion Transformers in JAX and Flax NNX."""

import lazy_loader

__version__ = "0.1.0"

# The public names are listed in __init__.pyi and imported at first use: a command that only has to say what is wrong
# with its flags does so before JAX is there.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
