# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training: feature cache, order of images, resuming, and what all models have in common."""

# Importing anomalib's models imports ours, which need this package's modules whole.
import anomalib_osdirf.models  # noqa: F401
