# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A denoiser whose network predicts the velocity and not the noise (Salimans and Ho 2022, appendix D)."""

from torch import Tensor, nn

from anomalib_osdirf.diffusion import NoiseSchedule

PREDICTION_TYPES = ("v_prediction", "epsilon")


def noise_from_velocity(z_t: Tensor, velocity: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Noise eps = sqrt(1 - abar_t) z_t + sqrt(abar_t) v of the velocity v = sqrt(abar_t) eps - sqrt(1 - abar_t) z.

    Args:
        z_t: Noised features, shape ``(B, D, h, w)``.
        velocity: The velocity v, shape of ``z_t``.
        signal: sqrt(abar_t), broadcastable to ``z_t``.
        noise: sqrt(1 - abar_t), broadcastable to ``z_t``.

    Returns:
        The noise, shape of ``z_t``.
    """
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
        """Predict the noise.

        Args:
            z: Noised features z_t, shape ``(B, D, h, w)``.
            timesteps: Shape ``(B,)``.

        Returns:
            Predicted noise, shape ``(B, D, h, w)``.
        """
        signal, noise = (factors[timesteps][:, None, None, None] for factors in (self.signal, self.noise))
        return noise_from_velocity(z, self.network(z, timesteps), signal, noise)


class FoldedVelocityDenoiser(nn.Module):
    """A :class:`VelocityDenoiser` at one timestep.

    Args:
        network: Predicts the velocity at that timestep, called as ``network(z)``.
        signal: sqrt(abar) of that timestep, shape ``()``.
        noise: sqrt(1 - abar) of that timestep, shape ``()``.
    """

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
