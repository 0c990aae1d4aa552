# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionAD as an anomalib model."""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from typing import Any

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_osdirf.data.synthetic_anomalies import SyntheticAnomalies, check_foreground
from anomalib_osdirf.export.exact_export import ExactExport
from anomalib_osdirf.models.diffusionad.torch_model import DiffusionADModel, NormGuidedReconstruction
from anomalib_osdirf.progress import images_of
from anomalib_osdirf.registration import register
from anomalib_osdirf.training.diffusion_training import DiffusionTraining
from anomalib_osdirf.training.resumable import ResumableImageLoader, ahead, ordered

_ANOMALY_ARGUMENTS = ("anomaly_source_path", "shuffled_patches", "drawn_textures", "foreground", "foreground_masks")
_SCHEDULES = ("constant", "cosine")
_STEPS_PER_SEED = 2**27


class DiffusionAD(DiffusionTraining, ExactExport, AnomalibModule):  # type: ignore[misc] # parents' to_onnx differ
    """Norm-guided one-step denoising with a segmentation network (DiffusionAD, arXiv 2303.08730).

    A diffusion model of normal images reconstructs an image without its anomalies. A second network, trained on painted
    anomalies, compares the two.

    Args:
        base_channels: Channels of the reconstruction network's first level, a multiple of 8. Defaults to ``128``.
        channel_multipliers: Channels of each of its levels, as multiples of the first. Defaults to
            ``(1, 1, 2, 2, 4, 4)``.
        residual_blocks: Residual blocks of each of its levels. Defaults to ``2``.
        attention_levels: Number of its coarsest levels with self-attention. Defaults to ``3``.
        patch_size: Side of the pixel squares that the reconstruction network treats as one position; above 1 it is
            faster. Defaults to ``1``.
        pixel_deviation: Standard deviation of pixels from 0.5, for which the reconstruction network is preconditioned
            to train in far fewer steps; ``None`` for no preconditioning. Defaults to ``None``.
        segmentation_channels: Channels of the segmentation network's first level. Defaults to ``64``.
        timestep_n: Timestep of the small noise scale at inference. Defaults to ``200``.
        timestep_b: Timestep of the big noise scale at inference. Defaults to ``400``.
        timestep_boundary: Training timesteps of the small scale are below it, those of the big scale from it on.
            Defaults to ``300``.
        guidance_strength: Weight of the norm guidance, 0 for none. Defaults to ``1.0``.
        noise_seed: Seed of the two noise fields used for every image at inference. Defaults to ``0``.
        anomaly_source_path: Folder of textures to paint anomalies with, searched with its subfolders. Defaults to
            ``None``.
        shuffled_patches: Paint anomalies with the image's own shuffled patches; also done if no other source is given.
            Defaults to ``False``.
        drawn_textures: Paint anomalies with clouds of two random colours. With several sources, one is drawn for each
            image. Defaults to ``False``.
        foreground: Where anomalies are painted: ``none``, anywhere; ``auto``, on pixels that differ from the colour of
            the image's border. Defaults to ``none``.
        foreground_masks: Folder of masks to paint within, each named as its image except for the extension. Defaults to
            ``None``.
        learning_rate: Learning rate of the reconstruction network, with Adam. Defaults to ``1e-4``.
        segmentation_learning_rate: Learning rate of the segmentation network. Defaults to ``1e-5``.
        learning_rate_schedule: ``constant``, or ``cosine`` for a decay of both rates to zero. Defaults to ``constant``.
        gradient_clip_norm: Maximum gradient norm, 0 for no clipping; ``trainer.gradient_clip_val`` overrides it.
            Defaults to ``0.0``.
        ema_decay: Decay of the networks' exponential moving average, which then gives the scores; ``None`` or 0 for no
            averaging. Defaults to ``None``.
        max_steps: Optimiser steps to train for; ``trainer.max_steps`` and ``trainer.max_epochs`` override it.
            Defaults to ``10000``.
        pre_processor: Pre-processor without normalisation, or ``True`` for a resize to 256 x 256. Defaults to ``True``.
        **arguments: Those of :class:`~anomalib_osdirf.training.diffusion_training.DiffusionTraining`.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> model = DiffusionAD(base_channels=16, channel_multipliers=(1, 2, 2), attention_levels=1)
        >>> Engine().train(model, datamodule=Folder("parts", root="parts", normal_dir="good"))  # doctest: +SKIP
    """

    training_arguments = DiffusionTraining.training_arguments | {
        "segmentation_learning_rate",
        "learning_rate_schedule",
        *_ANOMALY_ARGUMENTS,
    }
    positive_arguments = (*DiffusionTraining.positive_arguments, "segmentation_learning_rate")

    model: DiffusionADModel
    network_class = DiffusionADModel
    network_parts = (NormGuidedReconstruction,)

    def __init__(
        self,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        residual_blocks: int = 2,
        attention_levels: int = 3,
        patch_size: int = 1,
        pixel_deviation: float | None = None,
        segmentation_channels: int = 64,
        timestep_n: int = 200,
        timestep_b: int = 400,
        timestep_boundary: int = 300,
        guidance_strength: float = 1.0,
        noise_seed: int = 0,
        anomaly_source_path: str | None = None,
        shuffled_patches: bool = False,
        drawn_textures: bool = False,
        foreground: str = "none",
        foreground_masks: str | None = None,
        learning_rate: float = 1e-4,
        segmentation_learning_rate: float = 1e-5,
        learning_rate_schedule: str = "constant",
        gradient_clip_norm: float = 0.0,
        ema_decay: float | None = None,
        max_steps: int = 10000,
        pre_processor: PreProcessor | bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(pre_processor=pre_processor, **arguments)
        check_foreground(foreground, foreground_masks)
        if learning_rate_schedule not in _SCHEDULES:
            msg = f"learning_rate_schedule={learning_rate_schedule!r} is unknown; use one of {', '.join(_SCHEDULES)}."
            raise ValueError(msg)
        self._check_pre_processor()
        self.make_pre_processor_exact()
        self.model = self.build_model(dict(self.hparams))

    def _check_pre_processor(self) -> None:
        """Refuse normalised images: noise, painted anomalies and the estimates' range are made for [0, 1]."""
        transform = getattr(self.pre_processor, "transform", None)
        if transform is not None and extract_transforms_by_type(transform, Normalize):
            raise ValueError(
                "pre_processor has a Normalize, but DiffusionAD works on images in [0, 1]; leave Normalize out, as "
                "pre_processor=True does."
            )

    # ------------------------------------------------------------------ data

    def _make_anomalies(self) -> SyntheticAnomalies:
        return SyntheticAnomalies(**{name: self.hparams[name] for name in _ANOMALY_ARGUMENTS})

    def prepare_data(self) -> None:
        """Look at the folders of textures and masks: a failure comes before anything is written."""
        super().prepare_data()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._make_anomalies()

    def setup(self, stage: str) -> None:
        """Put the training images in an order that an interrupted training picks up again, where the data allow it."""
        super().setup(stage)
        dataloader = self.orderable_dataloader() if stage == "fit" else None
        if dataloader is not None:
            loader = ResumableImageLoader(dataloader, self._seed, self.trained_batches, self.processes)
            self.replace_dataloader(loader)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Prepare the painting of anomalies, and look for missing foreground masks before the first step."""
        super().on_fit_start()
        self._anomalies = self._make_anomalies()
        samples = getattr(getattr(self.trainer.datamodule, "train_data", None), "samples", None)
        if samples is not None:
            self._anomalies.check_masks(samples.image_path)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, with a learning rate for each network."""
        self._set_duration()
        optimizer = torch.optim.Adam(
            [
                {
                    "params": self.model.networks["reconstruction"].parameters(),
                    "lr": self.hparams["learning_rate"],
                },
                {
                    "params": self.model.networks["segmentation"].parameters(),
                    "lr": self.hparams["segmentation_learning_rate"],
                },
            ]
        )
        if self.hparams["learning_rate_schedule"] == "constant":
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Paint anomalies onto half of a batch, and compute both networks' loss; callbacks see the global one."""
        del batch_idx
        seed = self._own_seed(self.step_seed())
        images, masks = self._anomalies(batch.image, batch.image_path, seed)
        losses = self.model.training_losses(images, masks, torch.Generator(self.device).manual_seed(seed))
        total = self.images_in_step(len(images))
        values = self.processes.weight(total) * torch.stack(list(losses.values()))
        means = self.processes.mean(values)
        self.check_loss(means.sum())
        self.log("train_loss", means.sum(), prog_bar=True, batch_size=total)
        self.log_dict({f"train_{name}": mean for name, mean in zip(losses, means, strict=True)}, batch_size=total)
        return {"loss": values.sum(), "train_loss": means.sum()}

    def _own_seed(self, seed: int) -> int:
        """Return a seed of this process's own: anomalies and noise are drawn for its images alone."""
        return seed + self.processes.rank * _STEPS_PER_SEED

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the averaged networks, before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.model.after_step()

    # ------------------------------------------------------------------ validation

    def fit_scoring(self) -> None:
        """Fit the batch norms of the networks that score, on the training images in their own order."""
        generator = torch.Generator(self.device).manual_seed(self._own_seed(self._seed))
        self.model.fit_batch_norm(self._painted_images(), generator, self.processes)

    def _painted_images(self) -> Iterator[Tensor]:
        """Yield this process's training images once, pre-processed, anomalies on half of them, under a progress bar."""
        loader: Any = self.trainer.train_dataloader
        batches = None
        if isinstance(loader, ResumableImageLoader):
            # Equally many in all processes: synchronised batch norms wait for each other.
            images: Any = loader.dataloader
            batches = ceil(loader.num_images // self.processes.count / images.batch_size)
            loader = ordered(images, self.processes)
        shown = self.shown("Batch norm fit", islice(ahead(loader), batches), images_of(loader))
        for index, batch in enumerate(shown):
            batch = self.trainer.strategy.batch_to_device(batch)  # noqa: PLW2901
            if isinstance(self.pre_processor, Callback):
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, index)
            yield self._anomalies(batch.image, batch.image_path, self._own_seed(self._seed * 2**32 + index))[0]

    # ------------------------------------------------------------------ the rest of anomalib's contract

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Pre-processor that is used by default: resized images in [0, 1]."""
        return PreProcessor(Compose([Resize(image_size or (256, 256), antialias=True)]))


register(DiffusionAD)
