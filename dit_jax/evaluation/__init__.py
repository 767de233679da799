"""How good generated images are: statistics of features, and what they are features of."""

from dit_jax.evaluation.statistics import frechet_distance as frechet_distance
from dit_jax.evaluation.statistics import inception_score as inception_score
from dit_jax.evaluation.statistics import precision_recall as precision_recall
