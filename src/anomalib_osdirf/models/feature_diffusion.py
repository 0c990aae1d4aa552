# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training of a diffusion model on frozen features, shared by every model that reads anomalies out of one."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import ceil, cos, pi
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from anomalib_osdirf.data.feature_cache import (
    CachedFeatureLoader,
    FeatureBatch,
    FeatureCache,
    reason_not_to_cache,
)
from anomalib_osdirf.data.resumable import ResumableImageLoader, SharedDataModule, ahead, ordered
from anomalib_osdirf.denoisers import checkpoint_gradients
from anomalib_osdirf.density import Density
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models import tiles
from anomalib_osdirf.models.diffusion_training import MODEL_KEY, DiffusionTraining
from anomalib_osdirf.models.exact_export import image_size_of
from anomalib_osdirf.models.feature_network import FeatureNetwork, ReadOutNetwork
from anomalib_osdirf.models.several_processes import shards_weights
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.progress import images_of

logger = logging.getLogger(__name__)

_SCORING_BATCH = 64
_TILER_KEY = "osdirf_tiler"
# What is each model's own: arguments by their names, and the parts of the state by how their names begin.
_READ_OUT_ARGUMENTS = ("density", "num_clusters", "shrinkage", "image_score", "map_grid_size")
_READ_OUT = ("model.density.", "model.feature_density.", "model.score.", "model.noise", "post_processor.")


class FeatureDiffusion(DiffusionTraining):
    """Feature pass, cached training and density fit of a ``FeatureNetwork``.

    Models on frozen features train alike and differ in the read-out alone, so a checkpoint of one loads as another:
    features and denoiser are taken over, density, score constants and thresholds are fitted anew.
    """

    training_arguments = DiffusionTraining.training_arguments | {
        "pre_trained",
        "backbone_weights",
        "initial_learning_rate",
        "final_learning_rate",
        "weight_decay",
        "warmup_steps",
        "warmup_epochs",
        "feature_cache",
        "cache_memory_gb",
        "gradient_checkpointing",
    }
    positive_arguments = (*DiffusionTraining.positive_arguments, "warmup_epochs")
    non_negative_arguments = (
        *DiffusionTraining.non_negative_arguments,
        "initial_learning_rate",
        "final_learning_rate",
        "weight_decay",
        "warmup_steps",
        "cache_memory_gb",
    )

    model: FeatureNetwork
    _trained_as: str | None = None  # another model's name, until the read-out is fitted anew
    _cached_loader: CachedFeatureLoader | None = None
    _details: StreamingMoments | None = None  # of the feature pass, because the cache has none
    _image_loader: DataLoader | None = None

    # ------------------------------------------------------------------ data

    def setup(self, stage: str) -> None:
        """Put the feature cache in the place of the training dataloader, where the data allow it."""
        super().setup(stage)
        if stage != "fit":
            return
        self._cached_loader = self._image_loader = None
        if self.processes.count > 1 and not self._has_denoiser:
            msg = (
                f"denoiser=none trains nothing that {self.processes.count} processes could share; "
                "use --trainer.devices 1."
            )
            raise ValueError(msg)
        dataloader = self.orderable_dataloader()
        if dataloader is None:
            self._tiles_per_image("their order can't be changed")
            logger.info("Features are not cached but computed anew in every epoch.")
            return
        self._image_loader = self._in_order(dataloader)
        reason = reason_not_to_cache(dataloader) if self.hparams["feature_cache"] else "feature_cache=false"
        per_image = self._tiles_per_image(reason)
        if reason:
            logger.info("Features are not cached but computed anew in every epoch: %s.", reason)
            self.replace_dataloader(ResumableImageLoader(dataloader, self._seed, self.trained_batches, self.processes))
            return
        self._cached_loader = CachedFeatureLoader(
            per_image * len(dataloader.dataset), dataloader.batch_size, self._seed, self.trained_batches, self.processes
        )
        self.replace_dataloader(self._cached_loader)

    def _in_order(self, dataloader: Any) -> DataLoader:  # noqa: ANN401
        """Return a dataloader of this process's images in their order, large ones one by one."""
        return ordered(dataloader, self.processes, None if self.model.tiler is None else 1)

    def _tiles_per_image(self, not_cached: str | None) -> int:
        """Count the tiles of a training image, 1 where it is not cut.

        Args:
            not_cached: Why features can't be computed once and for all, if they can't.

        Raises:
            ValueError: If there can be no training on tiles.
        """
        if self.model.tiler is None:
            return 1
        size, count = image_size_of(self.pre_processor), self.processes.count
        reason = None
        if not_cached:
            reason = f"without the feature cache ({not_cached})"
        elif count > 1:
            reason = f"in {count} processes; use --trainer.devices 1"
        elif size is None:
            reason = "of images of unknown size; give the pre-processor a Resize to a height and a width"
        if reason:
            msg = f"TilerConfigurationCallback can't train on tiles {reason}."
            raise ValueError(msg)
        assert size is not None
        return tiles.number_of_tiles(self.model.tiler, *size)

    def configure_model(self) -> None:
        """Share the denoiser's weights out among processes, where the strategy is Lightning's for that."""
        if self._trainer is None or not shards_weights(self.trainer):
            return
        if not isinstance(next(self.model.denoiser.parameters()), DTensor):
            assert self.device_mesh is not None
            self.model.shard(self.device_mesh["data_parallel"])

    def _images(self) -> Any:  # noqa: ANN401
        """Return a dataloader of this process's training images."""
        if self._image_loader is not None:
            return self._image_loader
        self.trainer.fit_loop.setup_data()
        return self.trainer.train_dataloader

    def _batches(self, name: str, cached: bool = True) -> Iterator[Any]:
        """Yield this process's training images once, as cached features or pre-processed, under a progress bar."""
        if cached and self._cached_loader is not None and self._cached_loader.cache is not None:
            batches: Iterable[Any] = self._cached_loader.in_order(_SCORING_BATCH)
            images: int | None = self._cached_loader.num_cached
        else:
            loader = self._images()
            batches, images = ahead(loader), images_of(loader)
        for index, batch in enumerate(self.shown(name, batches, images)):
            batch = self.trainer.strategy.batch_to_device(batch)  # noqa: PLW2901
            if not isinstance(batch, FeatureBatch) and isinstance(self.pre_processor, Callback):
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, index)
            yield batch

    def _features(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Backbone features on the grid, shape ``(B, C, h, w)``, of a batch of either kind."""
        if isinstance(batch, FeatureBatch):
            return batch.features
        return torch.cat([self.model.extract_features(some) for some in self.model.tiles_of(batch.image)])

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Load the backbone's weights, unless a checkpoint brought them, and make the feature pass."""
        super().on_fit_start()
        if self.hparams["pre_trained"] and not self._restored:
            self.model.backbone.load_pretrained(self.hparams["backbone_weights"])
        if self.hparams["gradient_checkpointing"]:
            checkpoint_gradients(self.model.denoiser)
        self._feature_pass()

    @torch.no_grad()
    def _feature_pass(self) -> None:
        """Fit standardisation and PCA on all images, and cache this process's, in one pass over these."""
        if self._restored and self._cached_loader is None:
            return
        self._details = None
        moments, details = StreamingMoments(), StreamingMoments()
        map_grid_size = self.hparams.get("map_grid_size")
        num_images = 0
        cache: FeatureCache | None = None
        batches = (some for batch in self._batches("Feature pass") for some in self.model.tiles_of(batch.image))
        for images in batches:
            maps = self.model.backbone.maps(images)
            unpooled = self.model.backbone.coarse(maps)
            features = self.model.backbone.pool(unpooled)
            if self._cached_loader is not None:
                if cache is None:
                    limit = self.hparams["cache_memory_gb"] * 2**30
                    cache = FeatureCache(self._cached_loader.num_cached, features.shape[1:], limit)
                cache.features[num_images : num_images + len(features)] = features.cpu()
            num_images += len(features)
            moments.update(unpooled.permute(0, 2, 3, 1).flatten(0, 2))
            if map_grid_size is not None and self._cached_loader is not None:
                details.update(self.model.backbone.fine(maps, map_grid_size).flatten(2).permute(2, 0, 1))
        num_images = int(self.processes.add(torch.tensor(num_images)))
        if num_images < 2:
            msg = f"Training needs at least two normal images, the data set has {num_images}; add images to it."
            raise ValueError(msg)
        if not self._restored:
            self.model.whitening.fit(moments.pooled(self.processes))
        if details.count:
            pooled = details.pooled(self.processes)
            self._details = pooled.affine(self.model.whitening.weight, self.model.whitening.bias)
        where = f"cached, {cache.describe()}" if cache is not None else "not cached"
        if self._cached_loader is not None:
            self._cached_loader.cache = cache
        logger.info("Features of %d %s: %s.", num_images, self._pieces, where)

    @property
    def _pieces(self) -> str:
        """What features and densities are those of."""
        return "images" if self.model.tiler is None else "tiles"

    @property
    def _has_denoiser(self) -> bool:
        """Whether there is anything to train."""
        return next(self.model.denoiser.parameters(), None) is not None

    def _set_duration(self) -> None:
        """Train for no step where there is nothing to train."""
        if self._has_denoiser:
            super()._set_duration()
        else:
            self.trainer.fit_loop.epoch_loop.max_steps = 0

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine decay over the whole training."""
        self._set_duration()
        if not self._has_denoiser:
            return None
        peak = self.hparams["learning_rate"]
        optimizer = torch.optim.AdamW(
            self.model.denoiser.parameters(), lr=peak, weight_decay=self.hparams["weight_decay"]
        )
        total = int(self.trainer.estimated_stepping_batches)
        if self.hparams["warmup_epochs"] is not None:
            warmup = self.hparams["warmup_epochs"] * ceil(self.trainer.num_training_batches)
        else:
            warmup = min(self.hparams["warmup_steps"], total // 10)
        first, last = self.hparams["initial_learning_rate"] / peak, self.hparams["final_learning_rate"] / peak
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(warmup_cosine, warmup=warmup, total=total, first=first, last=last)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # noqa: ANN401
        """One step of the DDPM objective.

        Args:
            batch: An image batch or a :class:`FeatureBatch`.
            batch_idx: Unused.

        Returns:
            ``loss`` of this process's part of the batch and, for whoever keeps it, ``train_loss`` of the whole batch.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        del batch_idx
        features = self._features(batch)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.step_seed())
        total = self.images_in_step(len(features))
        loss: Tensor = self.model.training_loss(features, generator, self.processes, total)
        mean = self.processes.mean(loss)
        self.check_loss(mean)
        self.log("train_loss", mean, prog_bar=True, batch_size=total)
        return {"loss": loss, "train_loss": mean}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, then move the averaged denoiser, before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.model.ema.update_parameters(self.model.denoiser)

    # ------------------------------------------------------------------ read-out

    @torch.no_grad()
    def fit_scoring(self) -> None:
        """Fit density and score constants on the training images' fields, under the averaged denoiser."""
        network = self.model.deployed()
        network.find_kinds(
            lambda: (network.whitening(self._features(batch)) for batch in self._batches("Kinds of image")),
            self.processes,
        )
        fields = network.fit(
            lambda: (network.field_of(self._features(batch)) for batch in self._batches("Density fit")), self.processes
        )
        details = self._fit_details(network)
        self._trained_as = None
        logger.info(
            "Density: %s, fitted on %d %s.", self.hparams["density"], self.model.density.num_images, self._pieces
        )
        if isinstance(self.post_processor, FalseAlarmPostProcessor):
            self._fit_thresholds_left_out(self.post_processor, fields, details)

    def _fit_details(self, network: ReadOutNetwork) -> StreamingMoments | None:
        """Fit what the read-out looks at besides the field; without a cache, in one more pass over the images."""
        if self.hparams.get("map_grid_size") is None:
            return None
        details = self._details
        if details is None:
            details = StreamingMoments()
            for batch in self._batches("Map density fit"):
                for images in self.model.tiles_of(batch.image):
                    values = network.details_of(images)
                    assert values is not None
                    details.update(values.flatten(2).permute(2, 0, 1))
            details = details.pooled(self.processes)
        network.fit_details(details)
        return details

    def _fit_thresholds_left_out(
        self, post_processor: FalseAlarmPostProcessor, fields: Callable[[], Density], details: StreamingMoments | None
    ) -> None:
        """Set thresholds from training images where validation images don't, each left out of the densities' fit."""
        if post_processor.choose_source(self, self.trainer.datamodule) != "training":
            return
        with self.model.deployed().leaving_out(fields, details):
            for batch in self._batches("Thresholds", cached=False):
                post_processor.add(self.validation_step(batch))
        post_processor.fit("training")

    @property
    def reason_not_to_leave_out(self) -> str | None:
        """Why a training image can't be scored as if it had been left out of the densities' fit, if it can't."""
        datamodule: Any = self.trainer.datamodule
        if datamodule is None:
            return "they came as a dataloader, not as a datamodule"
        if isinstance(datamodule, SharedDataModule):  # whose batches may be of features
            datamodule = datamodule.datamodule
        return reason_not_to_cache(datamodule.train_dataloader())

    def can_score(self, checkpoint: dict[str, Any]) -> bool:
        """Tell whether a checkpoint has a fitted density of this model."""
        state = checkpoint.get("state_dict", {}).get("model.density._extra_state", {})
        return bool(state.get("num_images", 0)) and self.relative_of(checkpoint) is None

    def check_fitted(self) -> None:
        """Raise an error if the model can't score yet.

        Raises:
            RuntimeError: If so.
        """
        if self._trained_as is not None:
            name = type(self).__name__
            msg = (
                f"This checkpoint was trained as {self._trained_as}, and what {name} scores by must be fitted on "
                f"training images first: `anomalib train --model {name} --ckpt_path` with the training's data does "
                f"that, without training again, and writes a checkpoint of {name}."
            )
            raise RuntimeError(msg)
        super().check_fitted()

    @property
    def is_unfinished(self) -> bool:
        """Whether the read-out is left to fit: of another model's finished training, or without a denoiser."""
        return super().is_unfinished or self._trained_as is not None or not self._has_denoiser

    def on_validation_start(self) -> None:
        """Fit the read-out of another model's training; its thresholds come from this validation."""
        super().on_validation_start()
        if self._trained_as is not None:
            self._use_training_images()
            self.fit_scoring()

    def on_test_start(self) -> None:
        """Fit the read-out of another model's training, and thresholds on validation images."""
        super().on_test_start()
        if self._trained_as is not None:
            self._use_training_images()
            self.fit_scoring()
            self._fit_thresholds()

    def on_predict_start(self) -> None:
        """Refuse to predict what there is no read-out for."""
        super().on_predict_start()
        self.check_fitted()

    def _use_training_images(self) -> None:
        """Make :meth:`_batches` go through the datamodule's training images outside a training."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            self.check_fitted()
        datamodule.setup(TrainerFn.FITTING)
        self._leave_out_broken_files(TrainerFn.FITTING)
        self._image_loader = self._in_order(datamodule.train_dataloader())

    @torch.no_grad()
    def _fit_thresholds(self) -> None:
        """Fit thresholds, minima and maxima as a validation does."""
        if not isinstance(self.post_processor, Callback):
            return
        if isinstance(self.post_processor, FalseAlarmPostProcessor) and self.post_processor.source == "training":
            return
        batches = self.trainer.datamodule.val_dataloader()
        for index, batch in enumerate(self.shown("Thresholds", batches, images_of(batches))):
            batch = self.trainer.strategy.batch_to_device(batch)  # noqa: PLW2901
            if isinstance(self.pre_processor, Callback):
                self.pre_processor.on_validation_batch_start(self.trainer, self, batch, index)
            self.post_processor.on_validation_batch_end(self.trainer, self, self.validation_step(batch), batch, index)
        self.post_processor.on_validation_epoch_end(self.trainer, self)

    def teardown(self, stage: str) -> None:
        """Let go of the cache."""
        super().teardown(stage)
        self._cached_loader = self._image_loader = self._details = None

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how images are cut into tiles."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_TILER_KEY] = tiles.as_plain(self.model.tiler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut images as in the training, where no callback says how.

        Raises:
            ValueError: If a training would go on with other tiles.
        """
        own, saved = self.model.tiler, checkpoint.get(_TILER_KEY)
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and tiles.as_plain(own) != saved:
            msg = (
                f"The training in ckpt_path is one on {tiles.described(tiles.from_plain(saved))}, not on "
                f"{tiles.described(own)}; use the same TilerConfigurationCallback, or none if there was none."
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        self.model.tiler = own or tiles.from_plain(saved)

    def check_graph(self) -> None:
        """See :meth:`ExactExport.check_graph`.

        Raises:
            ValueError: If images are cut into tiles.
        """
        if self.model.tiler is not None:
            msg = (
                "A model on tiles can't be exported to ONNX or OpenVINO; use --export_type torch, or score with the "
                "checkpoint."
            )
            raise ValueError(msg)

    def relatives(self) -> set[str]:
        """See :meth:`DiffusionTraining.relatives`."""
        return {model.__name__ for model in FeatureDiffusion.__subclasses__()}

    def shared_arguments(self, saved: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`DiffusionTraining.shared_arguments`."""
        return {name: value for name, value in saved.items() if name not in _READ_OUT_ARGUMENTS}

    def take_over(self, checkpoint: dict[str, Any], relative: str) -> None:
        """Keep this model's own, unfitted read-out and thresholds in the place of the relative's."""
        self._trained_as = relative
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith(_READ_OUT)]:
            del state[name]
        state.update({name: value for name, value in self.state_dict().items() if name.startswith(_READ_OUT)})
        if isinstance(self.post_processor, Callback):  # which Lightning restores as such, too
            checkpoint.get("callbacks", {}).pop(self.post_processor.state_key, None)
        logger.warning(
            "The checkpoint was trained as %s: features and denoiser are taken over; density, image score and "
            "thresholds of %s are fitted anew on training and validation images before it scores.",
            relative,
            type(self).__name__,
        )

    @classmethod
    def arguments_beside(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Leave a relative's read-out alone, see :meth:`DiffusionTraining.arguments_beside`."""
        if saved.get(MODEL_KEY, cls.__name__) == cls.__name__:
            return {}
        parameters = inspect.signature(cls.__init__).parameters
        return {name: parameters[name].default for name in _READ_OUT_ARGUMENTS if name in parameters}


def warmup_cosine(step: int, warmup: int, total: int, first: float, last: float) -> float:
    """Learning rate at a step as a share of its peak: a linear warm-up, then half a cosine down.

    Args:
        step: Steps done, from 0.
        warmup: Steps of the warm-up.
        total: Steps of the whole training.
        first: Share at the first step.
        last: Share at the end.

    Returns:
        The share.
    """
    if step < warmup:
        return first + (1 - first) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return last + (1 - last) * 0.5 * (1 + cos(pi * progress))
