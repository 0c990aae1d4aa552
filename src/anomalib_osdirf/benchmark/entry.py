# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmark entries: models with the same metrics, image size and backbone weights, and a limit to their training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

import anomalib_osdirf.data.multi_category
import anomalib_osdirf.data.synthetic_surfaces
import anomalib_osdirf.models  # noqa: F401 - known by name once they are imported
from anomalib_osdirf.arguments import hint
from anomalib_osdirf.features.packaged_weights import package_of
from anomalib_osdirf.features.pre_processing import normalised_for
from anomalib_osdirf.models.metrics import default_evaluator
from anomalib_osdirf.registration import subclasses
from anomalib_osdirf.training.diffusion_training import DiffusionTraining


@dataclass(frozen=True)
class Entry:
    """A model of the benchmark: its name in tables, and anomalib's class and its arguments.

    ``max_epochs`` is for models that train by gradient and don't set a duration.
    """

    name: str
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    max_epochs: int | None = None

    @classmethod
    def parse(cls, value: Any) -> "Entry":
        """Read an entry: a mapping, or a list of one mapping."""
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
            value = value[0]
        if not isinstance(value, Mapping):
            raise ValueError(f"entry={value!r} is not a model: give name, class_path, init_args and max_epochs.")  # noqa: TRY004 - whoever wrote the file reads it
        known = {one.name for one in fields(cls)}
        for key in value:
            if key not in known:
                raise ValueError(f"entry has the unknown key {key!r}; {hint(str(key), known)}")
        if not isinstance(value.get("class_path"), str):
            msg = f"entry={dict(value)!r} has no class_path; give the name of an anomalib model, such as Patchcore."
            raise ValueError(msg)  # noqa: TRY004 - whoever wrote the file reads it
        init_args = dict(value.get("init_args") or {})
        for argument in ("evaluator", "visualizer"):
            if argument in init_args:
                msg = f"entry {value['class_path']} has {argument}, which is the same for all models; leave it out."
                raise ValueError(msg)
        epochs = value.get("max_epochs")
        if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
            msg = f"max_epochs={epochs!r} of entry {value['class_path']} is not a whole number of at least 1."
            raise ValueError(msg)
        name = value.get("name") or value["class_path"].rpartition(".")[2]
        return cls(str(name), value["class_path"], init_args, epochs)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def build_entry(
    entry: Any,  # from a configuration file
    backbone_weights: Mapping[str, str] | None = None,
    image_size: int | None = 256,
) -> AnomalibModule:
    """Build a model for a benchmark, ``anomalib benchmark`` included.

    Args:
        entry: Mapping with ``name``, ``class_path``, ``init_args`` and ``max_epochs``, or a list of one: anomalib's
            benchmark takes the mappings of a configuration apart and can then only tabulate models with the same
            arguments, but leaves lists alone.
        backbone_weights: Files of timm backbones' weights, by the backbone's name; other backbones come from the hub.
        image_size: Side of the square that images are resized to; ``None``, or a ``pre_processor`` among the entry's
            arguments, leaves it to the model.

    Returns:
        The model, with this package's metrics and without pictures.

    Raises:
        ValueError: If the class or one of its arguments is unknown, or if the model would train for Lightning's 1000
            epochs.
    """
    if OmegaConf.is_config(entry):
        entry = OmegaConf.to_container(entry)
    weights = {name: str(file) for name, file in (backbone_weights or {}).items()}
    return build_model(Entry.parse(entry), weights, image_size)


def build_model(
    entry: Entry, backbone_weights: Mapping[str, str], image_size: int | None, seed: int | None = None
) -> AnomalibModule:
    """Build the model of an entry, see :func:`build_entry`; a ``seed`` is given to models that take one."""
    parser, parsed = parse_model(entry)
    arguments = parsed.model
    given = entry.init_args
    check_weights(backbone_weights)
    if "backbone_weights" in arguments and "backbone_weights" not in given:
        arguments.backbone_weights = backbone_weights.get(arguments.backbone)
    if "seed" in arguments and "seed" not in given:
        arguments.seed = seed
    if "evaluator" in arguments:
        arguments.evaluator = default_evaluator()
    if "visualizer" in arguments:
        arguments.visualizer = False
    if image_size is not None and "pre_processor" in arguments and "pre_processor" not in given:
        default = model_class(entry).configure_pre_processor(image_size=(image_size, image_size))
        if isinstance(arguments.get("backbone"), str):
            default = PreProcessor(normalised_for(arguments.backbone, default.transform))
        arguments.pre_processor = default
    with local_weights(backbone_weights):
        model: AnomalibModule = parser.instantiate_classes(parsed).model
    _end_training(model, entry)
    return model


def check_weights(files: Mapping[str, str]) -> None:
    """Refuse a missing weights file."""
    for name, file in files.items():
        if not Path(file).is_file():
            msg = f"backbone_weights has {file!r} for {name}, which does not exist; give a .safetensors or .pth file."
            raise ValueError(msg)


def parse_model(entry: Entry) -> tuple[ArgumentParser, Namespace]:
    """Check an entry's class and arguments, and return the parser and the parsed arguments."""
    return _parse("model", model_class(entry), entry.init_args)


def model_class(entry: Entry) -> Any:
    """Return an entry's class."""
    return _find_class(entry.class_path, AnomalibModule, "a model")


def build_data(specification: Mapping[str, Any]) -> AnomalibDataModule:
    """Build a datamodule from ``class_path`` and ``init_args``."""
    class_path = str(specification["class_path"])
    found = _find_class(class_path, AnomalibDataModule, "a datamodule")
    parser, parsed = _parse("data", found, dict(specification.get("init_args") or {}))
    datamodule: AnomalibDataModule = parser.instantiate_classes(parsed).data
    return datamodule


def _find_class(class_path: str, base: type, what: str) -> Any:
    """Return a class by its name, or by its path."""
    known = subclasses(base)
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name) if module else known[name]
    except (ImportError, AttributeError, KeyError) as error:
        msg = f"class_path={class_path!r} is not {what} that can be imported; {hint(name, known)}"
        raise ValueError(msg) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"class_path={class_path!r} is not {what}; {hint(name, known)}")  # noqa: TRY004 - whoever wrote the file reads it
    return found


def _parse(key: str, found: Any, init_args: dict[str, Any]) -> tuple[ArgumentParser, Namespace]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, key, fail_untyped=False)
    try:
        return parser, parser.parse_object({key: deepcopy(init_args)})  # which it changes
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{found.__name__} can't be built from init_args={init_args!r}: {reason}") from error


@contextmanager
def local_weights(files: Mapping[str, str]) -> Iterator[None]:
    """Make timm load backbone weights from files or installed packages, for models without such an argument."""
    original = timm.create_model

    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        package = package_of(model_name)
        if model_name in files:
            kwargs["pretrained_cfg_overlay"] = {"file": files[model_name]}
        elif package is not None and package.version is not None and kwargs.get("pretrained"):
            state = package.read(original(model_name).state_dict())
            kwargs["pretrained_cfg_overlay"] = {"state_dict": state}
        return original(model_name, *args, **kwargs)

    timm.create_model = create_model
    try:
        yield
    finally:
        timm.create_model = original


class _EpochLimit(Callback):
    """Limits the epochs; set before optimisers are created, since their schedules may read it."""

    def __init__(self, max_epochs: int) -> None:
        self.max_epochs = max_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the limit."""
        del pl_module
        if stage == "fit":
            trainer.fit_loop.max_epochs = self.max_epochs


def _end_training(model: AnomalibModule, entry: Entry) -> None:
    """Limit a training: a benchmark passes no trainer arguments, and Lightning's default is 1000 epochs."""
    if entry.max_epochs is not None:
        own, limit = model.configure_callbacks, _EpochLimit(entry.max_epochs)
        model.configure_callbacks = lambda: [*own(), limit]  # type: ignore[method-assign,misc]
    elif not has_an_end(model):
        msg = f"model {entry.name!r} trains by gradient and would do so for 1000 epochs; give its entry max_epochs."
        raise ValueError(msg)


def has_an_end(model: AnomalibModule) -> bool:
    """Return whether a model sets its training's duration; Lightning's default is 1000 epochs."""
    return (
        isinstance(model, DiffusionTraining)
        or bool(model.trainer_arguments.keys() & {"max_epochs", "max_steps"})
        or model.learning_type in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}
    )
