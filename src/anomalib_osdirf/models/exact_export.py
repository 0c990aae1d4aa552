# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What every model of this package adds to anomalib's exports."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.deploy.export import CompressionType
from anomalib.metrics import F1Score
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms import v2

from anomalib_osdirf.export import exact_export_transform, metadata, quantisation
from anomalib_osdirf.export.instructions import avoid_broken_instructions
from anomalib_osdirf.export.openvino_precision import keep_float32

logger = logging.getLogger(__name__)

_OPSET = 18  # what torch's exporter writes natively
_PRECISIONS = ("f32", "any")
_CALIBRATED = (CompressionType.INT8_PTQ, CompressionType.INT8_ACQ)
_CHECKPOINT_KEY = "osdirf_trained"
_POST_PROCESSOR = "post_processor."
_PATH_ARGUMENTS = ("backbone_weights", "anomaly_source_path", "foreground_masks")


class ExactExport(ExportMixin):
    """Exports that give the scores of ``Engine.predict``, and refuse what can't score.

    ``onnx_kwargs`` of anomalib's export command and of ``Engine.export`` take three options besides those of
    ``torch.onnx.export``:

     - ``post_processor`` (bool): ``False`` exports raw score and raw map, without thresholds and normalisation.
     - ``inference_precision``: ``f32`` makes an OpenVINO model compute in float32 wherever it runs, ``any`` leaves it
       to the device, which is faster and less exact where it computes in bfloat16 or float16.
     - ``calibration_images`` (int): how many training images INT8_PTQ and INT8_ACQ look at, 300 by default.
    """

    model: Any
    pre_processor: Any
    post_processor: Any
    hparams: Any

    _trained: str | None = None
    _saved_post_processing: dict[str, float | None] | None = None

    def make_pre_processor_exact(self) -> None:
        """Give the pre-processor an export transform that resizes as it does in training.

        anomalib makes one without antialiasing whenever it builds or restores a pre-processor.
        """
        if isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.export_transform = exact_export_transform(self.pre_processor.transform)

    def check_fitted(self) -> None:
        """Raise an error if the model can't score yet."""
        raise NotImplementedError

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Date the checkpoint."""
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
                self._saved_post_processing = metadata.post_processing_values(
                    {name.removeprefix(_POST_PROCESSOR): value for name, value in saved.items()}
                )

    # ------------------------------------------------------------------ exports

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as a pickled torch module, see anomalib."""

        def export(root: Path) -> Path:
            path = ExportMixin.to_torch(self, root, model_file_name)
            metadata.write_json(self._metadata(self.post_processor, included=True), path.with_suffix(".json"))
            return path

        return self._export(export_root, export)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to ONNX, see anomalib; opset 18 unless told otherwise.

        Args:
            export_root: Folder to write to.
            model_file_name: Name of the file, without its extension.
            input_size: Height and width that the model is fixed to; ``None`` for any.
            **kwargs: Options of this class and of ``torch.onnx.export``.

        Returns:
            Path of the model.
        """
        _need("onnx", "onnxscript")
        options, kwargs = _split_options(kwargs)

        def export(root: Path) -> Path:
            with self._without_post_processor(unless=options["post_processor"]):
                kwargs.setdefault("opset_version", _OPSET)
                path = ExportMixin.to_onnx(self, root, model_file_name, input_size, **kwargs)
            values = self._metadata(self.post_processor, included=options["post_processor"])
            metadata.write_onnx(values, path)
            metadata.write_json(values, path.with_suffix(".json"))
            return path

        return self._export(export_root, export)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: Any = None,  # noqa: ANN401
        metric: Any = None,  # noqa: ANN401
        task: Any = None,  # noqa: ANN401
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO, see anomalib.

        Replaced in anomalib: the converted model is made to carry its precision, the network is compressed without its
        post-processing, whose thresholds are fitted anew for a quantised network, and what calibrates it are training
        images. anomalib calibrates on validation images, which are the test set for MVTec-like data, and quantises
        resize, density and post-processing along with the network, which ruins the scores.

        Args:
            export_root: Folder to write to.
            model_file_name: Name of the files, without their extension.
            input_size: Height and width that the model is fixed to; ``None`` for any.
            compression_type: ``FP16``, ``INT8`` (weights only), ``INT8_PTQ``, ``INT8_ACQ``, or ``None`` for float32.
            datamodule: Data for ``INT8_PTQ`` and ``INT8_ACQ``.
            metric: anomalib metric for ``INT8_ACQ``, the larger the better; ``None`` takes the image F1 score.
            task: Ignored, as by anomalib.
            max_drop: Largest loss of the metric for ``INT8_ACQ``, 0 to 1.
            ov_kwargs: Options of ``openvino.convert_model``.
            onnx_kwargs: Options of this class and of ``torch.onnx.export``.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If an argument is unknown or out of range, or data are missing.
        """
        del task
        options, onnx_kwargs = _split_options(onnx_kwargs or {})
        compression = _compression(compression_type)
        if compression in _CALIBRATED:
            _need("openvino", "nncf", "onnx", "onnxscript")
            if datamodule is None:
                msg = (
                    f"compression_type={compression.name} needs images to calibrate on, and datamodule is missing; "
                    "pass the training's data with --data (datamodule=...)."
                )
                raise ValueError(msg)
        else:
            _need("openvino", "onnx", "onnxscript", *(["nncf"] if compression == CompressionType.INT8 else []))
        if not 0 <= max_drop <= 1:
            msg = f"max_drop={max_drop} is out of range; use 0 to 1, 0.01 for one point of the metric."
            raise ValueError(msg)

        def export(root: Path) -> Path:
            import openvino

            with self._without_post_processor():
                path = ExportMixin.to_openvino(
                    self, root, model_file_name, input_size, ov_kwargs=ov_kwargs, onnx_kwargs=onnx_kwargs
                )
            # Read from memory, not mapped: the file is written again.
            network = openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
            exact = options["inference_precision"] == "f32"
            post_processor = self.post_processor
            if compression in _CALIBRATED:
                scope = self._floating_point_scope(network)
                images = quantisation.CalibrationImages(datamodule, self.pre_processor, options["calibration_images"])
                network = self._quantise(network, scope, images, compression, datamodule, metric, max_drop)
                if exact:
                    keep_float32(network, scope.names)
                post_processor = self._refit(network, datamodule)
            elif exact:
                keep_float32(network)
            if compression == CompressionType.INT8:
                network = quantisation.compress_weights(network, self._floating_point_scope(network))
            values = self._metadata(
                post_processor,
                included=options["post_processor"],
                compression_type=compression.name if compression else "FP32",
                inference_precision=options["inference_precision"],
            )
            if post_processor is not None and options["post_processor"]:
                network = _append(network, post_processor)
            metadata.write_openvino(values, network)
            openvino.save_model(network, path, compress_to_fp16=compression == CompressionType.FP16)
            metadata.write_json(values, path.with_suffix(".json"))
            return path

        return self._export(export_root, export)

    def _floating_point_scope(self, network: Any) -> Any:  # noqa: ANN401
        whitening = getattr(self.model, "whitening", None)
        return quantisation.floating_point_scope(network, None if whitening is None else whitening.weight)

    def _quantise(
        self,
        network: Any,  # noqa: ANN401
        scope: Any,  # noqa: ANN401
        images: quantisation.CalibrationImages,
        compression: CompressionType,
        datamodule: Any,  # noqa: ANN401
        metric: Any,  # noqa: ANN401
        max_drop: float,
    ) -> Any:  # noqa: ANN401
        """Quantise the network up to raw score and map."""
        avoid_broken_instructions()
        logger.info("Calibrating on %d training images, half of them with synthetic anomalies.", len(images))
        refit = quantisation.Refit(self.model, self.post_processor, datamodule)
        if refit.has_field:
            quantisation.expose_field(network)
        if compression == CompressionType.INT8_PTQ:
            return quantisation.quantise(network, images, scope)
        if not self._can_validate(datamodule):
            msg = (
                "compression_type=INT8_ACQ measures a metric on labelled validation images, and there are none, or no "
                "post-processor; use a val_split_mode other than none, or compression_type=INT8_PTQ."
            )
            raise ValueError(msg)
        metric = metric or F1Score(fields=["pred_label", "gt_label"])

        def measure(compiled: Any, indices: Iterable[int]) -> tuple[float, list[float]]:  # noqa: ANN401
            if refit.has_field:
                refit.fit_density(compiled)
            batches = refit.score(compiled, indices)
            raw = [float(batch.pred_score) for batch in batches if batch.pred_score is not None]
            return refit.measure(metric, batches), raw

        return quantisation.quantise_within(network, images, scope, measure, len(datamodule.val_data), max_drop)

    def _can_validate(self, datamodule: Any) -> bool:  # noqa: ANN401
        return bool(getattr(datamodule, "val_data", None)) and self.post_processor is not None

    def _refit(self, network: Any, datamodule: Any) -> Any:  # noqa: ANN401
        """Fit density and post-processor on the quantised network's own outputs, and put the density into it.

        Returns:
            The post-processor.
        """
        import openvino

        compiled = openvino.compile_model(network, "CPU")
        refit = quantisation.Refit(self.model, self.post_processor, datamodule)
        if refit.has_field:
            refit.fit_density(compiled)
            old, new = (dict(model.density.named_buffers()) for model in (self.model, refit.model))
            quantisation.replace_constants(network, old, new)
        if self._can_validate(datamodule):
            refit.fit_post_processor(refit.score(compiled, range(len(datamodule.val_data))))
        else:
            logger.warning(
                "Thresholds are those from before quantisation: there are no validation images to fit them on anew."
            )
        if refit.has_field:
            quantisation.hide_field(network)
        return refit.post_processor

    @contextmanager
    def _without_post_processor(self, unless: bool = False) -> Iterator[None]:
        kept = self.post_processor
        if not unless:
            self.post_processor = None
        try:
            yield
        finally:
            self.post_processor = kept

    def _metadata(self, post_processor: Any, included: bool, **more: str) -> dict[str, Any]:  # noqa: ANN401
        """What the exported files say about the model."""
        if post_processor is not None:
            values = metadata.post_processing_values(post_processor.state_dict())
        else:
            values = self._saved_post_processing or {}
        # A path tells about the machine that trained, not about the model.
        arguments = {name: value for name, value in self.hparams.items() if name not in _PATH_ARGUMENTS}
        return {
            "model": type(self).__name__,
            **values,
            **metadata.sensitivities(post_processor),
            "image_size": _image_size(self.pre_processor),
            "trained": self._trained,
            "exported": metadata.now(),
            "versions": metadata.versions(),
            "arguments": arguments,
            "post_processor": included and post_processor is not None,
            **more,
        }

    def _export(self, export_root: Path | str, export: Callable[[Path], Path]) -> Path:
        """Export into a temporary folder beside the destination and move the files when all are complete."""
        if not hasattr(self.model, "deployed"):  # inside another export: OpenVINO's goes through ONNX's
            return export(Path(export_root))
        self.check_fitted()
        self.make_pre_processor_exact()
        destination = Path(export_root)
        full_model = self.model
        try:
            destination.mkdir(parents=True, exist_ok=True)
            temporary_folder = tempfile.TemporaryDirectory(dir=destination, prefix=".export-")
        except OSError as error:
            msg = f"export_root={str(destination)!r} can't be written to ({error.strerror}); choose another folder."
            raise OSError(msg) from error
        with temporary_folder as name, torch.no_grad():
            temporary = Path(name)
            try:
                self.model = full_model.eval().deployed()
                model_path = export(temporary).relative_to(temporary)
            finally:
                self.model = full_model
            for file in [path for path in temporary.rglob("*") if path.is_file()]:
                target = destination / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, target)
        return destination / model_path


class _PostProcessing(nn.Module):
    """A post-processor as a network of its own."""

    def __init__(self, post_processor: nn.Module) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, pred_score: Tensor, anomaly_map: Tensor) -> dict[str, Tensor]:
        result = self.post_processor(InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map))
        return {name: value for name, value in result._asdict().items() if value is not None}


def _append(network: Any, post_processor: nn.Module) -> Any:  # noqa: ANN401
    """Put a post-processor behind an ``openvino.Model`` that ends in raw score and map."""
    import openvino

    module = _PostProcessing(post_processor).eval()
    examples = (torch.rand(2), torch.rand(2, 1, 4, 5))
    batch = torch.export.Dim("batch")
    inputs = ("pred_score", "anomaly_map")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "post_processor.onnx"
        torch.onnx.export(
            module,
            examples,
            file,
            input_names=[f"raw_{name}" for name in inputs],
            output_names=list(module(*examples)),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: batch}, {0: batch, 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}),
        )
        post = openvino.convert_model(file)
    for name in inputs:
        raw = next(result for result in network.get_results() if name in result.output(0).get_names())
        parameter = next(one for one in post.get_parameters() if f"raw_{name}" in one.output(0).get_names())
        source = raw.input_value(0)
        source.set_names({f"raw_{name}"})
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(source)
    return openvino.Model(post.get_results(), network.get_parameters(), network.get_friendly_name())


def _split_options(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take our own options out of a dictionary, check them, and return both parts."""
    defaults = {"post_processor": True, "inference_precision": "f32", "calibration_images": None}
    options = {name: kwargs.get(name, default) for name, default in defaults.items()}
    if options["inference_precision"] not in _PRECISIONS:
        msg = (
            f"inference_precision={options['inference_precision']!r} is unknown; use f32 to compute in float32 "
            "wherever the model runs, or any to leave it to the device."
        )
        raise ValueError(msg)
    if options["post_processor"] not in {True, False}:
        msg = f"post_processor={options['post_processor']!r} is neither true nor false; use one of them."
        raise ValueError(msg)
    return options, {name: value for name, value in kwargs.items() if name not in defaults}


def _compression(value: CompressionType | str | None) -> CompressionType | None:
    if value is None:
        return None
    try:
        return CompressionType(value.lower())
    except ValueError:
        names = ", ".join(one.name for one in CompressionType)
        msg = f"compression_type={value!r} is unknown; use one of {names}, or leave it out for float32."
        raise ValueError(msg) from None


def _need(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        msg = (
            f"This export needs {', '.join(missing)}, which is not installed; install the extra: pip install "
            "'anomalib-osdirf[openvino]'."
        )
        raise ModuleNotFoundError(msg)


def _image_size(pre_processor: Any) -> list[int] | None:  # noqa: ANN401
    transform = getattr(pre_processor, "transform", None)
    parts = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    sizes = [list(part.size) for part in parts if isinstance(part, v2.Resize) and part.size is not None]
    return sizes[-1] if sizes else None
