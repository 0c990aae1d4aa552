# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""The embedded data set, and a datamodule for many categories."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomalib_osdirf.data.multi_category import MultiCategory
    from anomalib_osdirf.data.synthetic_surfaces import SyntheticSurfaces

__all__ = ["MultiCategory", "SyntheticSurfaces"]


def __getattr__(name: str) -> object:
    """Import a public name on first use, because anomalib's data package takes seconds to import."""
    if name == "MultiCategory":
        from anomalib_osdirf.data.multi_category import MultiCategory

        return MultiCategory
    if name == "SyntheticSurfaces":
        from anomalib_osdirf.data.synthetic_surfaces import SyntheticSurfaces

        return SyntheticSurfaces
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, the ones not yet imported included."""
    return sorted(__all__)
