# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The network of OSD-IRF: image -> features -> one evaluation of the denoiser -> density -> map and score."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from anomalib_osdirf.denoisers import build_denoiser, fold
from anomalib_osdirf.denoisers.ema import EMAUpdate
from anomalib_osdirf.density import IMAGE_SCORES, build_density, image_score
from anomalib_osdirf.diffusion import (
    NUM_TRAIN_TIMESTEPS,
    STATES,
    NoiseSchedule,
    diffusion_state,
    inverse_residual_field,
)
from anomalib_osdirf.features import PCAWhitening, build_backbone
from anomalib_osdirf.models.messages import NEVER_FITTED


class OSDIRFModel(nn.Module):
    """OSD-IRF as a torch module.

    Args:
        backbone: timm model name, or ``filter_bank``.
        layers: Layers of the backbone; ``None`` takes those of stride 2 to 16.
        feature_dim: PCA rank; ``None`` keeps all channels, standardised only.
        grid_size: Side of the feature grid.
        denoiser: Name of the denoiser.
        timestep: Timestep t at which the field is read, 0 to 999.
        state: What the denoiser is asked about: ``clean`` features z or ``scaled`` ones, sqrt(abar_t) z.
        density: Gaussian of the field.
        image_score: How the map becomes one score.
        ema_decay: Decay of the denoiser's exponential moving average.

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
        timestep: int,
        state: str,
        density: str,
        image_score: str,
        ema_decay: float,
    ) -> None:
        super().__init__()
        if not 0 <= timestep < NUM_TRAIN_TIMESTEPS:
            msg = f"timestep={timestep} is outside the noise schedule; use 0 to {NUM_TRAIN_TIMESTEPS - 1}."
            raise ValueError(msg)
        if state not in STATES:
            msg = f"state={state!r} is unknown; use one of {', '.join(STATES)}."
            raise ValueError(msg)
        if image_score not in IMAGE_SCORES:
            msg = f"image_score={image_score!r} is unknown; use one of {', '.join(IMAGE_SCORES)}."
            raise ValueError(msg)
        if not 0 <= ema_decay < 1:
            msg = f"ema_decay={ema_decay} is out of range; use 0 (no averaging) up to, but not, 1."
            raise ValueError(msg)
        self._deployed: tuple[DeployedOSDIRF] | None = None
        self.timestep = timestep
        self.state = state
        self.image_score = image_score
        self.backbone = build_backbone(backbone, layers, grid_size)
        self.whitening = PCAWhitening(self.backbone.out_channels, feature_dim)
        self.schedule = NoiseSchedule()
        self.abar = self.schedule.abar(timestep)
        dim = self.whitening.out_channels
        self.denoiser = build_denoiser(denoiser, dim, grid_size)
        self.ema = AveragedModel(self.denoiser, multi_avg_fn=EMAUpdate(ema_decay)).requires_grad_(requires_grad=False)
        self.density = build_density(density, dim, grid_size)

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        """Backbone features on the grid, before whitening.

        Args:
            images: Pre-processed images, shape ``(B, 3, H, W)``.

        Returns:
            Shape ``(B, C, h, w)``.
        """
        return self.backbone.pool(self.backbone(images))

    def training_loss(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """DDPM objective: mean squared error of the predicted noise at random timesteps (Ho et al. 2020, eq. 14).

        Args:
            features: Backbone features of normal images, shape ``(B, C, h, w)``.
            generator: Source of timesteps and noise, on the features' device.

        Returns:
            Scalar loss.
        """
        z = self.whitening(features)
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (z.shape[0],), generator=generator, device=z.device)
        prediction = self.denoiser(self.schedule.add_noise(z, noise, timesteps), timesteps)
        return functional.mse_loss(prediction.float(), noise.float())

    def field(self, features: Tensor) -> Tensor:
        """Inverse residual field of the averaged denoiser: one evaluation.

        Args:
            features: Backbone features, shape ``(B, C, h, w)``.

        Returns:
            Shape ``(B, D, h, w)``, in noise standard deviations.
        """
        z = self.whitening(features)
        return inverse_residual_field(self.ema.module, z, self.timestep, self.abar, self.state)

    def deployed(self) -> "DeployedOSDIRF":
        """Return the network that scores: no training weights, the timestep folded into the averaged denoiser.

        It is built when first asked for, and anew after a change of weights, device or precision.
        """
        if self._deployed is None:
            # In a tuple, because it shares submodules and must not show up in the state dict.
            self._deployed = (DeployedOSDIRF(self),)
        return self._deployed[0]

    def train(self, mode: bool = True) -> "OSDIRFModel":
        """Switch between training and evaluation; training changes weights."""
        if mode:
            self._deployed = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OSDIRFModel":
        """Convert weights, as every move to a device or precision does."""
        self._deployed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's own signature
        """Load weights, of this module alone or as a part of another."""
        self._deployed = None
        super()._load_from_state_dict(*args, **kwargs)

    def check_fitted(self) -> None:
        """Raise an error if the density was never fitted.

        Raises:
            RuntimeError: If so.
        """
        if self.density.num_images == 0:
            raise RuntimeError(NEVER_FITTED)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images, see :meth:`DeployedOSDIRF.forward`.

        Raises:
            RuntimeError: If the density was never fitted.
        """
        self.check_fitted()
        batch: InferenceBatch = self.deployed()(images)
        return batch


class DeployedOSDIRF(nn.Module):
    """The part of a fitted :class:`OSDIRFModel` that scores images, and that is exported.

    Args:
        model: The fitted model, whose whitening and density are shared.
    """

    def __init__(self, model: OSDIRFModel) -> None:
        super().__init__()
        self.backbone = model.backbone.folded()
        self.whitening = model.whitening
        self.denoiser = fold(model.ema.module, model.timestep)
        self.density = model.density
        self.abar = model.abar
        self.state = model.state
        self.image_score = model.image_score

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images: Pre-processed images, shape ``(B, 3, H, W)``.

        Returns:
            ``pred_score`` of shape ``(B,)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``, both negative log
            densities in nats.
        """
        z = self.whitening(self.backbone.pool(self.backbone(images)))
        field = self.denoiser(diffusion_state(z, self.abar, self.state))
        return self.read_out(field, images.shape[-2:])

    def read_out(self, field: Tensor, size: Sequence[int]) -> InferenceBatch:
        """Turn fields into scores and maps.

        Args:
            field: Inverse residual fields, shape ``(B, D, h, w)``.
            size: Height and width of the maps.

        Returns:
            See :meth:`forward`.
        """
        nll = self.density(field.float())
        anomaly_map = functional.interpolate(nll[:, None], size=tuple(size), mode="bilinear", align_corners=False)
        return InferenceBatch(pred_score=image_score(nll, self.image_score), anomaly_map=anomaly_map)
