# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Densities by name."""

from anomalib_osdirf.density.gaussian import DiagonalGaussian, FittedDensity, PositionGaussian, StandardGaussian
from anomalib_osdirf.density.mixture import AUTO, PositionMixture

MIXTURE = "mixture_full"
DENSITIES = ("standard", "channel", "position", "position_full", MIXTURE)


def build_density(
    name: str, dim: int, grid_size: int, shrinkage: float | str = "oas", num_clusters: int | str = AUTO
) -> FittedDensity:
    """Build an unfitted density.

    Args:
        name: One of :data:`DENSITIES`.
        dim: Channels of the field.
        grid_size: Side of the grid.
        shrinkage: That of :class:`PositionGaussian`.
        num_clusters: That of :class:`PositionMixture`.

    Returns:
        The density.

    Raises:
        ValueError: If an argument is unknown, or one that the density does not know.
    """
    if name not in DENSITIES:
        msg = f"density={name!r} is unknown; use one of {', '.join(DENSITIES)}."
        raise ValueError(msg)
    if num_clusters != AUTO and name != MIXTURE:
        msg = f"num_clusters={num_clusters!r} needs density={MIXTURE}, not {name}; leave num_clusters out."
        raise ValueError(msg)
    if name == MIXTURE:
        return PositionMixture(dim, grid_size, num_clusters, shrinkage)
    if name == "position_full":
        return PositionGaussian(dim, grid_size, shrinkage)
    if shrinkage != "oas":
        msg = f"shrinkage={shrinkage!r} needs density=position_full or {MIXTURE}, not {name}; leave shrinkage out."
        raise ValueError(msg)
    if name == "standard":
        return StandardGaussian(dim)
    return DiagonalGaussian(dim, 1 if name == "channel" else grid_size**2)
