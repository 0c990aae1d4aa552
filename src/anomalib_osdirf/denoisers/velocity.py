# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""A denoiser whose network predicts the velocity and not the noise (Salimans and Ho 2022, appendix D)."""

from torch import Tensor, nn

from anomalib_osdirf.diffusion import NoiseSchedule

PREDICTION_TYPES = ("v_prediction", "epsilon")


class VelocityDenoiser(nn.Module):
    """Noise predictor eps_theta(z_t, t) = sqrt(1 - abar_t) z_t + sqrt(abar_t) v_theta(z_t, t).

    With v = sqrt(abar) eps - sqrt(1 - abar) z this is an identity. Its first term is the whole prediction for white
    Gaussian features, so the network learns only what they have beyond that; and the prediction grows with the length
    of z_t wherever the network, which has layer norms, does not.

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
        return noise * z + signal * self.network(z, timesteps)


class FoldedVelocityDenoiser(nn.Module):
    """A :class:`VelocityDenoiser` at one timestep.

    Args:
        network: The velocity at that timestep, already times sqrt(abar), called as ``network(z)``.
        noise: sqrt(1 - abar) of that timestep.
    """

    noise: Tensor

    def __init__(self, network: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("noise", noise.clone())

    def forward(self, z: Tensor) -> Tensor:
        """Predict the noise in z ``(B, D, h, w)`` at the folded timestep, same shape."""
        return self.network(z) + self.noise * z
