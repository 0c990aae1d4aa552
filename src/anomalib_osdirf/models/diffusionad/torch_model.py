# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The networks of DiffusionAD: image -> two noise scales -> norm-guided reconstruction -> segmentation -> map."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import gcd, lcm
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.draem.torch_model import DiscriminativeSubNetwork
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import sigmoid_focal_loss

from anomalib_osdirf.denoisers.ema import EMA
from anomalib_osdirf.denoisers.unet import copy_of_structure, fold_unet
from anomalib_osdirf.diffusion import NUM_TRAIN_TIMESTEPS, NoiseSchedule, norm_guided_estimate
from anomalib_osdirf.models.messages import NEVER_FITTED
from anomalib_osdirf.processes import ALONE, DistributedContext

_NOISE_SIZE = 256
_TOP_PIXELS = 50
_LARGEST_HEAD = 64
# The segmentation network halves an image five times, and its batch norms want more than one position.
_SIZE_STEP = 32
_SMALLEST_SIZE = 64


class Reconstruction(NamedTuple):
    """What the reconstruction network makes of a batch of images, all of shape ``(B, 3, H, W)``.

    It is the norm-guided estimate of the normal images, in [-1, 1], and the predicted noise at both scales.
    """

    image: Tensor
    predicted_noise_n: Tensor
    predicted_noise_b: Tensor


class NormGuidedReconstruction(nn.Module):
    """A UNet that predicts the noise in images, and the norm-guided reconstruction from its predictions.

    Args:
        base_channels: Channels of the first level.
        channel_multipliers: Channels of each level, as multiples of the first.
        residual_blocks: Residual blocks of each level.
        attention_levels: How many of the coarsest levels have self-attention.
        patch_size: Side of the squares of pixels that the network takes as one position, with their values as channels.
        pixel_deviation: Precondition the network for pixels that deviate so much from 0.5, see :meth:`predict_noise`.
        guidance_strength: Weight w of the norm guidance.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        base_channels: int,
        channel_multipliers: Sequence[int],
        residual_blocks: int,
        attention_levels: int,
        patch_size: int = 1,
        pixel_deviation: float | None = None,
        guidance_strength: float = 1.0,
    ) -> None:
        super().__init__()
        _check_sizes(base_channels, channel_multipliers, attention_levels)
        _check_positive(residual_blocks=residual_blocks, patch_size=patch_size)
        if not guidance_strength >= 0:
            msg = f"guidance_strength={guidance_strength} is negative; use 0 (no guidance) or a positive number."
            raise ValueError(msg)
        if pixel_deviation is not None and not pixel_deviation > 0:
            msg = f"pixel_deviation={pixel_deviation} is not positive; use a number above 0 such as 0.2, or null."
            raise ValueError(msg)
        # Imported here because diffusers takes seconds to import and `anomalib --help` must not pay for it.
        from diffusers import UNet2DModel

        plain_levels = len(channel_multipliers) - attention_levels
        self.patch_size = patch_size
        self.size_step = patch_size * 2 ** (len(channel_multipliers) - 1)  # that the UNet halves images of
        self.pixel_deviation = pixel_deviation
        self.guidance_strength = guidance_strength
        self.schedule = NoiseSchedule()
        self.unet: Any = UNet2DModel(
            in_channels=3 * patch_size**2,
            out_channels=3 * patch_size**2,
            layers_per_block=residual_blocks,
            block_out_channels=[base_channels * multiplier for multiplier in channel_multipliers],
            down_block_types=["DownBlock2D"] * plain_levels + ["AttnDownBlock2D"] * attention_levels,
            up_block_types=["AttnUpBlock2D"] * attention_levels + ["UpBlock2D"] * plain_levels,
            add_attention=attention_levels > 0,
            attention_head_dim=gcd(base_channels, _LARGEST_HEAD),
            norm_num_groups=gcd(base_channels // 4, 32),
        )

    def forward(self, images: Tensor, noise_n: Tensor, noise_b: Tensor, t_n: Tensor, t_b: Tensor) -> Reconstruction:
        """Reconstruct images from two noise scales, one evaluation of the network each.

        Args:
            images: Images in [0, 1], shape ``(B, 3, H, W)``.
            noise_n: Noise of the small scale, broadcastable to the images.
            noise_b: Noise of the big scale, likewise.
            t_n: Timesteps of the small scale, shape ``(B,)``.
            t_b: Timesteps of the big scale, shape ``(B,)``.

        Returns:
            The reconstruction and the noise predictions behind it.
        """
        abar_n, abar_b = (self.schedule.alphas_cumprod[t][:, None, None, None] for t in (t_n, t_b))
        z_n, z_b = (
            abar.sqrt() * images + (1 - abar).sqrt() * noise for abar, noise in ((abar_n, noise_n), (abar_b, noise_b))
        )
        # Both evaluations as one batch: they do not depend on each other.
        network = partial(self._network, self.unet, timesteps=torch.cat((t_n, t_b)))
        predicted = self.predict_noise(torch.cat((z_n, z_b)), torch.cat((abar_n, abar_b)), network)
        predicted_n, predicted_b = predicted.to(images.dtype).chunk(2)
        image = norm_guided_estimate(z_n, predicted_n, abar_n, z_b, predicted_b, abar_b, self.guidance_strength)
        return Reconstruction(image, predicted_n, predicted_b)

    def reconstruct(self, images: Tensor, noise: Tensor, abars: Tensor, unets: Sequence[Any]) -> Tensor:
        """Reconstruct images at two fixed timesteps, which have been folded into a UNet each: shape ``(B, 3, H, W)``.

        Noise ``(2, 3, H, W)`` and abar ``(2,)`` are those of the small and the big scale.
        """
        states = [abar.sqrt() * images + (1 - abar).sqrt() * field for abar, field in zip(abars, noise, strict=True)]
        predicted = [
            self.predict_noise(state, abar, partial(self._network, unet, timesteps=0))
            for state, abar, unet in zip(states, abars, unets, strict=True)
        ]
        return norm_guided_estimate(
            states[0], predicted[0], abars[0], states[1], predicted[1], abars[1], self.guidance_strength
        )

    def predict_noise(self, z: Tensor, abar: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Predict the noise in noised images, eps_theta(z, t).

        Without preconditioning it is what the network F returns. With it, F sees values of unit variance and has to
        return such, and no noise need pass through it (Karras et al., arXiv 2206.00364, equation 7); for a deviation s
        of the pixels, sigma^2 = 1 / abar - 1 and y = z / sqrt(abar) - 1/2,
            x0  = 1/2 + s^2 / (sigma^2 + s^2) y + sigma s / sqrt(sigma^2 + s^2) F(y / sqrt(sigma^2 + s^2), t)
            eps = (z - sqrt(abar) x0) / sqrt(1 - abar)
                = sigma / (sigma^2 + s^2) y - s / sqrt(sigma^2 + s^2) F(y / sqrt(sigma^2 + s^2), t).

        Args:
            z: Noised images, shape ``(B, 3, H, W)``.
            abar: abar at the timesteps, broadcastable to the images.
            network: F at the timesteps.

        Returns:
            Shape of ``z``.
        """
        if self.pixel_deviation is None:
            return network(z)
        variance = 1 / abar - 1
        total = variance + self.pixel_deviation**2
        y = z / abar.sqrt() - 0.5
        return variance.sqrt() / total * y - self.pixel_deviation / total.sqrt() * network(y / total.sqrt())

    def _network(self, unet: Any, z: Tensor, timesteps: Tensor | int) -> Tensor:
        output: Tensor = unet(functional.pixel_unshuffle(z, self.patch_size), timesteps).sample
        if self.patch_size == 1:
            return output
        # A pixel shuffle in other words: OpenVINO's CPU plugin forgets the precision of a real one.
        channels = output.shape[1]
        kernel = torch.eye(channels, dtype=output.dtype, device=output.device)
        kernel = kernel.reshape(channels, 3, self.patch_size, self.patch_size)
        return functional.conv_transpose2d(output, kernel, stride=self.patch_size)


class BlockMaximum(nn.Module):
    """Largest value of each 2 x 2 block: max pooling, whose precision OpenVINO's CPU plugin forgets, in other words."""

    def forward(self, values: Tensor) -> Tensor:
        """Map values ``(B, C, H, W)`` of even height and width to ``(B, C, H / 2, W / 2)``."""
        rows = torch.maximum(values[..., ::2, :], values[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class DiffusionADModel(nn.Module):
    """DiffusionAD as a torch module; other arguments are those of :class:`NormGuidedReconstruction`."""

    noise: Tensor
    num_steps: Tensor

    def __init__(
        self,
        segmentation_channels: int = 64,
        timestep_n: int = 200,
        timestep_b: int = 400,
        timestep_boundary: int = 300,
        ema_decay: float | None = None,
        noise_seed: int = 0,
        **reconstruction: Any,
    ) -> None:
        super().__init__()
        _check_positive(segmentation_channels=segmentation_channels)
        _check_timesteps(timestep_n, timestep_b, timestep_boundary)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay} is out of range; use 0 (no averaging) up to, but not, 1.")
        self.timesteps = (timestep_n, timestep_b)
        self.timestep_boundary = timestep_boundary
        network = NormGuidedReconstruction(**reconstruction)
        self.size_step = lcm(_SIZE_STEP, network.size_step)
        segmentation = DiscriminativeSubNetwork(6, 1, segmentation_channels)
        self.networks = nn.ModuleDict({"reconstruction": network, "segmentation": segmentation})
        # Convolutions of few channels are quicker with the channels last, on processors above all.
        self.networks.to(memory_format=torch.channels_last)
        self.ema = EMA(self.networks, ema_decay) if ema_decay else None
        generator = torch.Generator().manual_seed(noise_seed)
        self.register_buffer("noise", torch.randn(2, 3, _NOISE_SIZE, _NOISE_SIZE, generator=generator))
        self.register_buffer("num_steps", torch.tensor(0))

    def training_losses(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the losses, whose sum is to be minimised.

        Args:
            images: Normal images with anomalies painted onto some of them, in [0, 1], shape ``(B, 3, H, W)``.
            masks: 1 on the anomalies, else 0, shape ``(B, 1, H, W)``.
            generator: Source of timesteps and noise, on the images' device.

        Returns:
            Scalars: ``noise``, mean squared error of the predicted noise at both scales over images without anomaly;
            ``focal``, five times the focal loss (alpha 0.5, gamma 4) of the map; ``smooth_l1`` of the map.
        """
        self.check_size(images)
        reconstruction, noise = self._reconstruct_at_random(self.networks, images, generator)
        predicted = torch.stack((reconstruction.predicted_noise_n, reconstruction.predicted_noise_b))
        errors = (predicted - noise).square().mean(dim=(0, 2, 3, 4))
        normal = (masks.flatten(1).amax(dim=1) == 0).to(errors.dtype)
        logits = self.networks["segmentation"](torch.cat((images, reconstruction.image), dim=1)).to(images.dtype)
        return {
            "noise": 2 * (errors * normal).sum() / normal.sum().clamp_min(1),
            "focal": 5 * sigmoid_focal_loss(logits, masks, alpha=0.5, gamma=4, reduction="mean"),
            "smooth_l1": functional.smooth_l1_loss(logits.sigmoid(), masks),
        }

    def _reconstruct_at_random(
        self, networks: nn.ModuleDict, images: Tensor, generator: torch.Generator
    ) -> tuple[Reconstruction, Tensor]:
        """Reconstruct images at random timesteps, and return the noise, shape ``(2, B, 3, H, W)``, too."""
        count = images.shape[0]
        noise = torch.randn(2, *images.shape, generator=generator, device=images.device, dtype=images.dtype)
        t_n = torch.randint(self.timestep_boundary, (count,), generator=generator, device=images.device)
        t_b = torch.randint(
            self.timestep_boundary, NUM_TRAIN_TIMESTEPS, (count,), generator=generator, device=images.device
        )
        return networks["reconstruction"](images, noise[0], noise[1], t_n, t_b), noise

    @torch.no_grad()
    def fit_batch_norm(
        self, batches: Iterable[Tensor], generator: torch.Generator, processes: DistributedContext = ALONE
    ) -> None:
        """Recompute the batch-norm statistics of the scoring networks for their final weights.

        Running statistics lag behind changing weights, and averaged weights have none. Batches are training images
        ``(B, 3, H, W)`` in [0, 1] with anomalies painted onto some of them, equally many in each process.
        """
        networks = self.scoring_networks
        norms = [module for module in networks.modules() if isinstance(module, _BatchNorm)]
        before = [(norm.momentum, norm.training) for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        for images in batches:
            reconstruction, _ = self._reconstruct_at_random(networks, images, generator)
            networks["segmentation"](torch.cat((images, reconstruction.image), dim=1))
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None
                statistic.copy_(processes.mean(statistic))

    @property
    def scoring_networks(self) -> nn.ModuleDict:
        """The averaged networks, where there are, else the trained ones."""
        networks: Any = self.networks if self.ema is None else self.ema.module
        return networks

    @torch.no_grad()
    def after_step(self) -> None:
        """Count an optimiser step, and move the averaged networks."""
        self.num_steps += 1
        if self.ema is not None:
            self.ema.update_parameters(self.networks)

    def freeze(self) -> "DeployedDiffusionAD":
        """Return the networks that score: the averaged ones, where there are."""
        return DeployedDiffusionAD(self)

    def check_fitted(self) -> None:
        """Raise an error if the model was never trained."""
        if self.num_steps == 0:
            raise RuntimeError(NEVER_FITTED)

    def check_size(self, images: Tensor) -> None:
        """Raise an error if the networks can't take images of this size."""
        height, width = images.shape[-2:]
        if min(height, width) < _SMALLEST_SIZE or height % self.size_step or width % self.size_step:
            fitting = [max(_SMALLEST_SIZE, -(-side // self.size_step) * self.size_step) for side in (height, width)]
            raise ValueError(
                f"Images of {height} x {width} pixels do not fit the networks; give a pre_processor that resizes to "
                f"multiples of {self.size_step} from {_SMALLEST_SIZE} on, such as {fitting[0]} x {fitting[1]}."
            )

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images, see :meth:`DeployedDiffusionAD.forward`."""
        self.check_fitted()
        self.check_size(images)
        batch: InferenceBatch = self.freeze()(images)
        return batch


class DeployedDiffusionAD(nn.Module):
    """The part of a trained model that scores images, and is exported; networks and noise are shared."""

    noise: Tensor
    abars: Tensor

    def __init__(self, model: DiffusionADModel) -> None:
        super().__init__()
        networks: Any = model.scoring_networks
        self.reconstruction = networks["reconstruction"]
        self.unets = nn.ModuleList(fold_unet(self.reconstruction.unet, timestep) for timestep in model.timesteps)
        self.segmentation = copy_of_structure(networks["segmentation"])
        for owner in list(self.segmentation.modules()):
            for name, child in owner.named_children():
                if isinstance(child, nn.MaxPool2d):
                    setattr(owner, name, BlockMaximum())
        self.register_buffer("abars", self.reconstruction.schedule.alphas_cumprod[list(model.timesteps)])
        self.register_buffer("noise", model.noise)
        self.train(model.training)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1].

        The score ``(B,)`` is the mean of the 50 largest pixels of the map ``(B, 1, H, W)``, which is in [0, 1].
        """
        height, width = images.shape[-2:]
        # Larger images than the fields repeat them.
        repeats = (-(-height // _NOISE_SIZE), -(-width // _NOISE_SIZE))
        noise = self.noise.repeat(1, 1, *repeats)[..., :height, :width]
        reconstruction = self.reconstruction.reconstruct(images, noise, self.abars, list(self.unets))
        anomaly_map = self.segmentation(torch.cat((images, reconstruction), dim=1)).sigmoid()
        top = anomaly_map.flatten(1).topk(min(_TOP_PIXELS, height * width)).values
        return InferenceBatch(pred_score=top.mean(dim=1), anomaly_map=anomaly_map)


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value} is not a positive whole number; use 1 or more.")


def _check_sizes(base_channels: int, channel_multipliers: Sequence[int], attention_levels: int) -> None:
    if base_channels < 8 or base_channels % 8:
        raise ValueError(f"base_channels={base_channels} is not a positive multiple of 8; use 8, 16, 32, ...")
    if not channel_multipliers or not all(isinstance(one, int) and one > 0 for one in channel_multipliers):
        msg = f"channel_multipliers={list(channel_multipliers)} must be positive whole numbers, one for each level."
        raise ValueError(msg)
    if not 0 <= attention_levels <= len(channel_multipliers):
        msg = f"attention_levels={attention_levels} is out of range; use 0 to {len(channel_multipliers)}, the levels."
        raise ValueError(msg)


def _check_timesteps(timestep_n: int, timestep_b: int, boundary: int) -> None:
    if not 0 < boundary < NUM_TRAIN_TIMESTEPS:
        msg = f"timestep_boundary={boundary} is outside the noise schedule; use 1 to {NUM_TRAIN_TIMESTEPS - 1}."
        raise ValueError(msg)
    if not 0 <= timestep_n < boundary:
        raise ValueError(f"timestep_n={timestep_n} is not below timestep_boundary={boundary}; use 0 to {boundary - 1}.")
    if not boundary <= timestep_b < NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"timestep_b={timestep_b} is not from timestep_boundary={boundary} on; use {boundary} to "
            f"{NUM_TRAIN_TIMESTEPS - 1}."
        )
