# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The scale of normalised scores that have p-values; needs only numpy.

With e = log p / log(rate) a score is normalised to z = e / (1 + e): the threshold, where p is the rate, is 0.5, and
p = rate^(z / (1 - z)). No score is ever 0 or 1, so that all keep their order.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Exponents e at which the map from scores to p-values is kept; their steps add up without rounding to 1, the threshold.
EXPONENTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0, 5 / 4, 3 / 2, 2.0, 3.0)
THRESHOLD = EXPONENTS.index(1.0)


def normalise(scores: NDArray, knots: Array) -> Array:
    """Normalise raw scores or maps, as the post-processor does.

    Args:
        scores: Any shape.
        knots: Scores whose p-value is rate^e, for each e of :data:`EXPONENTS`, ascending.

    Returns:
        Values in (0, 1) in the same order, above 0.5 where above the threshold.
    """
    values, places, exponents = np.asarray(scores, np.float64), np.asarray(knots, np.float64), np.array(EXPONENTS)
    slopes = np.diff(exponents) / np.diff(places)
    total = np.interp(values, places, exponents) + slopes[-1] * np.maximum(values - places[-1], 0)
    total = total / (1 + np.maximum(places[0] - values, 0) * slopes[0] / exponents[0])
    return np.asarray(total / (1 + total))


def raw_scores(normalised: NDArray | float, knots: Array) -> Array:
    """Reverse :func:`normalise`: return raw scores or maps of values in (0, 1), of any shape."""
    values, places, exponents = np.asarray(normalised, np.float64), np.asarray(knots, np.float64), np.array(EXPONENTS)
    wanted = values / (1 - values)
    slopes = np.diff(exponents) / np.diff(places)
    inside = np.interp(wanted, exponents, places) + np.maximum(wanted - exponents[-1], 0) / slopes[-1]
    return np.asarray(inside - np.maximum(exponents[0] / wanted - 1, 0) * exponents[0] / slopes[0])


def p_value(normalised: NDArray | float, rate: float) -> Array:
    """Return the p-value of normalised scores or maps: rate^(z / (1 - z))."""
    values = np.clip(np.asarray(normalised, np.float64), 0, 1 - 1e-15)
    return np.asarray(rate ** (values / (1 - values)))
