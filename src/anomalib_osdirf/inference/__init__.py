# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Exported models and checkpoints at work on image files. Exported ones are served without importing torch."""
