# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""From the image to the field: frozen backbone, PCA, and the denoiser at fixed timesteps."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_osdirf.denoisers import build_denoiser, fold
from anomalib_osdirf.denoisers.ema import EMA
from anomalib_osdirf.diffusion import NUM_TRAIN_TIMESTEPS, NoiseSchedule, explained_share, linear_denoiser_loss
from anomalib_osdirf.features import Backbone, PCAProjection, build_backbone, coarse
from anomalib_osdirf.models.region import RegionOfInterest, blank, pack
from anomalib_osdirf.processes import ALONE, DistributedContext

# Where the share of the noise that the denoiser explains is measured: at smaller timesteps there is hardly any noise,
# at larger ones hardly any signal.
_JUDGED_TIMESTEPS = (100, 200, 300, 400, 500)

# The denoiser at each timestep, features z, and abar of each timestep, to the field.
ReadField = Callable[[Sequence[Callable[[Tensor], Tensor]], Tensor, Sequence[float]], Tensor]


class FieldNetwork(nn.Module):
    """A denoiser on the features of a frozen backbone, and the field that is read from it.

    Of the denoiser there are three sets of weights: ``denoiser`` is trained, ``ema`` averages it, and ``kept`` is the
    average at the step that :meth:`explained_share` was best at. ``kept`` gives the field.

    Args:
        read: Pure function that reads the field, such as :func:`~anomalib_osdirf.diffusion.ddim_inversion`.
        timesteps: Timesteps that the denoiser is evaluated at.
        backbone: timm model name, or ``filter_bank``.
        layers: Layers of the backbone; ``None`` takes those of :func:`~anomalib_osdirf.features.build_backbone`.
        feature_dim: Number of principal components; ``None`` keeps all channels, standardised.
        whiten: Scale the components to unit variance.
        grid_size: Side of the field's grid; fine features have twice as many positions a side.
        denoiser: Name of the denoiser.
        prediction_type: What its network predicts.
        ema_decay: Decay of the denoiser's exponential moving average.
        roi: Region of interest, which a training reads; with one, field and fine features are of positions inside, as
            :class:`~anomalib_osdirf.models.region.RegionOfInterest` packs them. ``None`` is the whole image.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    kept_share: Tensor
    kept_step: Tensor
    variance: Tensor

    def __init__(
        self,
        read: ReadField,
        timesteps: Sequence[int],
        backbone: str,
        layers: Sequence[str] | None,
        feature_dim: int | None,
        whiten: bool,
        grid_size: int,
        denoiser: str,
        prediction_type: str,
        ema_decay: float,
        roi: object = None,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} is out of range; use 0 (no averaging) up to, but not, 1.")
        self.read = read
        self.timesteps = list(timesteps)
        self.backbone = build_backbone(backbone, layers, grid_size)
        self.projection = PCAProjection(self.backbone.out_channels, feature_dim, whiten)
        self.roi = None if roi is None else RegionOfInterest()
        self.schedule = NoiseSchedule()
        dim = self.projection.out_channels
        self._build_denoiser = partial(build_denoiser, denoiser, dim, grid_size, prediction_type)
        self.denoiser = self._build_denoiser()
        self.ema = EMA(self.denoiser, ema_decay)
        self.kept = copy.deepcopy(self.denoiser).requires_grad_(requires_grad=False)
        self.register_buffer("kept_share", torch.tensor(float("nan")))
        self.register_buffer("kept_step", torch.tensor(0))
        self.register_buffer("variance", torch.ones(dim))  # of each channel of z on the field's grid

    # ------------------------------------------------------------------ image to field

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        """Fine features ``(B, C, 2 h, 2 w)`` of the backbone, before PCA, of pre-processed ``(B, 3, H, W)``."""
        features: Tensor = self.backbone(blank(self.roi, self._precise(images)))
        return features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return field and fine features of images ``(B, 3, H, W)``, see :meth:`fields_of`."""
        return self.fields_of(self.extract_features(images))

    def fields_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return field and fine features of what :meth:`extract_features` returned.

        The field ``(B, D, h, w)`` is in noise standard deviations; fine features are ``(B, D, 2 h, 2 w)``, after PCA.
        """
        fine: Tensor = self.projection(self._precise(features))
        denoisers = [partial(self._predicted_noise, timestep) for timestep in self.timesteps]
        field = self.read(denoisers, coarse(fine), [self.schedule.abar(timestep) for timestep in self.timesteps])
        return pack(self.roi, field), pack(self.roi, fine)

    def fine_features(self, features: Tensor) -> Tensor:
        """Return the fine features alone, see :meth:`fields_of`."""
        return pack(self.roi, self.projection(self._precise(features)))

    def _predicted_noise(self, timestep: int, z: Tensor) -> Tensor:
        timesteps = torch.full((len(z),), timestep, device=z.device)
        predicted: Tensor = self.kept(z, timesteps)
        return predicted

    def freeze(self) -> "FrozenFieldNetwork":
        """Return the same network for deployment: batch norms and timesteps folded in, no training weights."""
        return FrozenFieldNetwork(self)

    def _precise(self, values: Tensor) -> Tensor:
        """Convert a batch back from the trainer's half precision."""
        return values.to(self.projection.weight.dtype)

    # ------------------------------------------------------------------ training

    def training_loss(
        self,
        features: Tensor,
        generator: torch.Generator,
        processes: DistributedContext = ALONE,
        total: int | None = None,
    ) -> Tensor:
        """DDPM objective: mean squared error of the predicted noise at random timesteps (Ho et al. 2020, eq. 14).

        Distributed processes draw timesteps and noise of the whole batch and keep their part, so that they train on
        what one process would. On a CPU with bfloat16 instructions the denoiser computes in those, at twice the speed.

        Args:
            features: Fine features of normal images, shape ``(B, C, 2 h, 2 w)``, this process's part of the batch.
            generator: Source of timesteps and noise, on the features' device, alike in all processes.
            processes: Distributed context.
            total: Number of images in the whole batch; ``None`` for B.

        Returns:
            Scalar loss, whose mean over the processes is that of the batch.
        """
        z = self.projection(coarse(self._precise(features)))
        total = total or z.shape[0]
        noise = torch.randn(total, *z.shape[1:], generator=generator, device=z.device, dtype=z.dtype)
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (total,), generator=generator, device=z.device)
        noise, timesteps = processes.part(noise), processes.part(timesteps)
        noised = self.schedule.add_noise(z, noise, timesteps).to(next(self.denoiser.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=z.device.type == "cpu" and _has_bfloat16()):
            predicted = self.denoiser(noised, timesteps)
        predicted, noise = (pack(self.roi, values.float()) for values in (predicted, noise))
        return processes.weight(total) * functional.mse_loss(predicted, noise)

    @torch.no_grad()
    def explained_share(self, features: Tensor, processes: DistributedContext = ALONE) -> float:
        """Share of a linear denoiser's residual noise that the averaged denoiser explains.

        0 means no gain over the variances of the principal components, which the densities know, too. On held-out
        images, a positive share is structure that generalises.

        Args:
            features: Coarse features of normal images, shape ``(B, C, h, w)``, this process's; they may be none.
            processes: Distributed context.

        Returns:
            At most 1; the same in all processes.
        """
        denoiser: Any = self.ema.module
        generator = torch.Generator(features.device).manual_seed(0)
        timesteps = torch.tensor(_JUDGED_TIMESTEPS, device=features.device)
        losses = torch.zeros(len(timesteps), dtype=torch.float64, device=features.device)
        z = self.projection(self._precise(features))
        for index, timestep in enumerate(timesteps if len(z) else ()):
            noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
            asked = timestep.expand(len(z))
            predicted = denoiser(self.schedule.add_noise(z, noise, asked), asked)
            losses[index] = pack(self.roi, predicted.float() - noise).square().mean() * len(z)
        count = processes.add(torch.tensor(len(z), device=features.device))
        baseline = linear_denoiser_loss(self.schedule.alphas_cumprod[timesteps], self.variance)
        return float(explained_share(processes.add(losses) / count, baseline.double()))

    def keep(self, share: float, step: int) -> None:
        """Keep the averaged weights of a step, of this :meth:`explained_share` or NaN, for the field."""
        self.kept.load_state_dict(self.ema.module.state_dict())
        self.kept_share.fill_(share)
        self.kept_step.fill_(step)

    def remove_denoiser(self) -> None:
        """Replace the kept denoiser by an untrained one, whose field is the scaled features (velocity prediction)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights in every process and training
            untrained = self._build_denoiser()
        self.kept.load_state_dict(untrained.state_dict())
        self.kept_share.fill_(0)
        self.kept_step.fill_(0)


class FrozenFieldNetwork(nn.Module):
    """A trained :class:`FieldNetwork` for deployment."""

    def __init__(self, network: FieldNetwork) -> None:
        super().__init__()
        self.backbone: Backbone = network.backbone.folded()
        self.projection = network.projection
        self.roi = network.roi
        self.denoisers = nn.ModuleList(fold(network.kept, timestep) for timestep in network.timesteps)
        self.abars = [network.schedule.abar(timestep) for timestep in network.timesteps]
        self.read = network.read

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FieldNetwork.forward`."""
        fine = self.backbone(blank(self.roi, images), self.projection)
        field = self.read(list(self.denoisers), coarse(fine), self.abars)
        return pack(self.roi, field), pack(self.roi, fine)


def _has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions; without them bfloat16 is slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - as torch's own compiler asks
