# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Whether new scores are distributed as those of normal images; needs only numpy and scipy.

Windows of new scores that do not overlap are compared with a reference by the two-sample test of Kolmogorov and
Smirnov, whose p-value is exact for samples of these sizes. Each window is tested once, so that the rate of false
warnings is one in ``1 / RATE`` windows, whatever the scores' distribution. Few defects do not move the distribution
enough to warn; many do.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

WINDOW = 50
RATE = 0.001
FIRST = 100  # scores that are the reference where there is no other
_FEWEST, _MOST = 20, 200  # scores of a reference


def quantiles(scores: NDArray) -> list[float]:
    """Return the scores in ascending order, or 200 quantiles of more.

    As a reference, quantiles of many scores vary less than as many scores would: the test warns more rarely at most.

    Args:
        scores: Scores of normal images ``(n,)``.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    if len(ordered) > _MOST:
        ordered = np.quantile(ordered, (np.arange(_MOST) + 0.5) / _MOST)
    return ordered.tolist()


@dataclass(frozen=True)
class Comparison:
    """A window of new scores beside the reference."""

    p_value: float  # of the hypothesis that both have one distribution
    median: float
    reference: float  # its median

    @property
    def drifts(self) -> bool:
        """Whether the scores drift."""
        return self.p_value < RATE


def compare(scores: NDArray, reference: NDArray) -> Comparison:
    """Compare new scores ``(n,)`` with a reference ``(m,)``."""
    found = stats.ks_2samp(scores, reference)
    return Comparison(float(found.pvalue), float(np.median(scores)), float(np.median(reference)))


class DriftWatch:
    """Compares each window of new scores with the reference.

    Attributes:
        latest: Comparison of the last full window, ``None`` before.
        windows: Number of windows compared.
        warnings: Number of those that drift.

    Args:
        reference: Scores of normal images on the scale of the new ones; where there are fewer than 20, the first 100
            new scores are the reference.

    Example:
        >>> watch = DriftWatch(np.arange(100.0))
        >>> watch.add([99.0] * 50)
        >>> watch.latest.drifts
        True
    """

    def __init__(self, reference: Iterable[float] = ()) -> None:
        self._reference = np.array(list(reference), np.float64)
        self.by_training = len(self._reference) >= _FEWEST
        self._pending: list[float] = []
        self.latest: Comparison | None = None
        self.windows = self.warnings = 0

    def add(self, scores: Iterable[float]) -> None:
        """Add new scores."""
        for score in scores:
            self._pending.append(score)
            if self._has_reference and len(self._pending) == WINDOW:
                self.latest = compare(np.array(self._pending), self._reference)
                self.windows += 1
                self.warnings += self.latest.drifts
                self._pending = []
            elif not self._has_reference and len(self._pending) == FIRST:
                self._reference, self._pending = np.array(self._pending), []

    @property
    def _has_reference(self) -> bool:
        return len(self._reference) >= _FEWEST

    def sentence(self) -> str:
        """Say how the scores are."""
        whose = "those of training" if self.by_training else f"the first {FIRST} of this stream"
        if self.latest is None:
            wait = (WINDOW if self._has_reference else FIRST + WINDOW) - len(self._pending)
            return f"Scores are compared with {whose} after {wait} more."
        p_value = f"p = {self.latest.p_value:.2g}, Kolmogorov-Smirnov"
        if self.latest.drifts:
            return (
                f"Scores drift from {whose}: the median of the last {WINDOW} is {self.latest.median:.3f} instead of "
                f"{self.latest.reference:.3f} ({p_value})."
            )
        return f"Scores are as {whose} ({p_value}, last {WINDOW})."
