# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The network that every model on frozen features shares: image -> features -> field of the denoiser -> read-out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from anomalib_osdirf.denoisers import build_denoiser
from anomalib_osdirf.denoisers.dit import DiTBlock
from anomalib_osdirf.denoisers.ema import EMA
from anomalib_osdirf.density import Density, FittedDensity, PositionMixture, StandardisedSum, SumByKind, build_density
from anomalib_osdirf.diffusion import NUM_TRAIN_TIMESTEPS, NoiseSchedule
from anomalib_osdirf.features import PCAWhitening, StreamingMoments, build_backbone
from anomalib_osdirf.models import tiles
from anomalib_osdirf.models.messages import NEVER_FITTED
from anomalib_osdirf.processes import ALONE, Processes

_TILES_AT_ONCE = 16


class FeatureNetwork(nn.Module, ABC):
    """A denoiser on the features of a frozen backbone, and the Gaussian of the field that is read out of it.

    Args:
        backbone: timm model name, or ``filter_bank``.
        layers: Layers of the backbone; ``None`` takes those of stride 2 to 16.
        feature_dim: PCA rank; ``None`` keeps all channels, standardised only.
        grid_size: Side of the feature grid.
        denoiser: Name of the denoiser.
        prediction_type: What its network predicts.
        density: Gaussian of the field.
        ema_decay: Decay of the denoiser's exponential moving average.
        shrinkage: What its covariance is shrunk towards and how much, see
            :class:`~anomalib_osdirf.density.PositionGaussian`.
        num_clusters: How many kinds of image a mixture tells apart, see
            :class:`~anomalib_osdirf.density.PositionMixture`.
        whiten: Scale the principal components to unit variance.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] | None,
        feature_dim: int | None,
        grid_size: int,
        denoiser: str,
        prediction_type: str,
        density: str,
        ema_decay: float,
        shrinkage: float | str = "oas",
        num_clusters: int | str = "auto",
        whiten: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            msg = f"ema_decay={ema_decay} is out of range; use 0 (no averaging) up to, but not, 1."
            raise ValueError(msg)
        self._deployed: tuple[ReadOutNetwork] | None = None
        self.tiler: Tiler | None = None
        self.backbone = build_backbone(backbone, layers, grid_size)
        self.whitening = PCAWhitening(self.backbone.out_channels, feature_dim, whiten)
        self.schedule = NoiseSchedule()
        dim = self.whitening.out_channels
        self._build_denoiser = partial(build_denoiser, denoiser, dim, grid_size, prediction_type)
        self.denoiser = self._build_denoiser()
        self.ema = EMA(self.denoiser, ema_decay)
        self.density = build_density(density, dim, grid_size, shrinkage, num_clusters)

    def build_sum(self, num_terms: int) -> StandardisedSum | SumByKind:
        """Build what sums the terms of an image's score, by constants of its kind where a mixture tells kinds apart."""
        return (SumByKind if isinstance(self.density, PositionMixture) else StandardisedSum)(num_terms)

    @abstractmethod
    def deploy(self) -> "ReadOutNetwork":
        """Build the network that scores from the present weights."""

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        """Backbone features on the grid, before PCA.

        Args:
            images: Pre-processed images, shape ``(B, 3, H, W)``.

        Returns:
            Shape ``(B, C, h, w)``.
        """
        return self.backbone.pool(self.backbone(self._precise(images)))

    def training_loss(
        self, features: Tensor, generator: torch.Generator, processes: Processes = ALONE, total: int | None = None
    ) -> Tensor:
        """DDPM objective: mean squared error of the predicted noise at random timesteps (Ho et al. 2020, eq. 14).

        Several processes draw timesteps and noise of the whole batch and keep their part, so that they train on what
        one process would.

        Args:
            features: Backbone features of normal images, shape ``(B, C, h, w)``, this process's part of the batch.
            generator: Source of timesteps and noise, on the features' device, alike in all processes.
            processes: Who has the other parts.
            total: Number of images in the whole batch; ``None`` for B.

        Returns:
            Scalar loss, whose mean over the processes is that of the batch.
        """
        z = self.whitening(self._precise(features))
        total = total or z.shape[0]
        noise = torch.randn(total, *z.shape[1:], generator=generator, device=z.device, dtype=z.dtype)
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (total,), generator=generator, device=z.device)
        noise, timesteps = processes.part(noise), processes.part(timesteps)
        noised = self.schedule.add_noise(z, noise, timesteps).to(next(self.denoiser.parameters()).dtype)
        error = functional.mse_loss(self.denoiser(noised, timesteps).float(), noise.float())
        return processes.weight(total) * error

    def shard(self, mesh: Any) -> None:  # noqa: ANN401
        """Leave each process a part of the weights of the denoiser and of its average (FSDP).

        Args:
            mesh: One-dimensional device mesh of the processes.
        """
        from torch.distributed.fsdp import fully_shard

        for network in (self.denoiser, self.ema.module):
            for block in [module for module in network.modules() if isinstance(module, DiTBlock)]:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)

    def averaged_denoiser(self) -> nn.Module:
        """Return the averaged denoiser, put together where each process has a part; all processes call this then."""
        averaged: nn.Module = self.ema.module
        state = averaged.state_dict()
        parts = [value for value in state.values() if isinstance(value, DTensor)]
        if not parts:
            return averaged
        whole = self._build_denoiser().to(parts[0].device, parts[0].dtype).requires_grad_(requires_grad=False)
        whole.load_state_dict(
            {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
        )
        return whole

    def deployed(self) -> "ReadOutNetwork":
        """Return the network that scores: no training weights, the timesteps folded into the averaged denoiser.

        It is built when first asked for, and anew after a change of weights, device or precision.
        """
        if self._deployed is None:
            # In a tuple, because it shares submodules and must not show up in the state dict.
            self._deployed = (self.deploy(),)
        self._deployed[0].tiler = self.tiler
        return self._deployed[0]

    def tiles_of(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the tiles of pre-processed images, some at a time, or the images where there is no tiler.

        Args:
            images: Shape ``(B, 3, H, W)``.

        Yields:
            Shape ``(b, 3, h, w)``, all tiles of an image one after the other.
        """
        if self.tiler is None:
            yield images
        else:
            yield from tiles.cut(self.tiler, images).split(_TILES_AT_ONCE)

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Switch between training and evaluation; training changes weights."""
        if mode:
            self._deployed = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureNetwork":
        """Convert weights, as every move to a device or precision does.

        Half precision is for the denoiser that is trained: statistics, density and the slow average would lose what
        they are there for.
        """
        self._deployed = None
        if recurse:
            for name, child in self.named_children():
                child._apply(fn if name == "denoiser" else partial(_unless_half, fn))  # noqa: SLF001
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = _unless_half(fn, buffer)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's own signature
        """Load weights, of this module alone or as a part of another."""
        self._deployed = None
        super()._load_from_state_dict(*args, **kwargs)

    def _precise(self, values: Tensor) -> Tensor:
        """Undo what a trainer's half precision does to its batches."""
        return values.to(self.whitening.weight.dtype)

    def check_fitted(self) -> None:
        """Raise an error if the density was never fitted.

        Raises:
            RuntimeError: If so.
        """
        if self.density.num_images == 0:
            raise RuntimeError(NEVER_FITTED)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images, see :meth:`ReadOutNetwork.forward`, in the precision of the density's fit: without autocast.

        Raises:
            RuntimeError: If the density was never fitted.
        """
        self.check_fitted()
        with torch.autocast(images.device.type, enabled=False):
            batch: InferenceBatch = self.deployed()(self._precise(images))
        return batch


class ReadOutNetwork(nn.Module, ABC):
    """The part of a fitted :class:`FeatureNetwork` that scores images, and that is exported.

    Args:
        model: The fitted model, whose whitening and density are shared.
    """

    details_size: int | None = None  # side of the grid of what the read-out looks at besides the field
    density: Density
    score: StandardisedSum | SumByKind
    tiler: Tiler | None = None

    def __init__(self, model: FeatureNetwork) -> None:
        super().__init__()
        self.backbone = model.backbone.folded()
        self.whitening = model.whitening
        self.density = model.density

    @abstractmethod
    def field(self, z: Tensor) -> Tensor:
        """Ask the denoiser about features.

        Args:
            z: Features after PCA, shape ``(B, D, h, w)``.

        Returns:
            The field that is scored, same shape.
        """

    @abstractmethod
    def read_out(self, field: Tensor, size: Sequence[int], details: Tensor | None = None) -> InferenceBatch:
        """Turn fields into scores and maps.

        Args:
            field: Fields, shape ``(B, D, h, w)``.
            size: Height and width of the maps.
            details: What :meth:`details_of` returned.

        Returns:
            See :meth:`forward`.
        """

    def details_of(self, images: Tensor) -> Tensor | None:
        """Return what the read-out looks at besides the field of pre-processed images ``(B, 3, H, W)``, if anything."""
        return self._details(self.backbone.maps(images))

    def _details(self, maps: list[Tensor]) -> Tensor | None:
        """Return what the read-out looks at besides the field, from the backbone's maps."""
        del maps
        return None

    def fit_details(self, moments: StreamingMoments) -> None:
        """Fit what the read-out needs for its details.

        Args:
            moments: Moments of the details at each position, ``mean`` of shape ``(P, D)``.
        """

    def field_of(self, features: Tensor) -> Tensor:
        """Return the field of backbone features on the grid, shape ``(B, C, h, w)``."""
        return self.field(self.whitening(features))

    def find_kinds(self, z: Callable[[], Iterable[Tensor]], processes: Processes = ALONE) -> None:
        """Find the kinds of image that a mixture tells apart, before :meth:`fit`; other densities have one.

        Args:
            z: Returns the features z of all training images in batches ``(B, D, h, w)``, whenever it is called.
            processes: Who has those of the other images.
        """
        if isinstance(self.density, PositionMixture):
            self.density.cluster(lambda: map(self.whitening.rescaled, z()), lambda: map(self.field, z()), processes)

    def fit(self, fields: Callable[[], Iterable[Tensor]], processes: Processes = ALONE) -> Callable[[], Density]:
        """Fit the density on the fields of normal training images, then the constants of an image score that has any.

        Those of a mixture's kinds are fitted on images left out of their Gaussians, which suit the images of a small
        kind far better than others of the same kind, those of a large one hardly.

        Args:
            fields: Returns the fields of all training images in batches ``(B, D, h, w)``, whenever it is called.
            processes: Who has the fields of the other images.

        Returns:
            What makes a density for these images, each as if it had been left out of the fit.
        """
        density, score = self.density, self.score
        assert isinstance(density, FittedDensity)
        left_out = density.fit(fields(), processes)
        if isinstance(density, PositionMixture):
            assert isinstance(score, SumByKind)
            with self.leaving_out(left_out, None):
                images = ((self.terms_of(field.float()), density.choose(field.float())) for field in fields())
                score.fit(images, density.num_kinds, processes)
        elif self.has_constants:
            assert isinstance(score, StandardisedSum)
            score.fit((self.terms_of(field.float()) for field in fields()), processes)
        return left_out

    @property
    def has_constants(self) -> bool:
        """Whether the score's constants are fitted."""
        return True

    @abstractmethod
    def terms_of(self, field: Tensor) -> Tensor:
        """Return what the image score of fields ``(B, D, h, w)`` is summed of, shape ``(B, terms)``."""

    def total(self, terms: Tensor, field: Tensor) -> Tensor:
        """Return the image scores, shape ``(B,)``.

        Args:
            terms: What they are summed of, shape ``(B, terms)``.
            field: The images' fields, shape ``(B, D, h, w)``, which tell their kinds where there are several.
        """
        kind = self.density.choose(field)
        total: Tensor = self.score(terms) if kind is None else self.score(terms, kind)
        return total

    @contextmanager
    def leaving_out(self, fields: Callable[[], Density], details: StreamingMoments | None) -> Iterator[None]:
        """Score training images as if each were left out of the densities' fit, as long as the context lasts.

        Args:
            fields: What :meth:`fit` returned.
            details: What :meth:`fit_details` was given, if it was.
        """
        del details
        kept, self.density = self.density, fields()
        try:
            yield
        finally:
            self.density = kept

    def fitted_buffers(self) -> dict[str, Tensor]:
        """Return what :meth:`fit` has set, as far as :meth:`read_out` uses it."""
        return self.density.buffers_in_use()

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images, or their tiles: the score of an image is then that of its worst tile.

        Args:
            images: Pre-processed images, shape ``(B, 3, H, W)``.

        Returns:
            ``pred_score`` of shape ``(B,)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``.
        """
        if self.tiler is None:
            return self._score(images)
        parts = [self._score(some)._asdict() for some in tiles.cut(self.tiler, images).split(_TILES_AT_ONCE)]
        scores, maps = (torch.cat([part[name] for part in parts]) for name in ("pred_score", "anomaly_map"))
        return InferenceBatch(pred_score=scores.view(len(images), -1).amax(dim=1), anomaly_map=self.tiler.untile(maps))

    def _score(self, images: Tensor) -> InferenceBatch:
        """Score images, or tiles as if each were an image."""
        maps = self.backbone.maps(images)
        field = self.field_of(self.backbone.pool(self.backbone.coarse(maps)))
        return self.read_out(field, images.shape[-2:], self._details(maps))


def _unless_half(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a conversion, but for its precision if that is half."""
    converted = fn(tensor)
    return tensor.to(converted.device) if converted.dtype in {torch.float16, torch.bfloat16} else converted


def upsampled(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Bring values ``(B, 1, h, w)`` to the size of the image, bilinearly: shape ``(B, 1, H, W)``."""
    return functional.interpolate(grid, size=tuple(size), mode="bilinear", align_corners=False)
