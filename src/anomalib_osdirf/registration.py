# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""Make a class of ours one of anomalib's models or datamodules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule
    from anomalib.models.components import AnomalibModule

ModelClass = TypeVar("ModelClass", bound="type[AnomalibModule]")
DataModuleClass = TypeVar("DataModuleClass", bound="type[AnomalibDataModule]")


def register(model_class: ModelClass) -> ModelClass:
    """Register a model class under every name by which anomalib looks up models; return it, as a decorator does.

    anomalib finds a model by its name among the direct subclasses of ``AnomalibModule``, as an attribute of
    ``anomalib.models``, and by a dotted path whose module is in ``anomalib.models.ALLOWED_MODULES``. The first comes
    with the class; this adds the other two: the class becomes an attribute, and every package around it is allowed.

    A model's module calls this as its last line. That works whichever of anomalib and this package is imported first,
    because ``anomalib.models`` has then been executed in full.

    Raises:
        TypeError: If the class is no direct subclass of ``AnomalibModule``: anomalib would not list it.
        ValueError: If there is a model or another thing of that name in anomalib already.
    """
    # Not at the top: as a first import, this module would set off the hook, and our models want this module finished.
    from anomalib.models.components import AnomalibModule

    name = model_class.__name__
    if AnomalibModule not in model_class.__bases__:
        message = f"{name} must be a direct subclass of AnomalibModule, since anomalib's list_models sees no other."
        raise TypeError(message)
    models = import_module("anomalib.models")
    namesakes = [present for present in AnomalibModule.__subclasses__() if present.__name__.lower() == name.lower()]
    for present in (getattr(models, name, None), *namesakes):
        if present is not None and not _same_definition(present, model_class):
            raise ValueError(
                f"{name} can't be registered with anomalib, which has {_path(present)} under that name already "
                f"(upper and lower case don't count); rename the new one."
            )
    setattr(models, name, model_class)
    packages = model_class.__module__.split(".")[:-1]
    models.ALLOWED_MODULES.update(".".join(packages[: depth + 1]) for depth in range(len(packages)))
    return model_class


def register_datamodule(datamodule_class: DataModuleClass) -> DataModuleClass:
    """Make a datamodule class known to ``anomalib benchmark``, which looks in ``anomalib.data`` only."""
    data = import_module("anomalib.data")
    present = getattr(data, datamodule_class.__name__, None)
    if present is not None and not _same_definition(present, datamodule_class):
        message = f"{datamodule_class.__name__} can't be registered: anomalib.data has {_path(present)}; rename it."
        raise ValueError(message)
    setattr(data, datamodule_class.__name__, datamodule_class)
    return datamodule_class


def subclasses(base: Any) -> dict[str, Any]:  # a class
    """Return all classes that are derived from one, by name."""
    found: dict[str, Any] = {}
    for child in base.__subclasses__():
        found |= {child.__name__: child, **subclasses(child)}
    return found


def _path(thing: object) -> str:
    definition = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{definition.__module__}.{definition.__qualname__}"


def _same_definition(present: object, model_class: type) -> bool:
    """Return whether both are the same class, or two executions of one class statement (as after a reload)."""
    return present is model_class or (isinstance(present, type) and _path(present) == _path(model_class))
