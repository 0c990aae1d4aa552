# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training of a diffusion model on frozen features, shared by every model that reads anomalies out of one."""

import inspect
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from anomalib_osdirf.data.feature_cache import (
    CachedDataModule,
    CachedFeatureLoader,
    FeatureBatch,
    FeatureCache,
    ordered,
    reason_not_to_cache,
)
from anomalib_osdirf.data.sixteen_bit import read_16_bit_grey
from anomalib_osdirf.features import StreamingMoments
from anomalib_osdirf.models.progress import phase

logger = logging.getLogger(__name__)

# Lightning's own default, which `--trainer` passes on when the user says nothing.
_LIGHTNING_MAX_EPOCHS = 1000
_SCORING_BATCH = 64

# Arguments that may differ between a checkpoint and the model that loads it: they steer training, not the network.
_TRAINING_ARGUMENTS = frozenset(
    {
        "pre_trained",
        "backbone_weights",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "gradient_clip_norm",
        "seed",
        "max_steps",
        "max_epochs",
        "check_val_every_n_epoch",
        "checkpoint_every_n_steps",
        "feature_cache",
        "cache_memory_gb",
    }
)


class ResumeCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint to resume from while training runs, and removes it once the final one is written."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save every n steps, except at the very end, from where Lightning would not finish the training."""
        loop = trainer.fit_loop
        last_epoch = loop.max_epochs not in {None, -1} and trainer.current_epoch + 1 >= loop.max_epochs
        if trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch):
            return
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: with a state in the checkpoint, Lightning asks for this callback wherever it is loaded."""
        return {}

    def remove(self, trainer: Trainer) -> None:
        """Delete the checkpoint."""
        if self.best_model_path:
            trainer.strategy.remove_checkpoint(self.best_model_path)
            self.best_model_path = ""


class FeatureDiffusion(LightningModule, ABC):
    """Feature pass, cached training, density fit, final validation and checkpoints.

    A model is a direct subclass of this and of ``AnomalibModule`` and has as ``self.model`` a torch module with
    ``backbone``, ``whitening``, ``denoiser``, ``ema``, ``density``, ``extract_features``, ``training_loss`` and
    ``field``. Its constructor's arguments are all plain values, kept in ``self.hparams``.
    """

    model: Any
    pre_processor: Any
    trainer: Any
    make_pre_processor_exact: Callable[[], None]

    _restored = False
    _fitted_here = False
    _seed = 0
    _density_step = -1

    def check_training_arguments(self) -> None:
        """Refuse impossible training arguments.

        Raises:
            ValueError: If an argument is out of range.
        """
        for name in ("learning_rate", "max_steps", "max_epochs", "check_val_every_n_epoch"):
            value = self.hparams[name]
            if value is not None and not value > 0:
                msg = f"{name}={value!r} is not positive; use a number above 0."
                raise ValueError(msg)
        for name in (
            "weight_decay",
            "warmup_steps",
            "gradient_clip_norm",
            "checkpoint_every_n_steps",
            "cache_memory_gb",
        ):
            if not self.hparams[name] >= 0:
                msg = f"{name}={self.hparams[name]!r} is negative; use 0 or a positive number."
                raise ValueError(msg)

    @abstractmethod
    def build_model(self, arguments: dict[str, Any]) -> torch.nn.Module:
        """Build the torch module from the constructor's arguments."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments of this model; the length of the training is set by :meth:`_set_duration`."""
        every = self.hparams["check_val_every_n_epoch"]
        return {"num_sanity_val_steps": 0, "check_val_every_n_epoch": every or _NEVER}

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add the checkpoint to resume from to anomalib's components."""
        callbacks: list[Callback] = list(super().configure_callbacks())  # type: ignore[arg-type]
        final = self.trainer.checkpoint_callback
        every = self.hparams["checkpoint_every_n_steps"]
        if self.trainer.state.fn == TrainerFn.FITTING and every and isinstance(final, ModelCheckpoint):
            resume = ResumeCheckpoint(
                dirpath=final.dirpath, filename="resume", every_n_train_steps=every, enable_version_counter=False
            )
            callbacks.append(resume)
        return callbacks

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
        read_16_bit_grey()
        if stage != "fit":
            return
        if self.trainer.world_size > 1:
            # Every process would fit its own statistics on its own share of the images.
            msg = (
                f"{type(self).__name__} trains in one process so far, the trainer has {self.trainer.world_size}; "
                "use --trainer.devices 1."
            )
            raise ValueError(msg)
        self._cached_loader: CachedFeatureLoader | None = None
        self._image_loader: DataLoader | None = None
        seed = self.hparams["seed"]
        self._seed = (torch.initial_seed() if seed is None else seed) % 2**31
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
            len(dataloader.dataset),
            dataloader.batch_size,
            self._seed,
            lambda: self.trainer.fit_loop.total_batch_idx + 1,
        )
        self.trainer.datamodule = CachedDataModule(datamodule, self._cached_loader)

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
        self._set_duration()
        self._fitted_here = False
        self._density_step = -1
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

    def _set_duration(self) -> None:
        """Train for the model's max_steps or max_epochs unless the user's trainer arguments say otherwise."""
        trainer, loop = self.trainer, self.trainer.fit_loop
        if trainer.max_steps != -1 or trainer.max_epochs != _LIGHTNING_MAX_EPOCHS:
            return
        if self.hparams["max_epochs"] is not None:
            loop.max_epochs = self.hparams["max_epochs"]
        else:
            loop.max_epochs = -1
            loop.epoch_loop.max_steps = self.hparams["max_steps"]

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

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the trainer's value if the user gave one, else by ``gradient_clip_norm``."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.hparams["gradient_clip_norm"], "norm"
        if gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

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
        generator.manual_seed(self._seed * 2**32 + self.trainer.fit_loop.total_batch_idx)
        loss: Tensor = self.model.training_loss(features, generator)
        if not torch.isfinite(loss):
            raise RuntimeError(self._divergence_message(float(loss)))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(features))
        return loss

    def _divergence_message(self, loss: float) -> str:
        callbacks = [callback for callback in self.trainer.callbacks if isinstance(callback, ResumeCheckpoint)]
        saved = next((callback.best_model_path for callback in callbacks if callback.best_model_path), None)
        kept = f"the last good checkpoint is kept in {saved}" if saved else "no checkpoint had been saved yet"
        return (
            f"Training stopped at step {self.trainer.global_step} because the loss became {loss}; {kept}; "
            f"lower learning_rate (now {self.hparams['learning_rate']:g})."
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, then move the averaged denoiser, before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.model.ema.update_parameters(self.model.denoiser)

    # ------------------------------------------------------------------ density, validation, checkpoint

    @torch.no_grad()
    def _fit_density(self) -> None:
        """Fit the Gaussian on the training images' fields, under the averaged denoiser."""
        if self._density_step == self.trainer.global_step:
            return
        start = time.perf_counter()
        moments = StreamingMoments()
        for batch in self._batches("Density fit"):
            moments.update(self.model.field(self._features(batch)).flatten(2).permute(2, 0, 1))
        self.model.density.fit(moments)
        self._density_step = self.trainer.global_step
        self._fitted_here = True
        logger.info(
            "Density fit: %s on %d images in %.1f s.",
            self.hparams["density"],
            moments.count,
            time.perf_counter() - start,
        )

    def on_validation_start(self) -> None:
        """Fit the density before any validation of a training: thresholds come from its scores."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._fit_density()

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Score a validation batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def check_fitted(self) -> None:
        """Raise an error if the model can't score yet."""
        self.model.check_fitted()

    def on_train_end(self) -> None:
        """Fit the density, validate once and save, wherever in an epoch the training ended."""
        super().on_train_end()
        trainer = self.trainer
        validated = self._density_step == trainer.global_step
        self._fit_density()
        if not validated:
            self._validate()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ResumeCheckpoint):
                callback.remove(trainer)
            elif isinstance(callback, ModelCheckpoint):
                self._save_final(callback)

    def _validate(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        self.trainer.validating = True
        loop.run()
        self.trainer.training = True

    def _save_final(self, callback: ModelCheckpoint) -> None:
        """Save the finished model where a checkpoint callback keeps its latest.

        It saves by itself after a validation only, which there is not without validation data.
        """
        if callback.monitor is None and not self.trainer.fast_dev_run:
            callback.best_model_path = callback.best_model_path or callback.format_checkpoint_name({})
            self.trainer.save_checkpoint(callback.best_model_path)

    def teardown(self, stage: str) -> None:
        """Let go of the cache, and give the trainer the user's datamodule back."""
        super().teardown(stage)
        if stage == "fit":
            self._cached_loader = self._image_loader = None
            if isinstance(self.trainer.datamodule, CachedDataModule):
                self.trainer.datamodule = self.trainer.datamodule.datamodule

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of batches and noise, so that a resumed training goes on as it would have."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["osdirf_seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's arguments where this model's were left at their defaults.

        Raises:
            ValueError: If an argument was set to something else than the checkpoint's.
        """
        trainer = self._trainer
        fn = trainer.state.fn if trainer is not None else None
        if fn == TrainerFn.TESTING and self._fitted_here and not _is_fitted(checkpoint):
            # `anomalib train --ckpt_path` resumes from a checkpoint and then tests that same, unfinished one.
            logger.info("Testing the model that was just trained, not the checkpoint that its training resumed from.")
            checkpoint["state_dict"] = self.state_dict()
            return
        self._adopt_arguments(checkpoint.get("hyper_parameters", {}))
        super().on_load_checkpoint(checkpoint)
        self.make_pre_processor_exact()
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None and fn is not None:
            # Its data sets resize as the pre-processor did before the checkpoint's came in: have them look again.
            datamodule.setup(fn)
        self._restored = True
        self._seed = checkpoint.get("osdirf_seed", self._seed)
        cached_loader = getattr(self, "_cached_loader", None)
        if cached_loader is not None:
            cached_loader.seed = self._seed

    def _adopt_arguments(self, saved: dict[str, Any]) -> None:
        parameters = inspect.signature(type(self).__init__).parameters
        adopted = {}
        for name, value in saved.items():
            own = self.hparams.get(name)
            if name not in parameters or name not in self.hparams or own == value:
                continue
            if own == parameters[name].default:
                adopted[name] = value
            elif name not in _TRAINING_ARGUMENTS:
                msg = (
                    f"{name}={own!r} disagrees with the checkpoint, which has {name}={value!r}; leave {name} out to "
                    f"use the checkpoint's, or train anew with {name}={own!r}."
                )
                raise ValueError(msg)
        if adopted:
            listed = ", ".join(f"{name}={value!r}" for name, value in adopted.items())
            logger.info("Taken from the checkpoint: %s.", listed)
            self.hparams.update(adopted)
        if set(adopted) - _TRAINING_ARGUMENTS:
            self.model = self.build_model(dict(self.hparams))


_NEVER = 2**31 - 1


def _is_fitted(checkpoint: dict[str, Any]) -> bool:
    state = checkpoint.get("state_dict", {}).get("model.density._extra_state", {})
    return bool(state.get("num_images", 0))
