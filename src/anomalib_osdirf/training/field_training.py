# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training of a denoiser on frozen features, and the fit of the scorer."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import ceil, cos, isnan, pi
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_osdirf.denoisers import checkpoint_gradients
from anomalib_osdirf.export.exact_export import image_size_of
from anomalib_osdirf.features import StreamingMoments, coarse, pre_processing, tiles
from anomalib_osdirf.models.field_model import FieldModel
from anomalib_osdirf.models.field_network import FieldNetwork
from anomalib_osdirf.models.region import blank, check_roi, pack
from anomalib_osdirf.models.scorer import Fit, Images, Painted, significant_gain
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.progress import images_of
from anomalib_osdirf.scoring.painting import covered_positions, paint
from anomalib_osdirf.training.diffusion_training import DiffusionTraining
from anomalib_osdirf.training.feature_cache import (
    CachedFeatureLoader,
    FeatureBatch,
    FeatureCache,
    reason_not_to_cache,
)
from anomalib_osdirf.training.held_out import SHARE, held_out
from anomalib_osdirf.training.resumable import ResumableImageLoader, SharedDataModule, ahead, ordered

logger = logging.getLogger(__name__)

_SCORING_BATCH = 64
_TILER_KEY = "osdirf_tiler"
_MOST_PAINTED = 128  # images that anomalies are painted on
_MOST_JUDGED = 64  # held-out images that the denoiser is judged by
_JUDGED_EVERY = 50  # steps
_MOST_SUSPICIOUS = 10
_GENERALISES = 0.9  # explained share on held-out images, at least, of that on images of the training
_FIELDS_IN_MEMORY = 2**30  # bytes; above, fields are recomputed in each pass


def _judged(numbers: Tensor, total: int, tiles_per_image: int) -> Tensor:
    """Return which of the held-out images the denoiser is judged by."""
    every = ceil(total * tiles_per_image / SHARE / _MOST_JUDGED)
    return held_out(numbers, total) & (numbers // SHARE % every == 0)


class PaintedFeatures(NamedTuple):
    """Features of images with painted anomalies: fine features, positions covered, number of each image."""

    features: Tensor
    covered: Tensor
    numbers: Tensor


class FieldTraining(DiffusionTraining):
    """Feature pass, training on cached features, and the fit of the scorer.

    The denoiser is not trained on a held-out fifth of the images. The averaged weights that explain most of the noise
    on these images give the field.

    Args:
        backbone: timm model whose frozen features are used, or ``filter_bank``, fixed filters that need no weights.
            Defaults to ``tf_efficientnet_lite0``.
        layers: Layers of the backbone, such as ``[blocks.1, blocks.2]``; ``None`` takes those of stride 4, 8 and 16 or,
            of a transformer, blocks 3, 6, 9 and 11 of 12. Defaults to ``None``.
        pre_trained: Load pre-trained weights; ``False`` leaves the backbone random. Defaults to ``True``.
        backbone_weights: Local .safetensors or .pth file to load instead of an installed package's (extra ``weights``,
            for ``tf_efficientnet_lite0``) or a download. Defaults to ``None``.
        feature_dim: Maximum number of principal components of the features; ``None`` keeps all channels, standardised.
            Defaults to ``96``.
        grid_size: Side of the field's grid, in positions. OSDIRF's map has a second, finer part of twice as many.
            Defaults to ``16``.
        denoiser: ``conv_mlp``, a perceptron with depthwise convolutions, the same at every position; ``unet``; a
            diffusion transformer: ``dit_s``, ``dit_b``, ``dit_l``, ``dit_gigant``; or, for comparison and OSDIRF only,
            ``none``, which trains nothing and scores by the densities only. Defaults to ``conv_mlp``.
        learning_rate: Peak learning rate of AdamW. Defaults to ``1e-3``.
        initial_learning_rate: Learning rate that the linear warm-up starts from. Defaults to ``0.0``.
        final_learning_rate: Learning rate that the cosine decay ends at. Defaults to ``0.0``.
        weight_decay: Weight decay of AdamW. Defaults to ``0.0``.
        warmup_steps: Steps of linear warm-up, a tenth of the training at most. Defaults to ``100``.
        warmup_epochs: Epochs of linear warm-up, instead of ``warmup_steps``. Defaults to ``None``.
        gradient_clip_norm: Maximum gradient norm, 0 for no clipping; ``trainer.gradient_clip_val`` overrides it.
            Defaults to ``1.0``.
        ema_decay: Decay of the denoiser's exponential moving average, which gives the scores. Defaults to ``0.999``.
        feature_cache: Compute features once and train on them, if images are not augmented. Defaults to ``True``.
        cache_memory_gb: Cache size per process in GiB above which a memory-mapped file is used. Defaults to ``4.0``.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass: slower training in less
            memory, for large denoisers. Defaults to ``False``.
        roi: Region of interest: the path of a mask image, white inside, of any size; or the [x, y] vertices of a
            polygon, as shares of the image's width and height, such as ``[[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]]``. What
            is outside has no part in training and scores. Defaults to ``None``, the whole image.
        expected_contamination: Share of the training images that may be defective, below 0.5. As many images, those
            with the highest scores (OSDIRF: held-out ones), are left out of the scorer and of thresholds from training
            images. If they were good, more false alarms follow. Defaults to ``0.0``: none.
        pre_processor: Pre-processor, or ``True`` for a resize to 256 x 256 and the normalisation that the backbone was
            trained with. For transformers the size is rounded to a multiple of the patch size. Defaults to ``True``.
        **arguments: Those of :class:`~anomalib_osdirf.training.diffusion_training.DiffusionTraining`.
    """

    structure = 5
    network_parts = (FieldNetwork,)
    needs_denoiser = False  # whether an untrained denoiser gives no field worth scoring

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
        "expected_contamination",
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

    model: FieldModel
    _cached_loader: CachedFeatureLoader | None = None
    _image_loader: DataLoader | None = None
    _judges: Tensor | None = None  # coarse features of held-out images
    _seen: Tensor | None = None  # of as many images of the training
    _painted: PaintedFeatures | None = None
    _image_size: tuple[int, int] = (1, 1)
    _judged_step = -1
    _seen_share = 0.0
    _last_share: float | None = None
    _tiles_per_image = 1  # 1 where images are not cut
    suspicious_images: Sequence[tuple[str, float]] = ()  # most suspicious training images and their scores

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | None = None,
        feature_dim: int | None = 96,
        grid_size: int = 16,
        denoiser: str = "conv_mlp",
        learning_rate: float = 1e-3,
        initial_learning_rate: float = 0.0,
        final_learning_rate: float = 0.0,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        warmup_epochs: int | None = None,
        gradient_clip_norm: float = 1.0,
        ema_decay: float = 0.999,
        feature_cache: bool = True,
        cache_memory_gb: float = 4.0,
        gradient_checkpointing: bool = False,
        roi: str | list[list[float]] | None = None,
        expected_contamination: float = 0.0,
        pre_processor: PreProcessor | bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(pre_processor=pre_processor, **arguments)
        check_roi(self.hparams["roi"])
        self.model = self.build_model(dict(self.hparams))
        self._suit_backbone(normalise=pre_processor is True)

    def check_training_arguments(self) -> None:
        """Refuse impossible training arguments."""
        super().check_training_arguments()
        share = self.hparams["expected_contamination"]
        if not 0 <= share < 0.5:
            raise ValueError(f"expected_contamination={share!r} is not a share below a half; use 0.1 for 10 %, or 0.")

    def _suit_backbone(self, normalise: bool) -> None:
        """Round the image size to the backbone's patches and, where asked to, normalise as it was trained."""
        own, backbone = self.pre_processor, self.model.network.backbone
        if isinstance(own, PreProcessor) and own.transform is not None:
            transform, sizes = pre_processing.rounded_to(backbone.patch, own.transform)
            if sizes is not None:
                logger.info(
                    "Images are resized to %d x %d, not %d x %d: the nearest multiple of %s's patches of %d x %d.",
                    *(*sizes[1], *sizes[0], backbone.name, *backbone.patch),
                )
            own.transform = pre_processing.normalised_for(backbone.name, transform) if normalise else transform
        self.make_pre_processor_exact()

    # ------------------------------------------------------------------ data

    def setup(self, stage: str) -> None:
        """Replace the training dataloader by the feature cache, if the data allow it."""
        super().setup(stage)
        if stage != "fit":
            return
        self._cached_loader = self._image_loader = None
        if self.processes.count > 1 and not self._has_denoiser:
            raise ValueError(
                f"denoiser=none trains nothing that {self.processes.count} processes could share; "
                "use --trainer.devices 1."
            )
        dataloader = self.orderable_dataloader()
        share = self.hparams["expected_contamination"]
        if share and (dataloader is None or self.processes.count > 1):
            raise ValueError(
                f"expected_contamination={share} takes one process and a datamodule whose images can be put in order; "
                "use --trainer.devices 1 and such a datamodule, or expected_contamination=0."
            )
        if dataloader is None:
            self._count_tiles("their order can't be changed")
            logger.info("Features are not cached but recomputed in every epoch.")
            return
        self._image_loader = self._in_order(dataloader)
        reason = reason_not_to_cache(dataloader) if self.hparams["feature_cache"] else "feature_cache=false"
        self._tiles_per_image = self._count_tiles(reason)
        if reason:
            logger.info("Features are not cached but recomputed in every epoch: %s.", reason)
            self.replace_dataloader(
                ResumableImageLoader(dataloader, self._seed, self.trained_batches, self.processes, hold_out=True)
            )
            return
        self._cached_loader = CachedFeatureLoader(
            self._tiles_per_image * len(dataloader.dataset),
            dataloader.batch_size,
            self._seed,
            self.trained_batches,
            self.processes,
            self._tiles_per_image,
            hold_out=True,
        )
        self.replace_dataloader(self._cached_loader)

    def _in_order(self, dataloader: Any) -> DataLoader:
        """Return a dataloader of this process's images in order; images that are cut into tiles come one by one."""
        return ordered(dataloader, self.processes, None if self.model.tiler is None else 1)

    def _count_tiles(self, not_cached: str | None) -> int:
        """Count the tiles of a training image, 1 where it is not cut; refuse what can't be trained on tiles."""
        if self.model.tiler is None:
            return 1
        size, count = image_size_of(self.pre_processor), self.processes.count
        tiles.check_patches(self.model.tiler, self.model.network.backbone.patch)
        reason = None
        if not_cached:
            reason = f"without the feature cache ({not_cached})"
        elif count > 1:
            reason = f"in {count} processes; use --trainer.devices 1"
        elif self.hparams["roi"] is not None:
            reason = "with roi, a region of whole images; leave one of both out"
        elif size is None:
            reason = "of images of unknown size; give the pre-processor a Resize to a height and a width"
        if reason:
            raise ValueError(f"TilerConfigurationCallback can't train on tiles {reason}.")
        assert size is not None
        return tiles.number_of_tiles(self.model.tiler, *size)

    def _images(self) -> Any:
        """Return a dataloader of this process's training images."""
        if self._image_loader is not None:
            return self._image_loader
        self.trainer.fit_loop.setup_data()
        return self.trainer.train_dataloader

    def _batches(self, name: str, cached: bool = True) -> Iterator[Any]:
        """Yield this process's training images once: cached features, or pre-processed images under a progress bar."""
        if cached and self._cached_loader is not None and self._cached_loader.cache is not None:
            size = self._tiles_per_image * ceil(_SCORING_BATCH / self._tiles_per_image)
            for features in self._cached_loader.in_order(size):
                self.stop_if_told()
                yield self.trainer.strategy.batch_to_device(features)
            return
        loader = self._images()
        for index, batch in enumerate(self.shown(name, ahead(loader), images_of(loader))):
            batch = self.trainer.strategy.batch_to_device(batch)  # noqa: PLW2901
            if isinstance(self.pre_processor, Callback):
                self.pre_processor.on_train_batch_start(self.trainer, self, batch, index)
            yield batch

    def _features(self, batch: Any) -> Tensor:
        """Fine features of the backbone, shape ``(B, C, 2 h, 2 w)``, of a batch of images or cached features."""
        if isinstance(batch, FeatureBatch):
            return batch.features
        network = self.model.network
        return torch.cat([network.extract_features(some) for some in self.model.tiles_of(batch.image)])

    def _numbered(self, name: str, cached: bool = True) -> Iterator[tuple[Any, Tensor]]:
        """Yield :meth:`_batches` with the number of each image or tile, the same at every call."""
        seen = 0
        for batch in self._batches(name, cached):
            count = len(batch.features) if isinstance(batch, FeatureBatch) else len(batch.image) * self._tiles_per_image
            if self._image_loader is None and getattr(batch, "image_path", None):  # a dataloader that may shuffle
                numbers = torch.tensor([crc32(str(path).encode()) for path in batch.image_path])
            else:
                numbers = self.processes.rank + self.processes.count * torch.arange(seen, seen + count)
            seen += count
            yield batch, numbers.to(self.device)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Load the backbone's weights, unless a checkpoint brought them, and make the feature pass."""
        super().on_fit_start()
        network = self.model.network
        self._judged_step, self._last_share = -1, None
        if not self._restored:
            network.keep(float("nan"), 0)
            if network.roi is not None:
                transform = getattr(self.pre_processor, "transform", None)
                network.roi.fit(self.hparams["roi"], transform, network.backbone.grid_size, self._first_image_size())
            if self.hparams["pre_trained"]:
                network.backbone.load_pretrained(self.hparams["backbone_weights"])
                transform = getattr(self.pre_processor, "transform", None)
                different = pre_processing.disagreement(network.backbone.name, transform)
                if different and self.trainer.is_global_zero:
                    logger.warning("The pre_processor %s; leave pre_processor out to use those.", different)
        if self.hparams["gradient_checkpointing"]:
            checkpoint_gradients(network.denoiser)
        self._feature_pass()

    @torch.no_grad()
    def _feature_pass(self) -> None:
        """Fit standardisation and PCA on all images, cache this process's features, and paint some anomalies."""
        network = self.model.network
        moments = StreamingMoments()
        loader, expected = self._cached_loader, self._expected_count()
        spacing = ceil(expected / _MOST_PAINTED)
        tiles_per_image = self._tiles_per_image
        judged = partial(_judged, total=expected // tiles_per_image, tiles_per_image=tiles_per_image)
        cache: FeatureCache | None = None
        judges: list[Tensor] = []
        seen: list[Tensor] = []
        painted: list[PaintedFeatures] = []
        done = 0
        for batch, every_number in self._numbered("Feature pass", cached=False):
            start = 0
            for images in self.model.tiles_of(batch.image):
                features = network.extract_features(images)
                numbers = every_number[start : start + len(images)]
                start += len(images)
                if loader is not None:
                    if cache is None:
                        limit = self.hparams["cache_memory_gb"] * 2**30
                        cache = FeatureCache(loader.num_cached, features.shape[1:], limit)
                    cache.features[done : done + len(features)] = features.cpu()
                done += len(features)
                means = coarse(features)
                moments.update(pack(network.roi, means).permute(0, 2, 3, 1).flatten(0, 2))
                pictures = numbers // self._tiles_per_image
                own = pictures % spacing == 0
                if own.any() and sum(len(one.numbers) for one in painted) < _MOST_PAINTED:
                    painted.append(self._paint(images[own], numbers[own]))
                if self._loader is not None:
                    judges.append(means[judged(pictures)])
                    seen.append(means[judged(pictures + 1)])
                self._image_size = (int(images.shape[-2]), int(images.shape[-1]))
        count = int(self.processes.add(torch.tensor(done)))
        if count < 2:
            raise ValueError(f"Training needs at least two normal images, the data set has {count}; add images to it.")
        pooled = moments.pooled(self.processes)
        if not self._restored:
            network.projection.fit(pooled)
            weight = network.projection.weight.double()
            network.variance.copy_(((weight @ pooled.covariance()) * weight).sum(dim=1))
        self._judges, self._seen = (torch.cat(some) if some else None for some in (judges, seen))
        parts = zip(*painted, strict=True)
        self._painted = PaintedFeatures(*(torch.cat(part) for part in parts)) if painted else None
        where = f"cached, {cache.describe()}" if cache is not None else "not cached"
        if loader is not None:
            loader.cache = cache
        logger.info("Features of %d %s: %s.", count, self._unit, where)

    def _first_image_size(self) -> tuple[int, int] | None:
        """Return height and width of the first training image's file, ``None`` where it is not known."""
        samples = getattr(getattr(self._image_loader, "dataset", None), "samples", None)
        if samples is None:
            return None
        try:
            with Image.open(samples.image_path.iloc[0]) as image:
                return image.height, image.width
        except OSError:  # of which the feature pass tells
            return None

    def _expected_count(self) -> int:
        """Return the number of images or tiles of all processes, 1 if it is unknown."""
        if self._image_loader is None:
            return 1
        return len(self._image_loader.dataset) * self._tiles_per_image  # type: ignore[arg-type]

    def _paint(self, images: Tensor, numbers: Tensor) -> PaintedFeatures:
        """Paint an anomaly on each image, and take features."""
        network = self.model.network
        pictures, masks = paint(blank(network.roi, images), numbers)
        covered = covered_positions(blank(network.roi, masks), network.backbone.grid_size)
        return PaintedFeatures(network.extract_features(pictures), pack(network.roi, covered[:, None])[:, 0], numbers)

    @property
    def _unit(self) -> str:
        """What a density scores at a time, for log lines."""
        return "images" if self.model.tiler is None else "tiles"

    @property
    def _has_denoiser(self) -> bool:
        """Whether there is anything to train."""
        return next(self.model.network.denoiser.parameters(), None) is not None

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
            self.model.network.denoiser.parameters(), lr=peak, weight_decay=self.hparams["weight_decay"]
        )
        total = int(self.trainer.estimated_stepping_batches)
        if self.hparams["warmup_epochs"] is not None:
            warmup = self.hparams["warmup_epochs"] * ceil(self.trainer.num_training_batches)
        else:
            warmup = min(self.hparams["warmup_steps"], total // 10)
        first, last = self.hparams["initial_learning_rate"] / peak, self.hparams["final_learning_rate"] / peak
        # Not SequentialLR: LinearLR can't start at 0, and a restored CosineAnnealingLR can't be extended to more steps.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(warmup_cosine, warmup=warmup, total=total, first=first, last=last)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One step of the DDPM objective on a batch of images or cached features; callbacks see the global loss."""
        del batch_idx
        features = self._features(batch)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.step_seed())
        total = self.images_in_step(len(features))
        loss: Tensor = self.model.network.training_loss(features, generator, self.processes, total)
        mean = self.processes.mean(loss)
        self.check_loss(mean)
        self.log("train_loss", mean, prog_bar=True, batch_size=total)
        return {"loss": loss, "train_loss": mean}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, update the averaged denoiser and evaluate it every 50 steps, before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.model.network.ema.update_parameters(self.model.network.denoiser)
        step = self.trainer.global_step + 1  # which Lightning has yet to count
        if step % _JUDGED_EVERY == 0:
            self._judge(step)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Log the latest evaluation."""
        super().on_train_batch_end(*args, **kwargs)
        if self.trainer.global_step == self._judged_step and self._last_share is not None:
            self.log("explained_share", self._last_share, rank_zero_only=True, batch_size=1)

    @torch.no_grad()
    def _judge(self, step: int) -> None:
        """Keep the averaged denoiser if it explains more of the held-out noise than any before, even the untrained.

        One that explains much more on images of the training has learnt those by heart: then their fields, which the
        densities are fitted on, are unlike those of new images.
        """
        network = self.model.network
        if step == self._judged_step or not self._has_denoiser:
            return
        self._judged_step = step
        count = 0 if self._judges is None else len(self._judges)
        if not int(self.processes.add(torch.tensor(count))):
            network.keep(float("nan"), step)
            return
        none = network.variance.new_zeros(0, 1, 1, 1)
        judges, seen = (none if some is None else some for some in (self._judges, self._seen))
        share = network.explained_share(judges, self.processes)
        self._last_share = share
        best = float(network.kept_share)
        if isnan(best):
            best = float("-inf") if self.needs_denoiser else 0.0
        self._seen_share = network.explained_share(seen, self.processes)
        if not self.needs_denoiser and share < _GENERALISES * self._seen_share:
            if best > 0:  # too few images, from the start
                network.remove_denoiser()
        elif share > best:
            network.keep(share, step)

    # ------------------------------------------------------------------ scorer

    @property
    def explained_share(self) -> float:
        """Share of the noise that the denoiser explains on held-out images, see ``FieldNetwork``; 0 if untrained."""
        share = float(self.model.network.kept_share)
        return 0.0 if isnan(share) else share

    @torch.no_grad()
    def fit_scoring(self) -> None:
        """Fit the scorer on the training images' fields."""
        if self.trainer.state.fn == TrainerFn.FITTING and self._has_denoiser and self.trainer.global_step:
            self._judge(self.trainer.global_step)
            self._describe_denoiser()
        network, scorer = self.model.network, self.model.scorer
        tiles_per_image = self._tiles_per_image  # which are held out together
        fields: list[Tensor] = []
        images: Images = partial(self._training_fields, fields)

        def painted() -> Iterator[Painted]:
            if self._painted is None:  # other processes may have some
                return
            for features, covered, numbers in zip(*(part.split(_SCORING_BATCH) for part in self._painted), strict=True):
                field, fine = network.fields_of(features)
                yield Painted(field, fine, covered, numbers // tiles_per_image)

        fitted = scorer.fit(images, painted, self.processes, self._image_size)
        kept = self._unsuspicious(fitted)
        if kept is not None:
            images, painted = _kept_images(images, kept), _kept_painted(painted, kept)
            fitted = scorer.fit(images, painted, self.processes, self._image_size)
        ended = self.trainer.global_step >= self.trainer.estimated_stepping_batches
        if ended and len(fitted.found) and not self.needs_denoiser and self.explained_share > 0:
            fields.clear()
            again = partial(scorer.fit, images, painted, self.processes, self._image_size, fitted.fine)
            fitted = self._compare_with_none(fitted, again)
        logger.info("Scorer: fitted on %d %s.", scorer.num_images, self._unit)
        own = self.post_processor
        if isinstance(own, FalseAlarmPostProcessor) and self.reason_no_held_out_scores is None:
            of_tiles = fitted.held_out.unflatten(0, (-1, tiles_per_image))
            own.note_training(torch.cat([of_tiles[..., :2].amax(dim=1), of_tiles[..., 2:].amin(dim=1)], dim=1))

    def _training_fields(self, fields: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield fields, fine features and image numbers; the first pass fills ``fields``, later ones read it."""
        network = self.model.network
        for index, (batch, numbers) in enumerate(self._numbered("Scorer fit")):
            features = self._features(batch)
            if index < len(fields):
                field, fine = fields[index], network.fine_features(features)
            else:
                field, fine = network.fields_of(features)
                if self._cached_loader is not None and index * field.nbytes < _FIELDS_IN_MEMORY:
                    fields.append(field)
            yield field, fine, numbers // self._tiles_per_image

    def _unsuspicious(self, fitted: Fit) -> Tensor | None:
        """Name the images of the highest scores, and return which are kept, ``None`` for all."""
        if self._image_loader is None or self.processes.count > 1:
            return None
        scores = fitted.held_out[:, 0].unflatten(0, (-1, self._tiles_per_image)).amax(dim=1)
        paths = getattr(getattr(self._image_loader.dataset, "samples", None), "image_path", None)
        order = scores.argsort(descending=True)
        if paths is not None and self.reason_no_held_out_scores is None:
            self.suspicious_images = [(str(paths.iloc[n]), float(scores[n])) for n in order[:_MOST_SUSPICIOUS].tolist()]
            named = ", ".join(f"{Path(path).name} {score:.1f}" for path, score in self.suspicious_images)
            logger.info("Most suspicious training images, with their scores: %s.", named)
        count = round(self.hparams["expected_contamination"] * len(scores))
        if not count:
            return None
        logger.info("Scorer: the %d most suspicious training images are left out.", count)
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[order[:count]] = False
        return kept

    def _compare_with_none(self, fitted: Fit, fit: Callable[[], Fit]) -> Fit:
        """Remove the denoiser where the densities alone find clearly more of the painted anomalies.

        ``fit`` fits the scorer to the fields of the present network.
        """
        kept = copy.deepcopy(self.model.state_dict())
        self.model.network.remove_denoiser()
        alone = fit()
        removed = significant_gain(alone.found, fitted.found) > 0
        if not removed:
            self.model.load_state_dict(kept)
        logger.info(
            "Denoiser: %s, as %.1f %% of the painted anomalies are found with it and %.1f %% by the densities alone.",
            f"removed, density {self.model.scorer.structure}" if removed else "kept",
            100 * float(fitted.found.mean()),
            100 * float(alone.found.mean()),
        )
        return alone if removed else fitted

    def _describe_denoiser(self) -> None:
        network = self.model.network
        share, count = self.explained_share, 0 if self._judges is None else len(self._judges)
        if count and not int(network.kept_step):
            logger.info(
                "Denoiser: on %d held-out images it explains %.1f %% of the noise that a linear one leaves, on images "
                "of the training %.1f %%, so it has learnt too little or those by heart; the untrained one is kept, "
                "and scores are those of the densities alone.",
                count,
                100 * (self._last_share or 0),
                100 * self._seen_share,
            )
        elif count:
            logger.info(
                "Denoiser: on %d held-out images it explains %.1f %% of the noise that a linear one leaves (step %d).",
                count,
                100 * share,
                int(network.kept_step),
            )

    @property
    def reason_no_held_out_scores(self) -> str | None:
        """Why there are no held-out scores of training images, ``None`` if there are."""
        datamodule: Any = self.trainer.datamodule
        if datamodule is None:
            return "they came as a dataloader, not as a datamodule"
        if isinstance(datamodule, SharedDataModule):  # whose batches may be of features
            datamodule = datamodule.datamodule
        return reason_not_to_cache(datamodule.train_dataloader())

    def can_score(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether a checkpoint has a fitted scorer."""
        state = checkpoint.get("state_dict", {}).get("model.scorer._extra_state", {})
        return bool(state.get("num_images", 0))

    @property
    def is_unfinished(self) -> bool:
        """Whether the scorer is still to be fitted; a model without a denoiser has no training."""
        return super().is_unfinished or not self._has_denoiser

    def on_predict_start(self) -> None:
        """Refuse to predict without a fitted scorer."""
        super().on_predict_start()
        self.check_fitted()

    def teardown(self, stage: str) -> None:
        """Release the cache."""
        super().teardown(stage)
        self._cached_loader = self._image_loader = self._judges = self._seen = self._painted = None

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how images are cut into tiles."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_TILER_KEY] = tiles.as_plain(self.model.tiler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut images as in the training, unless a callback says otherwise."""
        own, saved = self.model.tiler, checkpoint.get(_TILER_KEY)
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and tiles.as_plain(own) != saved:
            raise ValueError(
                f"The training in ckpt_path is one on {tiles.described(tiles.from_plain(saved))}, not on "
                f"{tiles.described(own)}; use the same TilerConfigurationCallback, or none if there was none."
            )
        super().on_load_checkpoint(checkpoint)
        self.model.tiler = own or tiles.from_plain(saved)

    def check_graph(self, input_size: tuple[int, int] | None) -> None:
        """Refuse models on tiles whose number is unknown.

        Raises:
            ValueError: If there are such.
        """
        if self.model.tiler is not None and input_size is None:
            raise ValueError(
                "A model on tiles is exported to ONNX or OpenVINO for images of one size, and input_size is missing; "
                "give --input_size '[HEIGHT, WIDTH]', or use --export_type torch for images of any size."
            )


def _kept_images(images: Images, kept: Tensor) -> Images:
    """Leave images out; those that are ``kept`` ``(N,)`` are numbered anew, so that folds stay of equal size."""

    def those() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for field, fine, numbers in images():
            own = kept[numbers]
            if own.any():
                yield field[own], fine[own], kept.cumsum(0)[numbers[own]] - 1

    return those


def _kept_painted(painted: Callable[[], Iterable[Painted]], kept: Tensor) -> Callable[[], Iterator[Painted]]:
    """Leave out painted images, see :func:`_kept_images`."""

    def those() -> Iterator[Painted]:
        for batch in painted():
            own = kept[batch.numbers]
            numbers = kept.cumsum(0)[batch.numbers[own]] - 1
            if own.any():
                yield Painted(batch.field[own], batch.fine[own], batch.covered[own], numbers)

    return those


def warmup_cosine(step: int, warmup: int, total: int, first: float, last: float) -> float:
    """Learning rate at a step as a share of its peak: a linear warm-up, then half a cosine down.

    ``first`` is the share at the first step, ``last`` that at the end.
    """
    if step < warmup:
        return first + (1 - first) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return last + (1 - last) * 0.5 * (1 + cos(pi * progress))
