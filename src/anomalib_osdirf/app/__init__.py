# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A page to try a model in the browser. Exported models are served without importing torch."""
