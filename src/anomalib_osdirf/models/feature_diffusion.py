# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training of a diffusion model on frozen features, shared by every model that reads anomalies out of one."""

import logging
import time
from collections.abc import Iterable, Iterator
from math import ceil
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_osdirf.data.feature_cache import (
    CachedFeatureLoader,
    FeatureBatch,
    FeatureCache,
    ordered,
    reason_not_to_cache,
)
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.diffusion_training import DiffusionTraining
from anomalib_osdirf.models.progress import phase

logger = logging.getLogger(__name__)

_SCORING_BATCH = 64


class FeatureDiffusion(DiffusionTraining):
    """Feature pass, cached training and density fit.

    The torch module ``self.model`` has ``backbone``, ``whitening``, ``denoiser``, ``ema``, ``density``,
    ``extract_features``, ``training_loss`` and ``field``.
    """

    training_arguments = DiffusionTraining.training_arguments | {
        "pre_trained",
        "backbone_weights",
        "weight_decay",
        "warmup_steps",
        "feature_cache",
        "cache_memory_gb",
    }
    non_negative_arguments = (
        *DiffusionTraining.non_negative_arguments,
        "weight_decay",
        "warmup_steps",
        "cache_memory_gb",
    )

    _cached_loader: CachedFeatureLoader | None = None
    _image_loader: DataLoader | None = None

    # ------------------------------------------------------------------ data

    def prepare_data(self) -> None:
        """Load the backbone's weights, unless a checkpoint brings them: a failure comes before anything is written."""
        super().prepare_data()
        fresh = not self._restored and self.trainer.ckpt_path is None
        if fresh and self.trainer.state.fn == TrainerFn.FITTING and self.hparams["pre_trained"]:
            self.model.backbone.load_pretrained(self.hparams["backbone_weights"])

    def setup(self, stage: str) -> None:
        """Put the feature cache in the place of the training dataloader, where the data allow it."""
        super().setup(stage)
        if stage != "fit":
            return
        self._cached_loader = None
        self._image_loader = None
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not self.hparams["feature_cache"]:
            reason: str | None = "feature_cache=false"
        elif datamodule is None:
            reason = "the training data came as a dataloader, not as a datamodule"
        else:
            dataloader = datamodule.train_dataloader()
            reason = reason_not_to_cache(dataloader)
        if reason:
            logger.info("Features are not cached but computed anew in every epoch: %s.", reason)
            return
        self._image_loader = ordered(dataloader)
        self._cached_loader = CachedFeatureLoader(
            len(dataloader.dataset), dataloader.batch_size, self._seed, self.trained_batches
        )
        self.replace_dataloader(self._cached_loader)

    def _images(self) -> Iterable[Any]:
        """Return the batches of training images."""
        if self._image_loader is not None:
            return self._image_loader
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        assert loader is not None
        return loader

    def _batches(self, name: str) -> Iterator[Any]:
        """Yield all training images once, as cached features or as pre-processed images, under a progress bar."""
        if self._cached_loader is not None and self._cached_loader.cache is not None:
            batches: Iterable[Any] = self._cached_loader.in_order(_SCORING_BATCH)
            total = ceil(self._cached_loader.num_images / _SCORING_BATCH)
        else:
            batches = self._images()
            total = len(batches)  # type: ignore[arg-type]
        visible = self.trainer.progress_bar_callback is not None
        for index, batch in enumerate(phase(name, batches, total, visible)):
            batch = self.trainer.strategy.batch_to_device(batch)  # noqa: PLW2901
            if not isinstance(batch, FeatureBatch) and isinstance(self.pre_processor, Callback):
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, index)
            yield batch

    def _features(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Backbone features on the grid, shape ``(B, C, h, w)``, of a batch of either kind."""
        if isinstance(batch, FeatureBatch):
            return batch.features
        features: Tensor = self.model.extract_features(batch.image)
        return features

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Make the feature pass before the first training step."""
        super().on_fit_start()
        self._feature_pass()

    @torch.no_grad()
    def _feature_pass(self) -> None:
        """Fit standardisation and PCA, and fill the cache, in one pass over the training images."""
        if self._restored and self._cached_loader is None:
            return
        start = time.perf_counter()
        moments = StreamingMoments()
        num_images = 0
        cache: FeatureCache | None = None
        for batch in self._batches("Feature pass"):
            unpooled = self.model.backbone(batch.image)
            features = self.model.backbone.pool(unpooled)
            if self._cached_loader is not None:
                if cache is None:
                    limit = self.hparams["cache_memory_gb"] * 2**30
                    cache = FeatureCache(self._cached_loader.num_images, features.shape[1:], limit)
                cache.features[num_images : num_images + len(features)] = features.cpu()
            num_images += len(features)
            moments.update(unpooled.permute(0, 2, 3, 1).flatten(0, 2))
        if num_images < 2:
            msg = f"Training needs at least two normal images, the data set has {num_images}; add images to it."
            raise ValueError(msg)
        if not self._restored:
            self.model.whitening.fit(moments)
        where = f"cached, {cache.describe()}" if cache is not None else "not cached"
        if self._cached_loader is not None:
            self._cached_loader.cache = cache
        logger.info("Feature pass: %d images in %.1f s; %s.", num_images, time.perf_counter() - start, where)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine decay to zero over the whole training."""
        from diffusers.optimization import get_cosine_schedule_with_warmup

        self._set_duration()
        optimizer = torch.optim.AdamW(
            self.model.denoiser.parameters(),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = min(self.hparams["warmup_steps"], total // 10)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """One step of the DDPM objective.

        Args:
            batch: An image batch or a :class:`FeatureBatch`.
            batch_idx: Unused.

        Returns:
            Scalar loss.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        del batch_idx
        features = self._features(batch)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.step_seed())
        loss: Tensor = self.model.training_loss(features, generator)
        self.check_loss(loss)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(features))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, then move the averaged denoiser, before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.model.ema.update_parameters(self.model.denoiser)

    # ------------------------------------------------------------------ density

    @torch.no_grad()
    def fit_scoring(self) -> None:
        """Fit the Gaussian on the training images' fields, under the averaged denoiser."""
        start = time.perf_counter()
        moments = StreamingMoments()
        for batch in self._batches("Density fit"):
            moments.update(self.model.field(self._features(batch)).flatten(2).permute(2, 0, 1))
        self.model.density.fit(moments)
        logger.info(
            "Density fit: %s on %d images in %.1f s.",
            self.hparams["density"],
            moments.count,
            time.perf_counter() - start,
        )

    @staticmethod
    def is_fitted(checkpoint: dict[str, Any]) -> bool:
        """Tell whether a checkpoint has a fitted density."""
        state = checkpoint.get("state_dict", {}).get("model.density._extra_state", {})
        return bool(state.get("num_images", 0))

    def teardown(self, stage: str) -> None:
        """Let go of the cache."""
        super().teardown(stage)
        if stage == "fit":
            self._cached_loader = self._image_loader = None
