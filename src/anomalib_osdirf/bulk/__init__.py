# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Scoring many images with Ray Data: restartable, and on a cluster as on one machine."""
