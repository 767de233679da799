"""What the report says, in words, of the way things were measured."""

from dit_jax.config import DiTConfig
from dit_jax.inspection.statistics import FEW


def about_measures(config: DiTConfig, segments: bool) -> dict[str, str]:
    """What each measure means, by its name on the page."""
    said = {
        "attention": "The weights are computed by the equation, block by block; the output is that of the fast path.",
        "means": "Every number of a head is a mean over all patches as queries and over the images.",
        "distance": "Euclidean, between the patches' places, in patches, weighted by attention.",
        "entropy": "In nats; relative entropy is over that of attention to every key the query sees alike.",
        "within 1, 2, 4": "Share of the attention at most so many patches away.",
        "sink": f"Share on the 1/{FEW} of the keys (rounded up) that get most from all queries of the image together.",
        "image predicted": "The clean image that the output at that timestep means, with the label or without.",
    }
    if config.head_gate != "none":
        said["widest gate"] = (
            f"The largest gate of a head over all {'tokens and images' if config.head_gate == 'token' else 'labels'} "
            "and timesteps; 0 where it stayed shut. Attention weights are shown as they are before the gate."
        )
    if config.block == "in-context":
        said["condition"] = "Its tokens are keys for entropy and sink; they have no place, and are no queries here."
    if config.context_features:
        said["context"] = "None was given: the network saw an empty one throughout."
    if segments:
        said["same segment"] = (
            "Patches are bright or dark, told apart in the clean image by Otsu's threshold on their means. The share "
            "of attention on patches of the query's own kind, and what attention to all alike would have."
        )
    return said


def about_ablation(count: int, novelty: str) -> str:
    """How the importance of heads was measured, and what its images are worth."""
    return (
        f"Each head in turn is set to zero and nothing else changes. This is the training loss of {count} images that "
        "are not among those above, with their labels, at the same timesteps and with the same noise with the head "
        f"and without. {novelty}"
    )
