# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Deprecation warnings that our code causes fail the test in which they appear; those of other packages don't."""

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_ours_are_errors(category: type[Warning]) -> None:
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module="anomalib_osdirf.models.osdirf")


def test_those_of_others_are_not() -> None:
    warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module="some_package")
