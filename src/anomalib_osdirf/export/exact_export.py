# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Additions of this package's models to anomalib's exports."""

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.deploy.export import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor
from torchvision.transforms import v2

from anomalib_osdirf.data.broken_files import report, skip_broken
from anomalib_osdirf.data.reading import read_carefully
from anomalib_osdirf.disk import why_unwritable
from anomalib_osdirf.export import metadata, quantisation
from anomalib_osdirf.export.exact_resize import exact_export_transform
from anomalib_osdirf.export.files import move_export, unfinished_export
from anomalib_osdirf.export.openvino_precision import keep_float32, keep_small_constants
from anomalib_osdirf.export.options import (
    CALIBRATED,
    ExportOptions,
    check_input_size,
    check_max_drop,
    compression_of,
    need,
)
from anomalib_osdirf.export.post_processing import OPSET, append_post_processor, drop_inner_names
from anomalib_osdirf.export.quantiser import Quantiser
from anomalib_osdirf.progress import step
from anomalib_osdirf.runs import run_of
from anomalib_osdirf.telemetry import send_nothing
from anomalib_osdirf.terminal import verbose

logger = logging.getLogger(__name__)

_BY_NNCF = (CompressionType.INT8, *CALIBRATED)
_CHECKPOINT_KEY = "osdirf_trained"
_POST_PROCESSOR = "post_processor."
_PATH_ARGUMENTS = ("backbone_weights", "anomaly_source_path", "foreground_masks", "roi")


class ExactExport(ExportMixin, ABC):
    """Exports that give the scores of ``Engine.predict``, and refuse models that can't score.

    ``onnx_kwargs`` of anomalib's export command and of ``Engine.export`` take
    :class:`~anomalib_osdirf.export.options.ExportOptions` besides the options of ``torch.onnx.export``.
    """

    model: Any
    pre_processor: Any
    post_processor: Any
    hparams: Any

    _trained: str | None = None
    _exporting = False
    _loaded_from: Path | None = None  # the checkpoint
    _saved_post_processing: dict[str, Any] | None = None

    def make_pre_processor_exact(self) -> None:
        """Give the pre-processor an export transform that resizes as it does in training.

        anomalib makes one without antialiasing whenever it builds or restores a pre-processor.
        """
        if isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.export_transform = exact_export_transform(self.pre_processor.transform)

    @abstractmethod
    def check_fitted(self) -> None:
        """Raise an error if the model is not fitted."""

    def check_graph(self, input_size: tuple[int, int] | None) -> None:
        """Raise an error if the model can't be made an ONNX or OpenVINO graph for that image size, ``None`` for any."""

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, see Lightning, and remember where it lies."""
        loaded = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[misc] # Lightning's
        if isinstance(checkpoint_path, str | Path):
            loaded._loaded_from = Path(checkpoint_path)  # noqa: SLF001
        return loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the date."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc] # of AnomalibModule
        self._trained = metadata.now()
        checkpoint[_CHECKPOINT_KEY] = self._trained

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the training's date, and its thresholds even where the post-processor is switched off."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._trained = checkpoint.get(_CHECKPOINT_KEY)
        state = checkpoint["state_dict"]
        if self.post_processor is None:
            saved = {name: state.pop(name) for name in list(state) if name.startswith(_POST_PROCESSOR)}
            if saved:
                values = {name.removeprefix(_POST_PROCESSOR): value for name, value in saved.items()}
                config = SimpleNamespace(**checkpoint.get("anomalib_post_processor_config") or {})
                self._saved_post_processing = {
                    **metadata.post_processing_values(values),
                    **metadata.description(config),
                }

    # ------------------------------------------------------------------ exports

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as a pickled torch module, see anomalib."""

        def export(root: Path) -> Path:
            path = ExportMixin.to_torch(self, root, model_file_name)
            metadata.write_json(self._metadata(self.post_processor, included=True), path)
            return path

        return self._export(export_root, f"torch-{model_file_name}", export)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, see anomalib; opset 18 unless told otherwise.

        With an ``input_size``, every shape in the graph is fixed, for one image at a time.
        Keyword arguments are options of this class and of ``torch.onnx.export``.
        """
        need("onnx", "onnxscript")
        options, kwargs = ExportOptions.split(kwargs)
        kwargs = {"opset_version": OPSET, "verbose": verbose(), **kwargs}
        if input_size is not None and "dynamic_axes" not in kwargs:
            kwargs.setdefault("dynamic_shapes", None)  # anomalib leaves the batch dynamic
        if self._exporting:  # called by anomalib from within to_openvino
            return ExportMixin.to_onnx(self, Path(export_root), model_file_name, input_size, **kwargs)
        check_input_size(input_size)
        self.check_graph(input_size)

        def export(root: Path) -> Path:
            with self._without_post_processor(unless=options.post_processor):
                path = ExportMixin.to_onnx(self, root, model_file_name, input_size, **kwargs)
            values = self._metadata(self.post_processor, included=options.post_processor)
            metadata.write_onnx(values, path)
            metadata.write_json(values, path)
            return path

        return self._export(export_root, f"onnx-{model_file_name}", export)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: Any = None,
        metric: Any = None,
        task: Any = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO, see anomalib, whose arguments these are; ``onnx_kwargs`` has this class's options, too.

        Replaced in anomalib: the converted model is made to carry its precision, the network is compressed without its
        post-processing, whose thresholds are refitted for a quantised network, which is calibrated on training
        images. anomalib calibrates on validation images, which are the test set for MVTec-like data, and quantises
        resize, density and post-processing along with the network, which ruins the scores.

        Raises:
            ValueError: If an argument is unknown or out of range, or data are missing.
        """
        del task
        options, onnx_kwargs = ExportOptions.split(onnx_kwargs or {})
        compression = compression_of(compression_type)
        need("openvino", "onnx", "onnxscript", *(["nncf"] if compression in _BY_NNCF else []))
        send_nothing()
        check_input_size(input_size)
        self.check_graph(input_size)
        if compression in CALIBRATED:
            self._check_calibration(compression.name, input_size, datamodule)
        check_max_drop(max_drop)

        def export(root: Path) -> Path:
            import openvino

            with self._without_post_processor(), self._with_fields(compression in CALIBRATED):
                path = ExportMixin.to_openvino(
                    self, root, model_file_name, input_size, ov_kwargs=ov_kwargs, onnx_kwargs=onnx_kwargs
                )
            # Read from memory, not mapped: the file is written again.
            network = openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
            exact = options.inference_precision == "f32"
            post_processor = self.post_processor
            if compression in CALIBRATED:
                self._prepare_images(datamodule, self._destination(export_root))
                scope = self._floating_point_scope(network)
                quantiser = Quantiser(
                    self.model,
                    self.pre_processor,
                    post_processor,
                    datamodule,
                    options.calibration_images,
                    self._shows_progress(),
                )
                with step(f"Quantisation on {len(quantiser.images)} images", self._shows_progress()):
                    network = quantiser.quantise(network, scope, compression, metric, max_drop)
                if exact:
                    keep_float32(network, scope.names)
                post_processor = quantiser.refit(network)
            elif exact:
                keep_float32(network)
            if compression == CompressionType.INT8:
                network = quantisation.compress_weights(network, self._floating_point_scope(network))
            values = self._metadata(
                post_processor,
                included=options.post_processor,
                compression_type=compression.name if compression else "FP32",
                inference_precision=options.inference_precision,
            )
            if post_processor is not None and options.post_processor:
                network = append_post_processor(network, post_processor)
            drop_inner_names(network)
            metadata.write_openvino(values, network)
            if compression == CompressionType.FP16:
                network = keep_small_constants(network)
            openvino.save_model(network, path, compress_to_fp16=compression == CompressionType.FP16)
            metadata.write_json(values, path)
            return path

        return self._export(export_root, f"openvino-{model_file_name}", export)

    def _check_calibration(self, name: str, input_size: tuple[int, int] | None, datamodule: Any) -> None:
        if getattr(self.model, "tiler", None) is not None:
            raise ValueError(f"compression_type={name} can't calibrate a model on tiles; use FP16 or INT8.")
        if datamodule is None:
            raise ValueError(
                f"compression_type={name} needs images to calibrate on, and datamodule is missing; "
                "pass the training's data with --data (datamodule=...)."
            )
        size = image_size_of(self.pre_processor)
        if input_size is not None and size not in (None, list(input_size)):
            raise ValueError(
                f"input_size={input_size!r} is not the size of the images that compression_type={name} calibrates on, "
                f"as the pre-processor resizes them; use {size}, or FP16 or INT8."
            )

    def _prepare_images(self, datamodule: Any, destination: Path) -> None:
        """Read a datamodule's images as in training, skipping broken ones if training did."""
        read_carefully()
        if self.hparams.get("skip_broken_images"):
            quantisation.set_up(datamodule, self.pre_processor)
            subsets = [getattr(datamodule, name, None) for name in ("train_data", "val_data")]
            report(skip_broken(subsets, self._shows_progress()), destination / "broken_images_export.csv")

    def _shows_progress(self) -> bool:
        trainer = getattr(self, "_trainer", None)
        return trainer is None or trainer.progress_bar_callback is not None

    def _floating_point_scope(self, network: Any) -> Any:
        projection = getattr(getattr(self.model, "network", None), "projection", None)
        return quantisation.floating_point_scope(network, None if projection is None else projection.weight)

    @contextmanager
    def _with_fields(self, wanted: bool) -> Iterator[None]:
        """Have a model with fields return them beside its scores."""
        kept = self.model
        if wanted and hasattr(kept, "scorer"):
            self.model = quantisation.WithFields(kept)
        try:
            yield
        finally:
            self.model = kept

    @contextmanager
    def _without_post_processor(self, unless: bool = False) -> Iterator[None]:
        kept = self.post_processor
        if not unless:
            self.post_processor = None
        try:
            yield
        finally:
            self.post_processor = kept

    def _metadata(self, post_processor: Any, included: bool, **more: str) -> dict[str, Any]:
        """What the exported files say about the model."""
        if post_processor is not None:
            values = metadata.post_processing_values(post_processor.state_dict())
        else:
            values = self._saved_post_processing or {}
        # A path tells about the machine that trained, not about the model.
        arguments = {name: value for name, value in self.hparams.items() if name not in _PATH_ARGUMENTS}
        backbone = getattr(getattr(self.model, "network", None), "backbone", None)
        if backbone is not None:
            arguments["backbone_weights"] = backbone.weights
        return {
            "model": type(self).__name__,
            **values,
            **metadata.description(post_processor),
            "image_size": image_size_of(self.pre_processor),
            "trained": self._trained,
            "exported": metadata.now(),
            "versions": metadata.versions(),
            "arguments": arguments,
            "post_processor": included and post_processor is not None,
            **more,
        }

    def _destination(self, export_root: Path | str) -> Path:
        """Return the run folder of a model that was loaded from it, where anomalib names the root of all runs.

        That is what it exports to by default, and where models would overwrite each other.
        """
        root = Path(export_root)
        run = None if self._loaded_from is None else run_of(self._loaded_from)
        # anomalib's layout: <root>/<model>/<data>/...
        if run is not None and run.is_relative_to(root.resolve() / type(self).__name__):
            return root / run.relative_to(root.resolve())
        return root

    def _export(self, export_root: Path | str, name: str, export: Callable[[Path], Path]) -> Path:
        """Export into a temporary folder beside the destination and move the files when all are complete."""
        self.check_fitted()
        self.make_pre_processor_exact()
        destination = self._destination(export_root)
        full_model = self.model
        try:
            with (
                unfinished_export(destination, name) as temporary,
                step("Export", self._shows_progress()),
                torch.no_grad(),
            ):
                try:
                    self.model, self._exporting = full_model.eval().freeze(), True
                    model_path = export(temporary).relative_to(temporary)
                finally:
                    self.model, self._exporting = full_model, False
                move_export(temporary, destination, model_path)
        except (OSError, RuntimeError) as error:
            reason = why_unwritable(error)
            if reason is None:
                raise
            msg = f"export_root={str(destination)!r} can't be written to ({reason}); make room or use another folder."
            raise OSError(getattr(error, "errno", None) or errno.ENOSPC, msg) from error
        logger.info("Exported to %s.", destination / model_path)
        return destination / model_path


def image_size_of(pre_processor: Any) -> list[int] | None:
    """Return the height and width that a pre-processor resizes to, ``None`` if it does not resize."""
    transform = getattr(pre_processor, "transform", None)
    parts = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    sizes = [list(part.size) for part in parts if isinstance(part, v2.Resize) and part.size is not None]
    return sizes[-1] if sizes else None
