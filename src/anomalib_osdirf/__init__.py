# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""Diffusion models for anomaly detection, as a plug-in for anomalib.

Every Python start imports this package for the sake of its import hook (see ``_autoload``), so it must stay free of
imports: the public names are looked up when they are first asked for.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from anomalib_osdirf.models import OSDIRF, DiffusionAD, InvAD

__version__ = "0.1.0"

__all__ = ["OSDIRF", "DiffusionAD", "InvAD", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public model class when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.models"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, whether they have been looked up yet or not."""
    return sorted({*globals(), *__all__})
