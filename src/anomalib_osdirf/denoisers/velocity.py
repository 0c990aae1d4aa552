# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A denoiser whose network predicts the velocity and not the noise (Salimans and Ho 2022, appendix D)."""

from torch import Tensor, nn

from anomalib_osdirf.diffusion import NoiseSchedule

PREDICTION_TYPES = ("v_prediction", "epsilon")


def noise_from_velocity(z_t: Tensor, velocity: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Noise eps = sqrt(1 - abar) z_t + sqrt(abar) v of the velocity v = sqrt(abar) eps - sqrt(1 - abar) z."""
    return noise * z_t + signal * velocity


class VelocityDenoiser(nn.Module):
    """Noise predictor around a network that predicts the velocity, see :func:`noise_from_velocity`.

    For white Gaussian features the best prediction of the velocity is zero: the network learns only what the features
    have beyond that. The predicted noise grows with z_t even where the network, which has layer norms, saturates.

    Args:
        network: Predicts the velocity v, called as ``network(z_t, timesteps)``.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        abar = NoiseSchedule().alphas_cumprod.double()
        self.register_buffer("signal", abar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - abar).sqrt().float(), persistent=False)

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise in z_t ``(B, D, h, w)`` at timesteps ``(B,)``, same shape."""
        signal, noise = (factors[timesteps][:, None, None, None] for factors in (self.signal, self.noise))
        return noise_from_velocity(z, self.network(z, timesteps), signal, noise)


class FoldedVelocityDenoiser(nn.Module):
    """A :class:`VelocityDenoiser` at one timestep, with its sqrt(abar) and sqrt(1 - abar), of shape ``()``."""

    signal: Tensor
    noise: Tensor

    def __init__(self, network: nn.Module, signal: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("signal", signal.clone())
        self.register_buffer("noise", noise.clone())

    def forward(self, z: Tensor) -> Tensor:
        """Predict the noise in z ``(B, D, h, w)`` at the folded timestep, same shape."""
        return noise_from_velocity(z, self.network(z), self.signal, self.noise)
