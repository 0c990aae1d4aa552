# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Training common to all models of this package: duration, final validation, checkpoints, resuming."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib import LearningType
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.serialization import anomalib_safe_globals
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

import anomalib_osdirf
from anomalib_osdirf import terminal
from anomalib_osdirf.data.broken_files import datasets_in, report, skip_broken
from anomalib_osdirf.data.reading import allow_any_script, read_carefully
from anomalib_osdirf.models.metrics import default_evaluator
from anomalib_osdirf.post_processing import FalseAlarmPostProcessor
from anomalib_osdirf.processes import DistributedContext
from anomalib_osdirf.progress import images_in, of_processes, phase
from anomalib_osdirf.training.checkpoint_files import (
    RESUME_NAME,
    plain_data_only,
    remove_partial_files,
    use_checkpoint_files,
)
from anomalib_osdirf.training.distributed import (
    check_predicted_images,
    images_of_splits,
    refuse_sharding,
    share_results_folder,
)
from anomalib_osdirf.training.resumable import ResumableLoader, SharedDataModule, reason_not_to_reorder
from anomalib_osdirf.training.training_progress import TrainingProgress

logger = logging.getLogger(__name__)

# Lightning's own default, which `--trainer` passes on when the user says nothing.
_LIGHTNING_MAX_EPOCHS = 1000
_NEVER = 2**31 - 1
_IDLE_SECONDS = 60.0  # after which nobody writes to a file any more
_STATUS_AFTER_SIGTERM = 143  # as a shell reports it
MODEL_KEY = "osdirf_model"
_STRUCTURE_KEY = "osdirf_structure"
_POST_PROCESSOR_KEY = "anomalib_post_processor_config"
_POST_PROCESSOR = "post_processor."
# What a datamodule reads images for.
_SUBSETS = {
    TrainerFn.FITTING: ("train_data", "val_data"),
    TrainerFn.VALIDATING: ("val_data",),
    TrainerFn.TESTING: ("test_data",),
    TrainerFn.PREDICTING: ("test_data",),
}


class ResumeCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint to resume from during training, and removes it once the final one is written."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save every n steps, except after the last: resumed from there, Lightning would not finish the training."""
        loop = trainer.fit_loop
        last_epoch = loop.max_epochs not in {None, -1} and trainer.current_epoch + 1 >= loop.max_epochs
        if trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch):
            return
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After a signal, say how to resume, and exit with an error status, unlike Lightning."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, SIGTERMException):
            exception.code = _STATUS_AFTER_SIGTERM
        if isinstance(exception, SIGTERMException | KeyboardInterrupt) and self.best_model_path:
            logger.warning("Interrupted; --ckpt_path %s goes on from there.", self.best_model_path)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: with any other, Lightning requires this callback wherever the file is loaded."""
        return {}

    def remove(self, trainer: Trainer) -> None:
        """Delete the checkpoint."""
        if self.best_model_path:
            trainer.strategy.remove_checkpoint(self.best_model_path)
            self.best_model_path = ""


class DiffusionTraining(LightningModule):
    """Duration, seed, final validation, checkpoints and resuming.

    A model is a direct subclass of a subclass of this and of ``AnomalibModule``. The arguments of its constructors are
    plain values, kept in ``self.hparams``, and components of anomalib.

    Args:
        seed: Seed of the initial weights, the order of images and all that is drawn in training; ``None`` uses torch's
            global seed. (anomalib 2.7 ignores ``--seed_everything``.) Defaults to ``None``.
        max_epochs: Epochs to train for, instead of ``max_steps``. Defaults to ``None``.
        check_val_every_n_epoch: Also validate every n epochs; ``None`` validates once, at the end. Defaults to
            ``None``.
        checkpoint_every_n_steps: Keep a checkpoint to resume from every n steps; 0 keeps none. Defaults to ``200``.
        skip_broken_images: Skip unreadable images and list them in ``broken_images_fit.csv`` (``..._test.csv``) in the
            run folder, which reads each image once more; otherwise the first one ends the run. Predictions always skip
            them. Defaults to ``False``.
        false_alarm_rate: Share of normal images that may be labelled anomalous, such as ``0.01``: thresholds come from
            normal images only, and scores have p-values, see
            :class:`~anomalib_osdirf.post_processing.FalseAlarmPostProcessor`. ``None`` uses the best F1 if the
            validation data have defects (for the pixel threshold, masks); otherwise normal images, at a rate of 1 % or
            the smallest that their number supports. Defaults to ``None``.
        pre_processor: Pre-processor, or ``True`` for the model's. Defaults to ``True``.
        post_processor: Post-processor, or ``True`` for
            :class:`~anomalib_osdirf.post_processing.FalseAlarmPostProcessor`. Defaults to ``True``.
        evaluator: Evaluator, or ``True`` for image AUROC, AP, F1max and pixel AUROC, AP, F1max, AUPRO. Defaults to
            ``True``.
        visualizer: Visualizer, or ``True`` for anomalib's. Defaults to ``True``.
    """

    network_class: ClassVar[type[torch.nn.Module]]  # what build_model builds
    network_parts: ClassVar[tuple[type[torch.nn.Module], ...]] = ()  # which it hands arguments on to
    structure: ClassVar[int] = 1  # incremented when earlier checkpoints no longer load
    default_epochs: ClassVar[int] = -1  # where neither max_steps nor max_epochs is given
    default_steps: ClassVar[int] = -1  # likewise; whichever ends first
    model: Any
    pre_processor: Any
    post_processor: Any
    trainer: Any
    make_pre_processor_exact: Callable[[], None]

    # Arguments that may differ between a checkpoint and the model that loads it: they affect training, not the network.
    training_arguments: ClassVar[frozenset[str]] = frozenset(
        {
            "learning_rate",
            "gradient_clip_norm",
            "seed",
            "max_steps",
            "max_epochs",
            "check_val_every_n_epoch",
            "checkpoint_every_n_steps",
            "false_alarm_rate",  # new thresholds are set if it differs
            "skip_broken_images",
        }
    )
    positive_arguments: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "max_steps",
        "max_epochs",
        "check_val_every_n_epoch",
    )
    non_negative_arguments: ClassVar[tuple[str, ...]] = ("gradient_clip_norm", "checkpoint_every_n_steps")

    _restored = False
    _fitted_here = False
    _seed = 0
    _fitted_step = -1
    _loader: ResumableLoader | None = None
    _thresholds_missing = False  # in a checkpoint that was trained with another false_alarm_rate or none

    def __init__(
        self,
        seed: int | None = None,
        max_epochs: int | None = None,
        check_val_every_n_epoch: int | None = None,
        checkpoint_every_n_steps: int = 200,
        skip_broken_images: bool = False,
        false_alarm_rate: float | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        terminal.quiet_command_line()  # from the first message on
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.check_training_arguments()

    def check_training_arguments(self) -> None:
        """Refuse impossible training arguments."""
        for name in self.positive_arguments:
            value = self.hparams[name]
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} is not positive; use a number above 0.")
        for name in self.non_negative_arguments:
            if not self.hparams[name] >= 0:
                raise ValueError(f"{name}={self.hparams[name]!r} is negative; use 0 or a positive number.")
        rate, own = self.hparams["false_alarm_rate"], self.post_processor
        if rate is not None and own is not None and getattr(own, "false_alarm_rate", None) != rate:
            msg = f"false_alarm_rate={rate!r} and a {type(own).__name__} exclude each other; drop one of them."
            raise ValueError(msg)

    def build_model(self, arguments: dict[str, Any]) -> Any:
        """Build the torch module from the constructor's arguments that it accepts."""
        allow_any_script()  # before the datamodule looks at its folders
        names = constructor_parameters(*self.network_class.__mro__, *self.network_parts)
        with torch.random.fork_rng(devices=[], enabled=arguments["seed"] is not None):
            if arguments["seed"] is not None:
                torch.manual_seed(arguments["seed"])
            return self.network_class(**{name: value for name, value in arguments.items() if name in names})

    @property
    def learning_type(self) -> LearningType:
        """One-class: training images are normal."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Metrics that are computed by default."""
        return default_evaluator()

    def configure_post_processor(self) -> PostProcessor:
        """Post-processor that is used by default."""
        return FalseAlarmPostProcessor(self.hparams["false_alarm_rate"])

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments of this model; the length of the training is set by :meth:`_set_duration`."""
        every = self.hparams["check_val_every_n_epoch"]
        return {"num_sanity_val_steps": 0, "check_val_every_n_epoch": every or _NEVER}

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add progress and the checkpoint to resume from to anomalib's components."""
        callbacks: list[Callback] = list(super().configure_callbacks())  # type: ignore[arg-type]
        callbacks.append(TrainingProgress())
        if terminal.is_quiet():
            self.trainer.callbacks[:] = [one for one in self.trainer.callbacks if not isinstance(one, ModelSummary)]
        final = self.trainer.checkpoint_callback
        every = self.hparams["checkpoint_every_n_steps"]
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if fitting and every and isinstance(final, ModelCheckpoint):
            resume = ResumeCheckpoint(
                dirpath=final.dirpath, filename=RESUME_NAME, every_n_train_steps=every, enable_version_counter=False
            )
            callbacks.append(resume)
        return callbacks

    # ------------------------------------------------------------------ data

    @property
    def processes(self) -> DistributedContext:
        """The trainer's processes."""
        return DistributedContext.of(self.trainer)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """All buffers: they are equal in all processes, so DDP need not broadcast them before each step."""
        return [name for name, _ in self.named_buffers()]

    def setup(self, stage: str) -> None:
        """Install careful readers and writers, shard the data, share the results folder, and fix the seed."""
        super().setup(stage)
        refuse_sharding(self.trainer)
        read_carefully()
        use_checkpoint_files(self.trainer.strategy)
        self._skip_broken_files(TrainerFn(stage))
        if self.processes.count > 1:
            self._setup_processes()
        if stage == "fit":
            for folder in Path(self.trainer.default_root_dir).parent.glob("v*/weights/lightning"):
                remove_partial_files(folder, _IDLE_SECONDS)
            self._loader = None
            seed = self.hparams["seed"]
            self._seed = (self.trainer.strategy.broadcast(torch.initial_seed()) if seed is None else seed) % 2**31

    def _setup_processes(self) -> None:
        if self.processes.rank:
            logging.getLogger(anomalib_osdirf.__name__).setLevel(logging.WARNING)
        share_results_folder(self.trainer)
        if self.trainer.state.fn == TrainerFn.PREDICTING:
            check_predicted_images(self.trainer)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return
        paths = images_of_splits(datamodule)
        if not self.trainer.strategy.reduce_boolean_decision(paths == self.trainer.strategy.broadcast(paths)):
            raise ValueError(
                f"The datamodule splits images by chance, each of the {self.processes.count} processes differently; "
                "give it a seed, as in --data.seed 0."
            )
        self.trainer.datamodule = SharedDataModule(datamodule, self.processes)

    def orderable_dataloader(self) -> Any:  # a DataLoader with a batch size, or None
        """Return the datamodule's training dataloader, if it can be reordered."""
        datamodule, count = getattr(self.trainer, "datamodule", None), self.processes.count
        if datamodule is None:
            reason: str | None = "the training data came as a dataloader, not as a datamodule"
        else:
            dataloader = datamodule.train_dataloader()
            reason = reason_not_to_reorder(dataloader)
        if reason is None:
            images = len(dataloader.dataset)
            if images < count:
                msg = f"{count} processes can't share {images} training images; use --trainer.devices {images} at most."
                raise ValueError(msg)
            return dataloader
        if count > 1:
            msg = f"{count} processes can't share the training images, because {reason}; use --trainer.devices 1."
            raise ValueError(msg)
        logger.info("A resumed training will see the images in another order: %s.", reason)
        return None

    def _skip_broken_files(self, stage: TrainerFn) -> None:
        """Skip broken files: always in a prediction, otherwise with ``skip_broken_images``."""
        predicting = stage == TrainerFn.PREDICTING
        if not predicting and not self.hparams["skip_broken_images"]:
            return
        trainer = self.trainer
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            datasets = [getattr(datamodule, name, None) for name in _SUBSETS[stage]]
        elif predicting:
            # Lightning gives no other way to dataloaders before it goes through them.
            datasets = list(datasets_in(trainer.predict_loop._data_source.instance))  # noqa: SLF001
        else:
            msg = "skip_broken_images=true needs a datamodule, and there are dataloaders; pass a datamodule."
            raise ValueError(msg)
        found = skip_broken(datasets, trainer.progress_bar_callback is not None and trainer.is_global_zero)
        if trainer.is_global_zero:
            report(found, Path(trainer.default_root_dir) / f"broken_images_{stage.value}.csv")
        if found and not predicting and not all(len(dataset) for dataset in datasets if dataset is not None):
            raise ValueError(f"skip_broken_images=true leaves no image to {stage.value}: {next(iter(found.values()))}.")

    def replace_dataloader(self, loader: ResumableLoader) -> None:
        """Train on a loader's batches instead of the datamodule's."""
        self._loader = loader
        datamodule = self.trainer.datamodule
        if isinstance(datamodule, SharedDataModule):
            datamodule = datamodule.datamodule
        self.trainer.datamodule = SharedDataModule(datamodule, self.processes, loader)

    def trained_batches(self) -> int:
        """Return the number of batches that were trained on so far."""
        return int(self.trainer.fit_loop.total_batch_idx) + 1

    def images_in_step(self, own: int) -> int:
        """Return the number of images in this step's global batch; ``own`` are this process's."""
        return own if self._loader is None else self._loader.images_at(self.trainer.fit_loop.total_batch_idx)

    def shown(self, name: str, batches: Iterable[Any], images: int | None) -> Iterator[Any]:
        """Yield batches under a progress bar, shown by the first process for its own images."""
        visible = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        for batch in phase(of_processes(name, self.processes.count), batches, images, visible, images_in):
            self.stop_if_told()
            yield batch

    def teardown(self, stage: str) -> None:
        """Restore the trainer's datamodule."""
        super().teardown(stage)
        if stage == "fit":
            self._loader = None
        if isinstance(self.trainer.datamodule, SharedDataModule):
            self.trainer.datamodule = self.trainer.datamodule.datamodule

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Set the training's duration."""
        super().on_fit_start()
        self._set_duration()
        self._fitted_here = False
        self._fitted_step = -1

    def step_seed(self) -> int:
        """Return the seed of this training step, the same in a resumed training."""
        return self._seed * 2**32 + int(self.trainer.fit_loop.total_batch_idx)

    def check_loss(self, loss: Tensor) -> None:
        """Stop a training that diverges, in all processes, by their mean loss."""
        if not torch.isfinite(loss):
            raise RuntimeError(self._divergence_message(loss.item()))

    def stop_if_told(self) -> None:
        """Stop after a SIGTERM; Lightning only checks for it after each training step."""
        if self.trainer.received_sigterm:
            raise SIGTERMException

    def _set_duration(self) -> None:
        """Train for the model's max_steps or max_epochs unless the user's trainer arguments say otherwise."""
        trainer, loop = self.trainer, self.trainer.fit_loop
        if trainer.max_steps != -1 or trainer.max_epochs != _LIGHTNING_MAX_EPOCHS:
            return
        epochs, steps = self.hparams["max_epochs"], self.hparams["max_steps"]
        if epochs is not None:
            loop.max_epochs = epochs
        elif steps is not None:
            loop.max_epochs, loop.epoch_loop.max_steps = -1, steps
        else:
            loop.max_epochs, loop.epoch_loop.max_steps = self.default_epochs, self.default_steps

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

    def _divergence_message(self, loss: float) -> str:
        callbacks = [callback for callback in self.trainer.callbacks if isinstance(callback, ResumeCheckpoint)]
        saved = next((callback.best_model_path for callback in callbacks if callback.best_model_path), None)
        kept = f"the last good checkpoint is kept in {saved}" if saved else "no checkpoint had been saved yet"
        return (
            f"Training stopped at step {self.trainer.global_step} because the loss became {loss}; {kept}; "
            f"lower learning_rate (now {self.hparams['learning_rate']:g})."
        )

    # ------------------------------------------------------------------ validation, checkpoint

    def fit_scoring(self) -> None:
        """Fit on training images whatever scores need besides the trained weights."""

    def _fit_scoring(self) -> None:
        if self._fitted_step != self.trainer.global_step:
            self.fit_scoring()
            self._fitted_step = self.trainer.global_step
            self._fitted_here = True

    def on_validation_start(self) -> None:
        """Fit before any validation of a training: thresholds come from its scores."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._fit_scoring()

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Score a batch."""
        del args, kwargs
        batch.update(**self.model(batch.image)._asdict())
        finite = batch.pred_score.isfinite() & batch.anomaly_map.flatten(1).isfinite().all(1)
        if not finite.all():
            index = int(finite.int().argmin())
            image = batch.image_path[index] if batch.image_path else f"image {index} of the batch"
            raise RuntimeError(
                f"The score of {image} is not a number, because the model's weights are damaged or overflow in half "
                "precision; use --trainer.precision 32, another checkpoint, or train again."
            )
        return batch

    test_step = validation_step
    predict_step = validation_step

    def check_fitted(self) -> None:
        """Raise an error if the model is not fitted."""
        self.model.check_fitted()

    def on_train_end(self) -> None:
        """Fit, validate once and save, also if the training ended inside an epoch."""
        super().on_train_end()
        self.finish()

    @property
    def is_unfinished(self) -> bool:
        """Whether a fit is missing although there is nothing to train."""
        return self._thresholds_missing

    def on_fit_end(self) -> None:
        """Do a missing fit if there was nothing to train, as with the checkpoint of a finished training."""
        super().on_fit_end()
        if self.is_unfinished:
            self.to(self.trainer.strategy.root_device)  # Lightning has put the model away
            self.finish()

    def finish(self) -> None:
        """Fit, validate and save; save even if the validation fails, so that the training is not lost."""
        validated = self._fitted_step == self.trainer.global_step
        self._fit_scoring()
        try:
            if not validated:
                self._validate()
            self._set_thresholds()
            self._thresholds_missing = False
        finally:
            self._save()

    def _save(self) -> None:
        trainer = self.trainer
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        for callback in callbacks:
            if not isinstance(callback, ResumeCheckpoint):
                self._save_final(callback)
        # Last, so that there is a checkpoint at any moment.
        for callback in callbacks:
            if isinstance(callback, ResumeCheckpoint):
                callback.remove(trainer)

    def _validate(self) -> None:
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # or, with a checkpoint's progress, it would skip batches
        self.trainer.validating = True
        try:
            loop.run()
        finally:
            self.trainer.training = True

    def _set_thresholds(self) -> None:
        """Set thresholds from training images if there were no validation images; warn if there is no threshold."""
        own = self.post_processor
        if isinstance(own, FalseAlarmPostProcessor) and own.is_waiting:
            own.on_validation_epoch_end(self.trainer, self)
        if isinstance(own, FalseAlarmPostProcessor) and own.image_threshold.isnan() and not self.trainer.fast_dev_run:
            logger.warning(
                "There is no threshold, and scores are the model's own: neither the validation data nor the training "
                "have normal images to set one by; use --data.val_split_mode from_train."
            )

    def _save_final(self, callback: ModelCheckpoint) -> None:
        """Save the finished model where a checkpoint callback keeps its latest.

        The callback itself saves only after a validation, and without validation data there is none.
        """
        if callback.monitor is None and not self.trainer.fast_dev_run:
            path = callback.format_checkpoint_name({})
            if Path(callback.best_model_path).parent != Path(path).parent:
                # None yet, or the one that this training resumed from, which is not to be overwritten.
                callback.best_model_path = path
            self.trainer.save_checkpoint(callback.best_model_path)
            logger.info("Checkpoint: %s.", callback.best_model_path)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seed of batches and noise, so that a resumed training ends as an undisturbed one."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MODEL_KEY] = type(self).__name__
        checkpoint[_STRUCTURE_KEY] = self.structure
        checkpoint["osdirf_seed"] = self._seed
        checkpoint["osdirf_fitted"] = self._fitted_step == self.trainer.global_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adopt the checkpoint's arguments where this model's are at their defaults."""
        trainer: Any = self._trainer
        fn = trainer.state.fn if trainer is not None else None
        other_thresholds = self._has_other_thresholds(checkpoint)
        if fn == TrainerFn.TESTING and self._fitted_here and (other_thresholds or not self.can_score(checkpoint)):
            # `anomalib train --ckpt_path` resumes from a checkpoint and then tests that same, unfinished one.
            logger.info("Testing the model that was just trained, not the checkpoint that its training resumed from.")
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["callbacks"] = {}  # thresholds and the finished model's path are theirs
            return
        skipped = self.hparams["skip_broken_images"]
        self.check_checkpoint(checkpoint)
        self._adopt_arguments(checkpoint.get("hyper_parameters", {}))
        if other_thresholds:
            self._drop_thresholds(checkpoint, fn)
        else:
            self._adopt_post_processor(checkpoint)
        super().on_load_checkpoint(checkpoint)
        self.make_pre_processor_exact()
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None and fn is not None:
            # Its data sets still resize like the pre-processor before it was restored.
            datamodule.setup(fn)
            if fn in {TrainerFn.VALIDATING, TrainerFn.TESTING} and not skipped:
                self._skip_broken_files(fn)
        if fn == TrainerFn.FITTING and trainer.ckpt_path and trainer.is_global_zero:
            remove_partial_files(Path(trainer.ckpt_path).parent)
        self._restored = True
        self._seed = checkpoint.get("osdirf_seed", self._seed)
        if self._loader is not None:
            self._loader.seed = self._seed

    def _has_other_thresholds(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether this model asks for a false-alarm rate that the checkpoint's thresholds don't have."""
        saved, own = checkpoint.get(_POST_PROCESSOR_KEY) or {}, self.post_processor
        names = ("false_alarm_rate", "extrapolate", "images")
        wanted = getattr(own, "false_alarm_rate", None) is not None
        return wanted and any(saved.get(name) != getattr(own, name) for name in names)

    def _drop_thresholds(self, checkpoint: dict[str, Any], fn: TrainerFn | None) -> None:
        """Drop a checkpoint's thresholds, for a training that sets new ones."""
        own = self.post_processor
        if fn != TrainerFn.FITTING:
            saved = (checkpoint.get(_POST_PROCESSOR_KEY) or {}).get("false_alarm_rate")
            has = "other thresholds" if saved is None else f"false_alarm_rate={saved:g} or other options of it"
            name = type(self).__name__
            raise ValueError(
                f"false_alarm_rate={own.false_alarm_rate:g} disagrees with the checkpoint, which has {has}; drop it "
                f"to use the checkpoint's, or set new thresholds, without training again, by `anomalib train "
                f"--model {name} --ckpt_path` with the training's data."
            )
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith(_POST_PROCESSOR)]:
            del state[name]
        state.update({f"{_POST_PROCESSOR}{name}": value for name, value in own.state_dict().items()})
        checkpoint.pop(_POST_PROCESSOR_KEY, None)
        checkpoint.get("callbacks", {}).pop(own.state_key, None)
        self._thresholds_missing = True

    def _adopt_post_processor(self, checkpoint: dict[str, Any]) -> None:
        """Use the checkpoint's post-processor class, ours or anomalib's: another one could not restore its state."""
        saved, replaced = checkpoint.get(_POST_PROCESSOR_KEY), self.post_processor
        if replaced is None or not saved:
            return
        wanted = FalseAlarmPostProcessor if "false_alarm_rate" in saved else PostProcessor
        if isinstance(replaced, FalseAlarmPostProcessor) == (wanted is FalseAlarmPostProcessor):
            return
        self.post_processor = wanted()
        if self._trainer is not None:
            callbacks = self.trainer.callbacks
            callbacks[:] = [self.post_processor if callback is replaced else callback for callback in callbacks]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, see Lightning; as plain data, unless ``weights_only=False`` is asked for."""
        safe = anomalib_safe_globals(extra=cls.checkpoint_safe_globals())  # type: ignore[attr-defined] # AnomalibModule's
        with safe, plain_data_only(checkpoint_path):
            saved = torch.load(checkpoint_path, map_location="cpu", weights_only=kwargs.get("weights_only", True))
        cls.check_checkpoint(saved)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @classmethod
    def check_checkpoint(cls, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that this model can't load."""
        name, own = checkpoint.get(MODEL_KEY), cls.__name__
        if name is None:
            raise ValueError(
                f"ckpt_path holds no model of this package, so it can't be loaded as {own}; use the --model that it "
                "was trained with."
            )
        if name != own:
            raise ValueError(f"ckpt_path holds a trained {name}, which can't be loaded as {own}; use --model {name}.")
        if checkpoint.get(_STRUCTURE_KEY, 1) != cls.structure:
            raise ValueError(
                f"ckpt_path holds an {own} of an incompatible earlier version of anomalib-osdirf; train it "
                "again, or use the version that wrote it."
            )

    def can_score(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether a checkpoint was saved at the end of a training, or at a validation during it."""
        return bool(checkpoint.get("osdirf_fitted", False))

    def _adopt_arguments(self, saved: dict[str, Any]) -> None:
        parameters = constructor_parameters(*type(self).__mro__)
        adopted = {}
        for name, value in saved.items():
            own = self.hparams.get(name)
            if name not in parameters or name not in self.hparams or _plain(own) == _plain(value):
                continue
            if _plain(own) == _plain(parameters[name].default):
                adopted[name] = value
            elif name not in self.training_arguments:
                raise ValueError(
                    f"{name}={own!r} disagrees with the checkpoint, which has {name}={value!r}; drop {name} to "
                    f"use the checkpoint's, or train again with {name}={own!r}."
                )
        if adopted:
            listed = ", ".join(f"{name}={value!r}" for name, value in adopted.items())
            logger.info("Taken from the checkpoint: %s.", listed)
            self.hparams.update(adopted)
        if set(adopted) - self.training_arguments:
            self.model = self.build_model(dict(self.hparams))


def constructor_parameters(*classes: type) -> dict[str, inspect.Parameter]:
    """Return what constructors take, by name; the first class that has a parameter says its default."""
    own = (vars(one)["__init__"] for one in reversed(classes) if "__init__" in vars(one))
    return {name: parameter for init in own for name, parameter in inspect.signature(init).parameters.items()}


def _plain(value: object) -> object:
    """Return a tuple as a list, as a configuration file has it."""
    return list(value) if isinstance(value, tuple) else value
