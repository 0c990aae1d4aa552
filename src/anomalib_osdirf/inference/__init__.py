# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Inference with exported models and checkpoints. Exported models run without importing torch."""
