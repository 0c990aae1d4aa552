# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of exported graphs, and what is needed to run them. Only what needs torch imports it."""
