# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""From the field to the anomaly map and the image score: everything that is fitted on normal images after training."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.region import RegionOfInterest
from anomalib_osdirf.processes import ALONE, DistributedContext
from anomalib_osdirf.scoring import (
    FOLDS,
    CrossFitted,
    HeldOutUnits,
    ImageClusters,
    ImageScore,
    PatchMixture,
    PositionGaussians,
    PositionStatistics,
    Sample,
    StandardGaussian,
    fit_mixture,
    fit_positions,
    patch_centres,
    standard,
)

logger = logging.getLogger(__name__)

DENSITIES = ("auto", "position", "mixture", "standard")
_COMPONENTS = 32  # of a mixture of fields
_FINE_COMPONENTS = 16  # of one of fine features, of which there are four times as many
# Painted anomalies count as found above the maximum that this share of normal images does not exceed.
_NORMAL_QUANTILE = 0.95
_MAPS_AT_ONCE = 8
# A smaller difference of the found shares, in standard errors, is not significant; the likelihood then decides.
_STANDARD_ERRORS = 2.0

# Batches of fields (B, D, h, w), fine features (B, D, 2 h, 2 w) and numbers (B,), the same at every call.
Images = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]


@dataclass
class Painted:
    """Normal images with painted anomalies.

    Attributes:
        field: Fields, shape ``(B, D, h, w)``.
        fine: Fine features, shape ``(B, D, 2 h, 2 w)``.
        covered: Where anomalies are, shape ``(B, h, w)``.
        numbers: Number of each image among all training images, shape ``(B,)``.
    """

    field: Tensor
    fine: Tensor
    covered: Tensor
    numbers: Tensor


@dataclass
class FineFit:
    """The density of the fine features, fitted and cross-fitted, with its units; neither depends on the denoiser."""

    density: CrossFitted
    units: HeldOutUnits

    def held_out(self, fine: Sample) -> Tensor:
        """Return held-out maps in units of held-out normal variation."""
        return self.units(self.density.held_out(fine), torch.zeros_like(fine.cluster))


class Fit(NamedTuple):
    """The result of a fit.

    Attributes:
        found: Share of painted positions that is found, per image that has any, shape ``(N,)``.
        held_out: Score, largest and smallest value of the map of each of this process's images, scored as if it were
            new, shape ``(M, 3)``.
        fine: The fits on fine features by structure.
    """

    found: Tensor
    held_out: Tensor
    fine: Mapping[str, FineFit | None] = {}


@dataclass
class _Trial:
    """A structure, fitted and cross-fitted, with its units."""

    structure: str
    field: CrossFitted
    units: HeldOutUnits
    nll: float  # mean over held-out images and positions, nats
    fine: FineFit | None

    def held_out(self, field: Sample, fine: Sample) -> tuple[Tensor, Tensor | None]:
        """Return both held-out maps in units of held-out normal variation."""
        values = self.units(self.field.held_out(field), field.cluster)
        return values, None if self.fine is None else self.fine.held_out(fine)


class Scorer(nn.Module):
    """Maps and scores of fields.

    Two densities make the map: that of the field, on its grid, and that of the fine features, which needs no denoiser.
    Each is brought to units of held-out normal variation, and their sum is the anomaly map.

    Args:
        density: Structure of both densities: ``position``, Gaussians per position and per cluster of images;
            ``mixture``, a mixture of Gaussians that all positions share; ``auto``, whichever finds more of the
            anomalies painted on held-out normal images; or ``standard``, N(0, I) of the field alone.

    Raises:
        ValueError: If ``density`` is unknown.
    """

    def __init__(self, density: str = "auto") -> None:
        super().__init__()
        if density not in DENSITIES:
            raise ValueError(f"density={density!r} is unknown; use one of {', '.join(DENSITIES)}.")
        self.wanted = density
        self.structure: str | None = None  # known once it is fitted
        self.num_images = 0
        self.roi: RegionOfInterest | None = None  # the network's
        self.clusters = ImageClusters()
        self.units = HeldOutUnits()
        self.fine_units = HeldOutUnits()
        self.image_score = ImageScore()
        self.density: nn.Module | None = None
        self.fine_density: nn.Module | None = None

    # ------------------------------------------------------------------ use

    def forward(self, field: Tensor, fine: Tensor, size: Sequence[int]) -> InferenceBatch:
        """Score fields ``(B, D, h, w)`` and fine features ``(B, D, 2 h, 2 w)``; maps are of a size ``(H, W)``."""
        assert self.density is not None
        field, fine = field.float(), fine.float()
        cluster = self.clusters(fine)
        values = self.units(self.density(field, cluster), cluster)
        fine_values = None
        if self.fine_density is not None:
            fine_values = self.fine_units(self.fine_density(fine), cluster)
        score = self.image_score(_together(values, fine_values), cluster)
        return InferenceBatch(pred_score=score, anomaly_map=map_of(values, fine_values, size, self.roi))

    # ------------------------------------------------------------------ fit

    @torch.no_grad()
    def fit(
        self,
        images: Images,
        painted: Callable[[], Iterable[Painted]] | None = None,
        processes: DistributedContext = ALONE,
        size: Sequence[int] = (1, 1),
        fine: Mapping[str, FineFit | None] | None = None,
    ) -> Fit:
        """Fit on normal training images: clusters, densities, units, normalisation of the image score.

        Args:
            images: Returns this process's images in batches of fields, fine features and numbers, at every call.
            painted: Returns images with painted anomalies, by which ``auto`` decides; ``None`` if there are none.
            processes: Distributed context.
            size: Height and width of the maps that held-out images have.
            fine: :attr:`Fit.fine` of an earlier fit on the same images, whose clusters and fine densities stay.

        Returns:
            What is found of painted anomalies, and scores of held-out images.
        """
        if fine is None:
            self.clusters.fit(lambda: (features for _, features, _ in images()), processes)
        structures = ("position", "mixture") if self.wanted == "auto" else (self.wanted,)
        trials = [self._trial(structure, images, processes, fine=fine) for structure in structures]
        found = [self._found(trial, images, painted, processes) if painted else torch.zeros(0) for trial in trials]
        level = logging.INFO if fine is None else logging.DEBUG  # a comparison is told of where it is made
        chosen = 0 if len(trials) == 1 else _best(trials, found, level)
        held_out = self._take(trials[chosen], images, processes, size)
        if self.roi is not None:
            self.roi.lowest.copy_(processes.gathered(held_out[:, 2]).min())
        return Fit(found[chosen], held_out, {trial.structure: trial.fine for trial in trials})

    @torch.no_grad()
    def refit(self, images: Images, size: Sequence[int] = (1, 1)) -> Tensor:
        """Refit on the fields of a changed network, with the same clusters, structure and components.

        It takes and returns what :meth:`fit` does, of which only :attr:`Fit.held_out`.
        """
        assert self.structure is not None
        trial = self._trial(self.structure, images, ALONE, labels=(self.density, self.fine_density))
        return self._take(trial, images, ALONE, size)

    def _samples(self, images: Images) -> Iterator[tuple[Sample, Sample]]:
        """Yield field and fine features with clusters and numbers."""
        for field, fine, numbers in images():
            cluster = self.clusters(fine.float())
            yield Sample(field.float(), cluster, numbers), Sample(fine.float(), cluster, numbers)

    def _trial(
        self,
        structure: str,
        images: Images,
        processes: DistributedContext,
        labels: tuple[nn.Module | None, nn.Module | None] = (None, None),
        fine: Mapping[str, FineFit | None] | None = None,
    ) -> _Trial:
        """Fit and cross-fit a structure; ``labels`` are mixtures whose components are kept, ``fine`` is fitted."""
        count = int(processes.add(torch.tensor(sum(len(numbers) for _, _, numbers in images()))))
        folds = min(FOLDS, count)

        def fields() -> Iterator[Sample]:
            return (field for field, _ in self._samples(images))

        def fines() -> Iterator[Sample]:
            return (Sample(fine.values, 0 * fine.cluster, fine.numbers) for _, fine in self._samples(images))

        if structure == "standard":
            field, fine_density = standard(folds), None
        elif structure == "position":
            field = fit_positions(fields(), self.clusters.count, folds, processes=processes)
            fine_density = None if fine else fit_positions(fines(), 1, folds, blocks=True, processes=processes)
        else:
            field = _mixture(fields, labels[0], count, _COMPONENTS, folds, processes)
            fine_density = None if fine else _mixture(fines, labels[1], count, _FINE_COMPONENTS, folds, processes)
        units, nll = _held_out_units(field, fields(), self.clusters.count, processes)
        fine_fit = fine[structure] if fine else None
        if fine_density is not None:
            fine_fit = FineFit(fine_density, _held_out_units(fine_density, fines(), 1, processes)[0])
        return _Trial(structure, field, units, nll, fine_fit)

    def _found(
        self, trial: _Trial, images: Images, painted: Callable[[], Iterable[Painted]], processes: DistributedContext
    ) -> Tensor:
        """Return the share of painted positions that is found, per image that has any, shape ``(N,)``."""
        highest = [
            _together(*trial.held_out(field, fine)).flatten(1).amax(dim=1) for field, fine in self._samples(images)
        ]
        threshold = processes.gathered(torch.cat(highest)).double().quantile(_NORMAL_QUANTILE)
        shares, numbers = [threshold.new_zeros(0)], [threshold.new_zeros(0, dtype=torch.int64)]
        for batch in painted():
            cluster = self.clusters(batch.fine.float())
            samples = [Sample(values.float(), cluster, batch.numbers) for values in (batch.field, batch.fine)]
            above = (_together(*trial.held_out(samples[0], samples[1])) > threshold) & batch.covered
            covered = batch.covered.flatten(1).sum(dim=1)
            shares.append(above.flatten(1).sum(dim=1)[covered > 0] / covered[covered > 0].double())
            numbers.append(batch.numbers[covered > 0])
        return processes.collected(torch.cat(shares), torch.cat(numbers))

    def _take(self, trial: _Trial, images: Images, processes: DistributedContext, size: Sequence[int]) -> Tensor:
        """Adopt a trial, fit the image score on held-out maps, and return :attr:`Fit.held_out`."""
        device = self.units.scale.device
        self.structure = trial.structure
        self.density = trial.field.density.to(device)
        self.units = trial.units.to(device)
        self.fine_density, self.fine_units = None, HeldOutUnits().to(device)
        if trial.fine is not None:
            self.fine_density = trial.fine.density.density.to(device)
            self.fine_units = trial.fine.units.to(device)
        parts = []
        for field, fine in self._samples(images):
            values, fine_values = trial.held_out(field, fine)
            extremes = extremes_of_maps(values, fine_values, size, self.roi)
            parts.append((self.image_score.terms(_together(values, fine_values)), field.cluster, extremes))
        terms, cluster, extremes = (torch.cat(part) for part in zip(*parts, strict=True))
        every = processes.gathered(terms)
        self.image_score.fit(every, processes.gathered(cluster), self.clusters.count)
        self.num_images = len(every)
        return torch.cat([self.image_score.of_terms(terms, cluster)[:, None], extremes], dim=1)

    # ------------------------------------------------------------------ state

    def buffers_in_use(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of the buffers that :meth:`refit` changes and scoring reads."""
        for name in ("density", "fine_density", "units", "fine_units", "image_score"):
            module = getattr(self, name)
            if module is not None and not (name == "fine_units" and self.fine_density is None):
                yield from module.named_buffers(prefix=name)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the state dict keeps besides tensors."""
        return {"num_images": self.num_images, "structure": self.structure}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.num_images, self.structure = state["num_images"], state["structure"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Build the densities that the state has, before their own state is loaded."""
        state = state_dict.get(f"{prefix}_extra_state") or {}
        device = self.units.scale.device
        self.density, self.fine_density = (
            None if one is None else one.to(device) for one in _densities(state.get("structure"))
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _densities(structure: str | None) -> tuple[nn.Module | None, nn.Module | None]:
    """Build the unfitted densities of field and fine features."""
    if structure == "position":
        return PositionGaussians(), PositionGaussians(blocks=True)
    if structure == "mixture":
        return PatchMixture(), PatchMixture()
    return (None if structure is None else StandardGaussian()), None


def _best(trials: Sequence[_Trial], found: Sequence[Tensor], level: int) -> int:
    """Choose by detection of painted anomalies on held-out images or, if that is not significant, by likelihood."""
    likelier = int(trials[1].nll < trials[0].nll)
    one, other = trials
    text = f"held-out negative log density {one.nll:.1f} ({one.structure}) and {other.nll:.1f} ({other.structure}) nats"
    if len(found[0]) < FOLDS:
        logger.log(level, "Density: %s, by its %s a position.", trials[likelier].structure, text)
        return likelier
    gain = significant_gain(found[0], found[1])
    chosen = int(gain < 0) if gain else likelier
    logger.log(
        level,
        "Density: %s. Of the anomalies painted on %d held-out images %s finds %.1f %% and %s %.1f %%; %s a position.",
        trials[chosen].structure,
        len(found[0]),
        one.structure,
        100 * float(found[0].mean()),
        other.structure,
        100 * float(found[1].mean()),
        text,
    )
    return chosen


def significant_gain(one: Tensor, other: Tensor) -> float:
    """Return how much more of the painted anomalies one model finds than another, by shares ``(N,)`` of each image.

    Within two standard errors it is 0.
    """
    difference = one - other
    gain, error = float(difference.mean()), float(difference.std(correction=1)) / sqrt(len(difference))
    return gain if abs(gain) > _STANDARD_ERRORS * error else 0.0


def _held_out_units(
    fitted: CrossFitted, samples: Iterable[Sample], clusters: int, processes: DistributedContext
) -> tuple[HeldOutUnits, float]:
    """Fit units on held-out values, and return the mean of these, in nats."""
    statistics: PositionStatistics | None = None
    sums = torch.zeros(2, dtype=torch.float64)
    for sample in samples:
        nll = fitted.held_out(sample)
        statistics = statistics or PositionStatistics(clusters, nll.shape[-2:], nll.device)
        statistics.update(nll, sample.cluster, sample.numbers)
        sums += torch.tensor([float(nll.double().mean(dim=(1, 2)).sum()), len(nll)], dtype=torch.float64)
    assert statistics is not None
    units = HeldOutUnits().to(statistics.sums.device)
    units.fit(*statistics.shrunk(processes))
    total, count = processes.add(sums)
    return units, float(total / count)


def _mixture(
    samples: Callable[[], Iterator[Sample]],
    kept: nn.Module | None,
    images: int,
    most: int,
    folds: int,
    processes: DistributedContext,
) -> CrossFitted:
    """Fit a mixture, with the components of a ``kept`` one if there is one."""
    if isinstance(kept, PatchMixture):
        return fit_mixture(samples(), lambda x: kept.components(x).argmin(dim=1), len(kept.constant), folds, processes)
    centres = patch_centres((sample.values for sample in samples()), images, most, processes)

    def nearest(x: Tensor) -> Tensor:
        patches = x.flatten(2).transpose(1, 2)
        return torch.cdist(patches, centres.expand(len(x), -1, -1)).argmin(dim=2)

    return fit_mixture(samples(), nearest, len(centres), folds, processes)


def _together(values: Tensor, fine_values: Tensor | None) -> Tensor:
    """Return the map on the field's grid, shape ``(B, h, w)``, whose values make the image score."""
    return values if fine_values is None else values + coarse(fine_values.unsqueeze(1)).squeeze(1)


def map_of(
    values: Tensor, fine_values: Tensor | None, size: Sequence[int], roi: RegionOfInterest | None = None
) -> Tensor:
    """Return the anomaly map ``(B, 1, H, W)``, outside of a region of interest the lowest of normal images."""
    anomaly_map = upsampled(values, size, roi)
    if fine_values is not None:
        anomaly_map = anomaly_map + upsampled(fine_values, size, roi)
    return anomaly_map if roi is None else torch.where(roi.mask, anomaly_map, roi.lowest)


def extremes_of_maps(
    values: Tensor, fine_values: Tensor | None, size: Sequence[int], roi: RegionOfInterest | None = None
) -> Tensor:
    """Return largest and smallest value of each map inside, shape ``(B, 2)``, few maps in memory at a time."""
    rows = []
    for start in range(0, len(values), _MAPS_AT_ONCE):
        chosen = slice(start, start + _MAPS_AT_ONCE)
        maps = map_of(values[chosen], None if fine_values is None else fine_values[chosen], size, roi).flatten(1)
        maps = maps if roi is None else maps[:, roi.mask.flatten()]
        rows.append(torch.stack([maps.amax(dim=1), maps.amin(dim=1)], dim=1))
    return torch.cat(rows)


def upsampled(values: Tensor, size: Sequence[int], roi: RegionOfInterest | None = None) -> Tensor:
    """Bring maps ``(B, h, w)``, or packed ones, to the size of the image, bilinearly: shape ``(B, 1, H, W)``."""
    maps = values.unsqueeze(1) if roi is None else roi.unpack(values)
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
