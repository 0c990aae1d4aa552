# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_osdirf doctor``: check the installation, and suggest a fix for each problem.

It makes no network call. Each check imports what it needs by itself, so that a broken package fails its own check only.
"""

import argparse
import os
import site
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anomalib_osdirf import __version__
from anomalib_osdirf._autoload import installed_finder
from anomalib_osdirf.errors import one_line
from anomalib_osdirf.telemetry import send_nothing

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "anomalib-osdirf"
HOOK_FILES = ("anomalib_osdirf.pth", "anomalib_osdirf.start")
DEFAULT_BACKBONE = "tf_efficientnet_lite0"
OPTIONAL_EXTRAS = {
    "openvino": "for export and OpenVINO",
    "report": "for report pages",
    "app": "to try models in the browser",
    "weights": "pre-trained weights of tf_efficientnet_lite0 without a download",
    "ray": "to score many images",
}

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check: ``fail`` keeps something from working, ``note`` is good to know."""

    name: str
    status: Status
    found: str
    remedy: str = ""  # every failure has one


def check_packages() -> Iterator[Check]:
    """Check that every required package is installed in a supported version."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        remedy = f"install it with pip, for example `python -m pip install {DISTRIBUTION}`"
        yield Check(DISTRIBUTION, "note", f"{__version__}, imported without being installed: no version ranges", remedy)
        return
    yield Check(DISTRIBUTION, "ok", __version__)
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield _check_package(requirement)
            continue
        extra = next((extra for extra in OPTIONAL_EXTRAS if marker.evaluate({"extra": extra})), None)
        if extra is not None:
            yield _check_package(requirement, extra)


def _check_package(requirement: "Requirement", extra: str | None = None) -> Check:
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        if extra is not None:
            remedy = f'{OPTIONAL_EXTRAS[extra]}: python -m pip install "{DISTRIBUTION}[{extra}]"'
            return Check(requirement.name, "note", f"not installed (optional, extra {extra})", remedy)
        return Check(requirement.name, "fail", "not installed", f'python -m pip install "{wanted}"')
    if requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "ok", version)
    found = f"{version}, but {requirement.specifier} is needed"
    return Check(requirement.name, "fail", found, f'python -m pip install "{wanted}"')


def check_hook() -> Check:
    """Check that the import hook was installed when this interpreter started, and if not, why."""
    name = "import hook"
    places = [Path(place) for place in site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        places.append(Path(site.getusersitepackages()))
    present = [place / file for place in places for file in HOOK_FILES if (place / file).is_file()]
    # This program never installs the hook by itself, so a hook that is there was put there at the start.
    if installed_finder() is not None:
        found = "installed at start: `anomalib --model OSDIRF` and `get_model` know our models"
        if not present:
            return Check(name, "ok", found)
        line = present[0].read_text(encoding="utf-8").strip()
        remedy = "to switch it off, delete that file, and use `python -m anomalib_osdirf` in place of `anomalib`"
        return Check(name, "ok", f"{found}; all of {present[0]} is `{line}`", remedy)
    instead = "use `python -m anomalib_osdirf` in place of `anomalib`, or import anomalib_osdirf.models first"
    if sys.flags.no_site:
        return Check(name, "note", "not installed, because Python runs without site (-S)", instead)
    if present:
        remedy = f"run `python -c pass` and read what it prints about {present[0].name}; until then {instead}"
        return Check(name, "fail", f"{present[0]} is there, but did not install it", remedy)
    stray = [Path(place) / HOOK_FILES[0] for place in sys.path if (Path(place) / HOOK_FILES[0]).is_file()]
    if stray:
        found = f"not installed: Python reads no .pth file in {stray[0].parent} (pip install --target? PYTHONPATH?)"
    else:
        found = f"not installed: no {HOOK_FILES[0]} in any site directory (run from a source tree?)"
    return Check(name, "note", found, f"install into the environment's own site-packages with pip, or {instead}")


def check_models() -> Check:
    """Check that our models can be imported and that anomalib knows them afterwards."""
    name = "models"
    try:
        import anomalib.models

        import anomalib_osdirf.models
    except Exception as error:  # noqa: BLE001
        remedy = 'fix the failures above; if there are none, run `python -c "import anomalib_osdirf.models"`'
        return Check(name, "fail", f"can't be imported: {one_line(error)}", remedy)
    ours = [public for public in anomalib_osdirf.__all__ if public != "__version__"]
    absent = [model for model in ours if not hasattr(anomalib.models, model)]
    if absent:
        found = f"anomalib does not know {', '.join(absent)}"
        return Check(name, "fail", found, f"python -m pip install --force-reinstall --no-deps {DISTRIBUTION}")
    return Check(name, "ok", f"anomalib knows {', '.join(ours)}")


def check_torchvision() -> Check:
    """Check that the builds of torch and torchvision match, by calling a compiled operator."""
    name = "torch and torchvision"
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except Exception as error:  # noqa: BLE001
        remedy = "reinstall the two together, from one index: python -m pip install --force-reinstall torch torchvision"
        return Check(name, "fail", f"don't work together: {one_line(error)}", remedy)
    return Check(name, "ok", "are builds for one another")


def check_devices() -> Iterator[Check]:
    """List the available devices."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU cores", "ok", str(usable))
    import torch

    accelerators = [
        f"cuda:{index} {torch.cuda.get_device_name(index)} ({torch.cuda.mem_get_info(index)[1] / 1024**3:.0f} GiB)"
        for index in range(torch.cuda.device_count())
    ]
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        accelerators += [f"xpu:{index} {torch.xpu.get_device_name(index)}" for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    if accelerators:
        yield Check("accelerators", "ok", ", ".join(accelerators))
    else:
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        remedy = "nothing, if the CPU is what you want; otherwise check the driver and torch's build"
        yield Check("accelerators", "note", f"none that torch, {build}, can use", remedy)
    send_nothing()
    try:
        import openvino
    except ModuleNotFoundError:
        return
    yield Check("OpenVINO devices", "ok", ", ".join(openvino.Core().available_devices))
    from anomalib_osdirf.export import instructions

    if instructions.amx_is_broken():
        found = "this processor announces AMX and kills processes that use it, as OpenVINO does for INT8 and bfloat16"
        remedy = f"set {instructions.VARIABLE}={instructions.WITHOUT_AMX} for programs that run such models"
        yield Check("OpenVINO instructions", "note", found, remedy)
    else:
        yield Check("OpenVINO instructions", "ok", "INT8 and bfloat16 work")


def check_weights(backbone: str, weights: Path | None) -> Check:
    """Check that the backbone's weights are on this machine, without contacting a hub."""
    name = f"weights of {backbone}"
    from timm.models import get_pretrained_cfg

    from anomalib_osdirf.features.backbone import FILTER_BANK, build_backbone
    from anomalib_osdirf.features.packaged_weights import package_of

    if backbone == FILTER_BANK:
        return Check(name, "ok", "none needed")
    try:
        network = build_backbone(backbone, layers=None, grid_size=1)
        if weights is not None:
            network.load_pretrained(weights)
            return Check(name, "ok", f"{weights} fits")
        package = package_of(backbone)
        if package is not None and package.version is not None:
            network.load_pretrained(None)
            return Check(name, "ok", f"installed: {network.weights}")
    except Exception as error:  # noqa: BLE001
        remedy = f"give a name and a file that go together: doctor --backbone {backbone} --weights FILE"
        return Check(name, "fail", one_line(error), remedy)
    source = get_pretrained_cfg(backbone)
    cached = _cached_weights(source.hf_hub_id, source.hf_hub_filename) if source and source.hf_hub_id else None
    if cached is not None:
        return Check(name, "ok", f"in the hub's cache: {cached}")
    from huggingface_hub import constants

    where = f"not in the hub's cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        where += ", and HF_HUB_OFFLINE forbids a download"
    repository = f" ({source.hf_hub_id})" if source and source.hf_hub_id else ""
    pip = "" if package is None else f"python -m pip install {package.distribution}; or "
    remedy = (
        f"{pip}have a weights file of timm's {backbone}{repository} and pass --model.backbone_weights FILE"
        f" (test it with doctor --weights FILE); or copy the hub's cache of a machine with a network"
        + ("" if constants.HF_HUB_OFFLINE else "; or just train, if this machine has a network: that downloads them")
    )
    return Check(name, "fail", where, remedy)


def _cached_weights(repository: str, file: str | None) -> str | None:
    """Look where timm does: the file its configuration names, else safetensors, else the pickled weights."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    for candidate in [file] if file else ["model.safetensors", "pytorch_model.bin"]:
        path = try_to_load_from_cache(repository, candidate, revision=revision or None)
        if isinstance(path, str):
            return path
    return None


def run_checks(backbone: str = DEFAULT_BACKBONE, weights: Path | None = None) -> Iterator[Check]:
    """Run all checks; a check that raises an error counts as failed, and the next one runs."""
    checks: dict[str, Callable[[], Check | Iterable[Check]]] = {
        "packages": check_packages,
        "import hook": check_hook,
        "torch and torchvision": check_torchvision,
        "models": check_models,
        "devices": check_devices,
        "weights": partial(check_weights, backbone, weights),
    }
    for name, check in checks.items():
        try:
            outcome = check()
            yield from [outcome] if isinstance(outcome, Check) else outcome
        except Exception as error:  # noqa: BLE001, PERF203
            yield Check(name, "fail", f"this check failed: {one_line(error)}", "fix the failures above it first")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Print all checks; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog=program, description="Check this installation. Makes no network call.")
    parser.add_argument(
        "--backbone",
        default=DEFAULT_BACKBONE,
        help="backbone whose weights to look for (default: %(default)s)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="local .safetensors or .pth file to look at")
    options = parser.parse_args(arguments)
    done = []
    print(f"Python {sys.version.split()[0]} at {sys.executable}")  # noqa: T201
    for check in run_checks(options.backbone, options.weights):
        done.append(check)
        print(f"{check.status:<5} {check.name}: {check.found}", flush=True)  # noqa: T201
        if check.remedy:
            print(f"      -> {check.remedy}", flush=True)  # noqa: T201
    failures = sum(check.status == "fail" for check in done)
    verdict = f"{failures} of {len(done)} checks failed." if failures else f"All {len(done)} checks passed."
    print(verdict)  # noqa: T201
    return 1 if failures else 0
