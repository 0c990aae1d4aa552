# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""A one-shot import hook: whoever imports ``anomalib.models`` gets the models of this package along with its own.

``install`` is called at every start of an interpreter that has this package installed, by ``anomalib_osdirf.pth`` or,
from Python 3.15 on, by ``anomalib_osdirf.start``. So nothing here may import more than a bare interpreter has anyway.
To do without the hook, uninstall the package, or start Python with ``-S``; ``python -m anomalib_osdirf`` needs no hook.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

TARGET = "anomalib.models"
MODELS = "anomalib_osdirf.models"


class ModelsFinder:
    """A finder that leaves all finding to the finders after it, and has ``anomalib.models`` followed by our models.

    It stays on ``sys.meta_path`` when its one shot is spent, since removing it there could make an import that runs in
    another thread skip a finder.

    Attributes:
        spent (bool): Whether ``anomalib.models`` has been executed, and our models imported or their failure reported.
    """

    def __init__(self) -> None:
        self.spent = False

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find ``anomalib.models`` as the later finders do, with a loader that calls ``load_models`` afterwards."""
        if self.spent or fullname != TARGET:
            return None
        finders = list(sys.meta_path)
        if self not in finders:  # something wraps the finders that it found here; asking them could recurse
            return None
        for finder in finders[finders.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def load_models(self) -> None:
        """Import our models, which register themselves; a failure is a warning, so that anomalib stays usable."""
        if self.spent:
            return
        self.spent = True
        try:
            __import__(MODELS)
        except Exception as error:  # noqa: BLE001
            _warn(error)


class _Loader:
    """The loader of ``anomalib.models``, and then our models."""

    def __init__(self, loader: "Any", finder: ModelsFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> "Any":
        """Be the wrapped loader in everything but ``exec_module``."""
        if name.startswith("_"):  # copy and pickle ask for these before there is a wrapped loader
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Execute ``anomalib.models`` under its own loader, then import our models."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.load_models()


def _warn(error: Exception) -> None:
    import warnings

    reason = " ".join(str(error).split())
    message = (
        f"anomalib goes without the models of anomalib-osdirf, because importing them failed with "
        f"{type(error).__name__}: {reason} - run `python -m anomalib_osdirf doctor` to see what to do."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, and an error would break `import anomalib.models`
        print(message, file=sys.stderr)  # noqa: T201


def installed_finder() -> ModelsFinder | None:
    """Return this interpreter's hook, or ``None`` where none is installed."""
    return next((finder for finder in sys.meta_path if isinstance(finder, ModelsFinder)), None)


def install() -> None:
    """Install the hook, once; where ``anomalib.models`` is imported already, import our models right away."""
    if installed_finder() is not None:
        return
    finder = ModelsFinder()
    sys.meta_path.insert(0, finder)
    if TARGET in sys.modules:
        finder.load_models()
