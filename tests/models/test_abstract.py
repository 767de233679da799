import jax
import pytest
from flax import nnx

from dit_jax import DiTConfig
from dit_jax.models.abstract import abstract
from dit_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from dit_jax.models.classifier import Classifier, ClassifierConfig
from dit_jax.models.dit import DiT
from dit_jax.models.inception import InceptionV3
from dit_jax.parallel.mesh import make_mesh

BUILDS = {
    "DiT": lambda: DiT(DiTConfig.preset("DiT-S/8"), rngs=nnx.Rngs(0)),
    "autoencoder": lambda: AutoencoderKL(AutoencoderConfig(block_out_channels=(64,)), rngs=nnx.Rngs(0)),
    "classifier": lambda: Classifier(ClassifierConfig(28, 1, 10), rngs=nnx.Rngs(0)),
    "Inception": InceptionV3,
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_what_is_shared_by_all_knows_of_no_mesh(build):
    graph, shapes = abstract(build)
    with jax.set_mesh(make_mesh()):
        graph_there, shapes_there = abstract(build)
    assert graph_there == graph and shapes_there == shapes
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(shapes))
