"""Do generated images show the class that was asked for? For data sets small enough for a scikit-learn classifier."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


def judge(
    samples: np.ndarray, requested: np.ndarray, real: np.ndarray, real_labels: np.ndarray, class_names: Sequence[str]
) -> dict:
    """Label generated images with a classifier of real ones, and compare their spread.

    The classifier (a support vector machine with a Gaussian kernel, on pixels) sees three quarters of the real
    images; the rest tell how far it can be trusted.

    Args:
        samples: (M, H, W, C) uint8 generated images.
        requested: (M,) the class that each was asked to show.
        real: (N, H, W, C) uint8 real images.
        real_labels: (N,) their classes.
        class_names: name of each class.

    Returns:
        agreement: share of samples that the classifier gives the requested class, 0 to 1.
        classifier_accuracy: its share of right answers on the held-out real images.
        spread_ratio: mean distance of two images of one class, generated against real; 1 is as varied as the data,
            much less means that each class has collapsed.
        agreement_by_class: the agreement of every class that was asked for, by name.
        samples: M.
    """
    features, labels = _features(real), real_labels
    train_x, test_x, train_y, test_y = train_test_split(
        features, labels, test_size=0.25, random_state=0, stratify=labels
    )
    classifier = SVC(C=10.0).fit(train_x, train_y)
    drawn = _features(samples)
    right = classifier.predict(drawn) == requested
    classes = np.unique(requested)
    spread = [[pdist(x[y == c]).mean() for c in classes] for x, y in ((drawn, requested), (features, labels))]
    return {
        "agreement": float(right.mean()),
        "classifier_accuracy": float(classifier.score(test_x, test_y)),
        "spread_ratio": float(np.mean(spread[0]) / np.mean(spread[1])),
        "agreement_by_class": {class_names[c]: float(right[requested == c].mean()) for c in classes},
        "samples": len(samples),
    }


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255.0
