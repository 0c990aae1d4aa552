# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionAD's networks: losses, noise fields, sizes, averaged weights."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from anomalib_osdirf.denoisers.unet import GridAttention
from anomalib_osdirf.models.diffusionad import DiffusionADModel
from anomalib_osdirf.models.diffusionad.torch_model import NormGuidedReconstruction

SMALL: dict[str, Any] = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_levels": 1,
    "segmentation_channels": 2,
}
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def _model(**arguments: Any) -> DiffusionADModel:
    torch.manual_seed(0)
    model = DiffusionADModel(**{**SMALL, **arguments})
    model.num_steps += 1
    return model.eval()


class Oracle(torch.nn.Module):
    """Knows the clean images, and so the noise."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, z: torch.Tensor, timesteps: torch.Tensor) -> Any:
        abar = torch.tensor(ABAR[timesteps.numpy()], dtype=z.dtype)[:, None, None, None]
        clean = self.clean.repeat(2, 1, 1, 1)
        return type("Output", (), {"sample": (z - abar.sqrt() * clean) / (1 - abar).sqrt()})


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_oracle_gives_the_clean_images_back(patch_size: int) -> None:
    clean, noise_n, noise_b = torch.rand(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reconstruction = NormGuidedReconstruction(8, (1,), 1, 0, patch_size, None, 1.0)
    reconstruction.unet = Oracle(functional.pixel_unshuffle(clean, patch_size))
    t_n, t_b = torch.tensor([0, 10, 150, 299]), torch.tensor([300, 400, 500, 700])
    result = reconstruction(clean, noise_n, noise_b, t_n, t_b)
    torch.testing.assert_close(result.image, clean, rtol=0, atol=1e-3)
    torch.testing.assert_close(result.predicted_noise_n, noise_n, rtol=0, atol=1e-2)
    torch.testing.assert_close(result.predicted_noise_b, noise_b, rtol=0, atol=1e-2)


def test_preconditioned_network_starts_from_the_best_guess_for_gaussian_pixels() -> None:
    """A network that returns nothing leaves the mean of N(0.5, s^2) given z, and is shown values of unit variance."""
    deviation = 0.2
    reconstruction = NormGuidedReconstruction(8, (1,), 1, 0, 2, deviation, 0.0)
    seen = []

    def silent(values: torch.Tensor) -> torch.Tensor:
        seen.append(values)
        return torch.zeros_like(values)

    timesteps = torch.tensor([0, 100, 300, 800])
    abar = torch.tensor(ABAR[timesteps.numpy()])[:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 64, 64, generator=generator, dtype=torch.float64)
    z = abar.sqrt() * (0.5 + deviation * clean) + (1 - abar).sqrt() * noise
    predicted = reconstruction.predict_noise(z, abar, silent)
    gain = abar.sqrt() * deviation**2 / (abar * deviation**2 + 1 - abar)
    expected = 0.5 + gain * (z - abar.sqrt() * 0.5)
    torch.testing.assert_close((z - (1 - abar).sqrt() * predicted) / abar.sqrt(), expected)
    torch.testing.assert_close(seen[0].std((1, 2, 3)), torch.ones(4).double(), rtol=0.05, atol=0)


def test_losses_are_those_of_the_method() -> None:
    """Noise: normal images alone. Focal and smooth L1: the map against the mask."""
    model = _model()
    images = torch.rand(3, 3, 64, 64)
    masks = torch.zeros(3, 1, 64, 64)
    masks[1, :, 10:20, 10:20] = 1
    losses = model.training_losses(images, masks, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    noise_n, noise_b = torch.randn(2, 3, 3, 64, 64, generator=generator)
    t_n = torch.randint(300, (3,), generator=generator)
    t_b = torch.randint(300, 1000, (3,), generator=generator)
    result = model.networks["reconstruction"](images, noise_n, noise_b, t_n, t_b)
    normal = [0, 2]
    expected = functional.mse_loss(result.predicted_noise_n[normal], noise_n[normal])
    expected += functional.mse_loss(result.predicted_noise_b[normal], noise_b[normal])
    torch.testing.assert_close(losses["noise"], expected)
    logits = model.networks["segmentation"](torch.cat((images, result.image), 1))
    torch.testing.assert_close(losses["focal"], 5 * sigmoid_focal_loss(logits, masks, 0.5, 4, "mean"))
    torch.testing.assert_close(losses["smooth_l1"], functional.smooth_l1_loss(logits.sigmoid(), masks))


def test_batch_without_normal_images_has_no_noise_loss() -> None:
    losses = _model().training_losses(torch.rand(2, 3, 64, 64), torch.ones(2, 1, 64, 64), torch.Generator())
    assert losses["noise"] == 0


def test_every_weight_is_trained() -> None:
    model = _model().train()
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, :8, :8] = 1
    sum(model.training_losses(torch.rand(2, 3, 64, 64), masks, torch.Generator()).values()).backward()
    assert all(parameter.grad is not None for parameter in model.networks.parameters())


def test_score_is_the_mean_of_the_fifty_largest_pixels() -> None:
    batch = _model()(torch.rand(2, 3, 64, 96))
    assert batch.anomaly_map.shape == (2, 1, 64, 96)
    largest = batch.anomaly_map.flatten(1).sort(dim=1, descending=True).values[:, :50]
    torch.testing.assert_close(batch.pred_score, largest.mean(dim=1))


@torch.no_grad()
def test_prediction_is_repeatable_and_alone_with_its_image() -> None:
    model = _model()
    images = torch.rand(3, 3, 64, 64)
    together = model(images)
    torch.testing.assert_close(model(images).anomaly_map, together.anomaly_map, rtol=0, atol=0)
    for index in range(3):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], rtol=1e-5, atol=1e-6)


def test_noise_fields_are_two_kept_with_the_weights_and_follow_their_seed() -> None:
    model = _model()
    assert "noise" in model.state_dict()
    assert not torch.allclose(model.noise[0], model.noise[1])
    torch.testing.assert_close(model.noise, _model().noise, rtol=0, atol=0)
    assert not torch.allclose(model.noise, _model(noise_seed=1).noise)
    other = _model(noise_seed=1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.noise, model.noise, rtol=0, atol=0)


def test_images_larger_than_the_noise_fields() -> None:
    assert _model()(torch.rand(1, 3, 320, 64)).anomaly_map.shape == (1, 1, 320, 64)


@torch.no_grad()
def test_network_of_patches_scores_every_pixel() -> None:
    model = _model(patch_size=4)
    assert model(torch.rand(2, 3, 64, 96)).anomaly_map.shape == (2, 1, 64, 96)
    plain = _model()
    assert model.networks["reconstruction"].unet.config.in_channels == 48
    assert plain.networks["reconstruction"].unet.config.in_channels == 3


@torch.no_grad()
def test_averaged_networks_are_what_scores() -> None:
    model = _model(ema_decay=0.9)
    images = torch.rand(2, 3, 64, 64)
    before = model(images).anomaly_map
    for parameter in model.networks.parameters():
        parameter.add_(0.1)
    torch.testing.assert_close(model(images).anomaly_map, before, rtol=0, atol=0)
    model.after_step()
    assert not torch.allclose(model(images).anomaly_map, before)
    assert _model().ema is None
    assert _model(ema_decay=0).ema is None


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_batch_norms_get_the_statistics_of_the_weights_that_score(ema_decay: float | None) -> None:
    """The first batch norm's are those of the first convolution's outputs, whatever was in it before."""
    model = _model(ema_decay=ema_decay)
    segmentation = model.scoring_networks["segmentation"]
    convolution, norm = segmentation.encoder_segment.block1[:2]
    norm.running_mean.fill_(100)
    outputs = []
    handle = convolution.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model.fit_batch_norm(torch.rand(3, 2, 3, 64, 64), torch.Generator())
    handle.remove()
    torch.testing.assert_close(norm.running_mean, torch.cat(outputs).mean((0, 2, 3)), rtol=0, atol=1e-5)
    assert norm.momentum == 0.1
    assert not norm.training


def test_deployed_networks_share_the_averaged_weights() -> None:
    model = _model(ema_decay=0.9)
    assert model.ema is not None
    deployed = model.freeze()
    averaged = {id(parameter) for parameter in model.ema.module.parameters()}
    own = [parameter for parameter in deployed.parameters() if id(parameter) not in averaged]
    assert {tuple(parameter.shape) for parameter in own} == {(8,), (16,)}  # biases that hold a timestep


@pytest.mark.parametrize(("patch_size", "pixel_deviation"), [(1, None), (2, 0.2)])
def test_folded_timesteps_change_nothing(patch_size: int, pixel_deviation: float | None) -> None:
    model = _model(patch_size=patch_size, pixel_deviation=pixel_deviation)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    deployed = model.freeze()
    t_n, t_b = (torch.full((2,), timestep) for timestep in model.timesteps)
    noise = model.noise[..., :64, :64]
    with torch.no_grad():
        expected = model.networks["reconstruction"](images, noise[:1], noise[1:], t_n, t_b).image
        actual = deployed.reconstruction.reconstruct(images, noise, deployed.abars, list(deployed.unets))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        pair = torch.cat((images, expected), dim=1)
        torch.testing.assert_close(
            deployed.segmentation(pair), model.networks["segmentation"](pair), rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_attention_in_elementary_steps_changes_nothing() -> None:
    torch.manual_seed(0)
    attention = Attention(32, heads=4, dim_head=8, norm_num_groups=2, bias=True, residual_connection=True)
    attention = attention.double()
    for parameter in attention.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    values = torch.randn(2, 32, 6, 5, dtype=torch.float64)
    expected = attention(values)
    attention.set_processor(GridAttention())
    torch.testing.assert_close(attention(values), expected, rtol=0, atol=1e-10)


def test_never_trained() -> None:
    with pytest.raises(RuntimeError, match="was never fitted"):
        DiffusionADModel(**SMALL)(torch.rand(1, 3, 64, 64))


def test_paper_size() -> None:
    """Attention at 32, 16 and 8 positions of an image of 256, the three coarsest levels."""
    with torch.device("meta"):
        reconstruction = NormGuidedReconstruction(128, (1, 1, 2, 2, 4, 4), 2, 3, 1, None, 1.0)
    unet = reconstruction.unet
    assert unet.config.block_out_channels == [128, 128, 256, 256, 512, 512]
    assert [block.startswith("Attn") for block in unet.config.down_block_types] == 3 * [False] + 3 * [True]


@pytest.mark.parametrize(("height", "width", "fitting"), [(50, 64, "64 x 64"), (64, 100, "64 x 128"), (32, 32, "64 x")])
def test_image_size_that_does_not_fit(height: int, width: int, fitting: str) -> None:
    images = torch.rand(1, 3, height, width)
    message = f"Images of {height} x {width} pixels do not fit .* multiples of 32 from 64 on, such as {fitting}"
    with pytest.raises(ValueError, match=message):
        _model()(images)
    with pytest.raises(ValueError, match=message):
        _model().training_losses(images, images[:, :1], torch.Generator())
