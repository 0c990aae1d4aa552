# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""OSD-IRF as an anomalib model."""

from collections.abc import Sequence

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer

from anomalib_osdirf.export.exact_export import ExactExport
from anomalib_osdirf.models.osdirf.torch_model import OSDIRFModel
from anomalib_osdirf.registration import register
from anomalib_osdirf.training.field_training import FieldTraining


class OSDIRF(FieldTraining, ExactExport, AnomalibModule):  # type: ignore[misc] # parents' to_onnx differ
    """One-step diffusion with the inverse residual field (OSD-IRF, arXiv 2604.18393).

    A denoiser is trained on the features of normal images. At test time one evaluation gives the inverse residual
    field. Its negative log density, in units of held-out normal variation, is the anomaly map.

    Args:
        backbone: timm model whose frozen features are used, or ``filter_bank``, fixed filters that need no weights.
            Defaults to ``tf_efficientnet_lite0``.
        layers: Layers of the backbone, such as ``[blocks.1, blocks.2]``; ``None`` takes those of stride 8 and 16 or, of
            a transformer, blocks 3, 6, 9 and 11 of 12. Defaults to ``None``.
        pre_trained: Load pre-trained weights; ``False`` leaves the backbone random. Defaults to ``True``.
        backbone_weights: Local .safetensors or .pth file to load instead of an installed package's (extra ``weights``,
            for ``tf_efficientnet_lite0``) or a download. Defaults to ``None``.
        feature_dim: Maximum number of principal components of the features; ``None`` keeps all channels, standardised.
            Defaults to ``96``.
        grid_size: Side of the field's grid, in positions. The map has a second, finer part of twice as many.
            Defaults to ``16``.
        denoiser: ``conv_mlp``, a perceptron with depthwise convolutions, the same at every position; ``unet``; a
            diffusion transformer: ``dit_s``, ``dit_b``, ``dit_l``, ``dit_gigant``; or, for comparison, ``none``, which
            trains nothing and scores by the densities only. Defaults to ``conv_mlp``.
        timestep: Timestep of the noise schedule, 0 to 999, at which the field is read. Defaults to ``200``.
        density: ``position``, a Gaussian per position and cluster of images, for aligned parts; ``mixture``, a mixture
            of Gaussians shared by all positions, for parts that lie anywhere; ``auto``, whichever finds more of the
            anomalies painted on held-out training images; or ``standard``, the paper's N(0, I). Defaults to ``auto``.
        learning_rate: Peak learning rate of AdamW. Defaults to ``1e-3``.
        initial_learning_rate: Learning rate that the linear warm-up starts from. Defaults to ``0.0``.
        final_learning_rate: Learning rate that the cosine decay ends at. Defaults to ``0.0``.
        weight_decay: Weight decay of AdamW. Defaults to ``0.0``.
        warmup_steps: Steps of linear warm-up, a tenth of the training at most. Defaults to ``100``.
        warmup_epochs: Epochs of linear warm-up, instead of ``warmup_steps``. Defaults to ``None``.
        gradient_clip_norm: Maximum gradient norm, 0 for no clipping; ``trainer.gradient_clip_val`` overrides it.
            Defaults to ``1.0``.
        ema_decay: Decay of the denoiser's exponential moving average, which gives the scores. Defaults to ``0.999``.
        seed: Seed of the initial weights, the order of images and the training noise; ``None`` uses torch's global
            seed. (anomalib 2.7 ignores ``--seed_everything``.) Defaults to ``None``.
        max_steps: Optimiser steps to train for; ``trainer.max_steps`` and ``trainer.max_epochs`` override it.
            Defaults to ``None``: 300 steps.
        max_epochs: Epochs to train for, instead of ``max_steps``. Defaults to ``None``.
        check_val_every_n_epoch: Also validate every n epochs; ``None`` validates once, at the end. Defaults to
            ``None``.
        checkpoint_every_n_steps: Keep a checkpoint to resume from every n steps; 0 keeps none. Defaults to ``200``.
        skip_broken_images: Skip unreadable images and list them in ``broken_images_fit.csv`` (``..._test.csv``) in the
            run folder, which reads each image once more; otherwise the first one ends the run. Predictions always skip
            them. Defaults to ``False``.
        feature_cache: Compute features once and train on them, if images are not augmented. Defaults to ``True``.
        cache_memory_gb: Cache size per process in GiB above which a memory-mapped file is used. Defaults to ``4.0``.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass: slower training in less
            memory, for large denoisers. Defaults to ``False``.
        false_alarm_rate: Share of normal images that may be labelled anomalous, such as ``0.01``: thresholds come from
            normal images only, and scores have p-values, see
            :class:`~anomalib_osdirf.post_processing.FalseAlarmPostProcessor`. ``None`` uses the best F1 if the
            validation data have defects (for the pixel threshold, masks); otherwise normal images, at a rate of 1 % or
            the smallest that their number supports. Defaults to ``None``.
        pre_processor: Pre-processor, or ``True`` for a resize to 256 x 256 and the normalisation that the backbone was
            trained with. For transformers the size is rounded to a multiple of the patch size. Defaults to ``True``.
        post_processor: Post-processor, or ``True`` for
            :class:`~anomalib_osdirf.post_processing.FalseAlarmPostProcessor`. Defaults to ``True``.
        evaluator: Evaluator, or ``True`` for image AUROC, AP, F1max and pixel AUROC, AP, F1max, AUPRO. Defaults to
            ``True``.
        visualizer: Visualizer, or ``True`` for anomalib's. Defaults to ``True``.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> model = OSDIRF(backbone="mobilenetv2_100", backbone_weights="mobilenetv2_100.safetensors")
        >>> Engine().train(model, datamodule=Folder("parts", root="parts", normal_dir="good"))  # doctest: +SKIP
    """

    model: OSDIRFModel
    network_class = OSDIRFModel
    default_steps = 300

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | None = None,
        feature_dim: int | None = 96,
        grid_size: int = 16,
        denoiser: str = "conv_mlp",
        timestep: int = 200,
        density: str = "auto",
        learning_rate: float = 1e-3,
        initial_learning_rate: float = 0.0,
        final_learning_rate: float = 0.0,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        warmup_epochs: int | None = None,
        gradient_clip_norm: float = 1.0,
        ema_decay: float = 0.999,
        seed: int | None = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        check_val_every_n_epoch: int | None = None,
        checkpoint_every_n_steps: int = 200,
        skip_broken_images: bool = False,
        feature_cache: bool = True,
        cache_memory_gb: float = 4.0,
        gradient_checkpointing: bool = False,
        false_alarm_rate: float | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.check_training_arguments()
        self.model = self.build_model(dict(self.hparams))
        self.suit_backbone(is_default=pre_processor is True)


register(OSDIRF)
