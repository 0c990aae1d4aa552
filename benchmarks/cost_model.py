# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What each part of OSDIRF costs for an image: operations, bytes, time, and how close that is to the machine's limit.

    python benchmarks/cost_model.py --backbone efficientnet_b4 --denoisers conv_mlp unet dit_s

Weights are random, which changes no cost. Operations are torch's count (a multiplication and an addition are two);
bytes are those of weights, and of what goes into a part and comes out. The floor is the larger of operations by the
measured rate of a large matrix product and bytes by the measured rate of a copy; caches can be faster than the second.
Parts take turns, and so do the whole network and the bare backbone; times are medians. InvAD is the same denoiser
evaluated three times. OpenVINO's networks are the same in float32, with its latency hint; torch.compile's have frozen
weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anomalib_osdirf.features import coarse
from anomalib_osdirf.models.field_model import FieldModel
from anomalib_osdirf.models.invad import InvADModel
from anomalib_osdirf.models.osdirf import OSDIRFModel
from anomalib_osdirf.models.scorer import Scorer, upsampled
from anomalib_osdirf.scoring import PatchMixture, PositionGaussians

WHOLE, BARE, INVAD = "all", "bare backbone", "InvAD"
STRUCTURES = ("position", "mixture")
_GRID, _DIM = 16, 96
_COMPONENTS, _FINE_COMPONENTS = 32, 16

Part = tuple[str, Callable[[], Any], list[nn.Module], list[Tensor]]


def osdirf(backbone: str, denoiser: str, structure: str, clusters: int = 1) -> FieldModel:
    """Build OSDIRF's deployed model with a density of that structure, and so many clusters of images."""
    torch.manual_seed(0)
    model = OSDIRFModel(timestep=200, density=structure, **_shared(backbone, denoiser)).eval()
    _fill(model.scorer, structure, clusters if structure == "position" else 1)
    return model.freeze()


def invad(backbone: str, denoiser: str) -> FieldModel:
    """Build InvAD's deployed model, with three steps."""
    torch.manual_seed(0)
    own = {"whiten": True, "prediction_type": "v_prediction"}
    model = InvADModel(3, "released", "nll_diff", **own, **_shared(backbone, denoiser)).eval()
    model.scorer.num_images = 1
    return model.freeze()


def _shared(backbone: str, denoiser: str) -> dict[str, Any]:
    sizes = {"layers": None, "feature_dim": _DIM, "grid_size": _GRID, "ema_decay": 0.999}
    return {"backbone": backbone, "denoiser": denoiser, **sizes}


def _fill(scorer: Any, structure: str, clusters: int) -> None:
    """Give a scorer densities of the sizes that a fit would."""
    field, fine = _GRID**2, 4 * _GRID**2
    if structure == "position":
        scorer.density, scorer.fine_density = PositionGaussians(), PositionGaussians(blocks=True)
        for density, count, positions, groups in (
            (scorer.density, clusters, field, field),
            (scorer.fine_density, 1, fine, fine // 4),
        ):
            density.set_buffers(
                mean=torch.zeros(count, positions, _DIM),
                precision_factor=torch.eye(_DIM).repeat(count, groups, 1, 1),
                constant=torch.zeros(count, groups),
            )
    else:
        scorer.density, scorer.fine_density = PatchMixture(), PatchMixture()
        for density, count in ((scorer.density, _COMPONENTS), (scorer.fine_density, _FINE_COMPONENTS)):
            weight = torch.randn(count * _DIM, _DIM)
            density.set_buffers(weight=weight, bias=torch.zeros(len(weight), 1), constant=torch.zeros(count, 1))
    centres = torch.randn(clusters, _DIM)
    scorer.clusters.set_buffers(scale=torch.ones(_DIM), centres=centres, cluster_of_centre=torch.arange(clusters))
    scorer.units.fit(torch.zeros(clusters, _GRID, _GRID), torch.ones(clusters, _GRID, _GRID))
    scorer.fine_units.fit(torch.zeros(1, 2 * _GRID, 2 * _GRID), torch.ones(1, 2 * _GRID, 2 * _GRID))
    scorer.image_score.set_buffers(scale=torch.ones(clusters, 2), offset=torch.zeros(clusters, 2))
    scorer.structure, scorer.num_images = structure, 1


def parts(model: FieldModel, batch: int, size: int) -> list[Part]:
    """Return the parts in the order in which the model runs them: name, run, weights, inputs."""
    network: Any = model.network
    scorer: Any = model.scorer
    assert isinstance(scorer, Scorer)
    images = torch.rand(batch, 3, size, size)
    features = network.backbone(images)
    fine = network.projection(features)
    z = coarse(fine)
    field = network.read(list(network.denoisers), z, network.abars)
    cluster = scorer.clusters(fine)
    nll = scorer.density(field, cluster)
    values = scorer.units(nll, cluster)

    def denoised() -> Tensor:
        read: Tensor = network.read(list(network.denoisers), z, network.abars)
        return read

    return [
        ("backbone and grid", lambda: network.backbone(images), [network.backbone], [images]),
        ("PCA", lambda: network.projection(features), [network.projection], [features]),
        ("denoiser", denoised, [network.denoisers], [z]),
        ("density", lambda: scorer.density(field, cluster), [scorer.density], [field]),
        ("fine density", lambda: scorer.fine_density(fine), [scorer.fine_density], [fine]),
        ("units", lambda: scorer.units(nll, cluster), [scorer.units], [nll]),
        ("up-sampling", lambda: upsampled(values, (size, size)), [], [values]),
    ]


def bytes_of(part: Part) -> int:
    """Bytes of weights, inputs and outputs."""
    _, run, weights, inputs = part
    kept = [tensor for module in weights for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, run(), *kept))


def operations_of(part: Part) -> int:
    """Operations, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        part[1]()
    return counter.get_total_flops()


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine_rates() -> tuple[float, float]:
    """Operations a second of a large float32 matrix product, and bytes a second of a copy, read and written."""
    side, values = 2048, torch.rand(1 << 26)
    a, b, target = torch.rand(side, side), torch.rand(side, side), torch.empty_like(values)
    seconds = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(values)}, 10)
    return 2 * side**3 / seconds["product"], 2 * 4 * len(values) / seconds["copy"]


def openvino_runs(networks: dict[str, nn.Module], images: Tensor) -> dict[str, Callable[[], Any]]:
    """Return runs of the same networks, compiled by OpenVINO for this number of images."""
    import openvino

    runs: dict[str, Callable[[], Any]] = {}
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    for name, network in networks.items():
        converted = openvino.convert_model(torch.export.export(network, (images,)))
        request = openvino.compile_model(converted, "CPU", options).create_infer_request()
        runs[name] = partial(request.infer, [images.numpy()], share_inputs=True, share_outputs=True)
    return runs


def inductor_runs(networks: dict[str, nn.Module], images: Tensor) -> dict[str, Callable[[], Any]]:
    """Return runs of the same networks, compiled by torch for this number of images."""
    torch.compiler.reset()
    options = {"freezing": True}  # weights are constants
    return {name: partial(torch.compile(network, options=options), images) for name, network in networks.items()}


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="efficientnet_b4")
    parser.add_argument("--image-size", type=int, default=256, help="side; a multiple of a transformer's patch")
    parser.add_argument("--denoisers", nargs="+", default=["conv_mlp"])
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES)
    parser.add_argument("--clusters", type=int, default=1, help="of images, with the structure position")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--invad", action="store_true", help="time InvAD, too")
    parser.add_argument("--openvino", action="store_true", help="time OpenVINO's networks, too")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's networks, too")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("results/cost_model.md"))
    return parser.parse_args()


def measured(
    arguments: argparse.Namespace, models: dict[str, FieldModel], batch: int, rate: float, bandwidth: float
) -> list[str]:
    """Return the table of a model at a batch size, and its time beside the bare backbone and InvAD."""
    backbone: Any = models[WHOLE].network.backbone
    every = parts(models[WHOLE], batch, arguments.image_size)
    images = every[0][3][0]
    networks: dict[str, nn.Module] = {**models, BARE: backbone.network}
    runs: dict[str, Callable[[], Any]] = {name: run for name, run, *_ in every}
    runs |= {name: partial(network, images) for name, network in networks.items()}
    runs[BARE] = partial(backbone.maps, images)
    rounds = max(3, arguments.rounds // batch)
    seconds = medians(runs, rounds)
    engines = {"torch": seconds}
    if arguments.compile:
        engines["torch.compile"] = medians(inductor_runs(networks, images), rounds)
    if arguments.openvino:
        engines["OpenVINO"] = medians(openvino_runs(networks, images), rounds)
    lines = ["| part | M operations | MB | ms | floor, ms | share |", "|---|---|---|---|---|---|"]
    costs = {part[0]: (operations_of(part), bytes_of(part)) for part in every}
    costs[WHOLE] = (sum(one for one, _ in costs.values()), sum(one for _, one in costs.values()))
    for name, (operations, size) in costs.items():
        floor = max(operations / rate, size / bandwidth)
        lines.append(
            f"| {name} | {operations / batch / 1e6:.1f} | {size / batch / 1e6:.2f} | "
            f"{1000 * seconds[name] / batch:.2f} | {1000 * floor / batch:.2f} | {seconds[name] / seconds[WHOLE]:.0%} |"
        )
    lines.append("")
    for engine, times in engines.items():
        relative = f"{times[WHOLE] / times[BARE]:.2f} times the bare backbone"
        more = f"; InvAD takes {times[INVAD] / times[WHOLE]:.2f} times as long" if INVAD in times else ""
        lines.append(f"{engine}: {1000 * times[WHOLE] / batch:.1f} ms, {relative}{more}.")
    return lines


@torch.inference_mode()
def main() -> None:
    """Print a Markdown table for each denoiser, structure and batch size, and keep them."""
    arguments = parsed()
    rate, bandwidth = machine_rates()
    machine = f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} G operations/s, {bandwidth / 1e9:.1f} GB/s"
    seen = f"{arguments.backbone}, {arguments.image_size} x {arguments.image_size}, float32"
    lines = [f"torch {torch.__version__}, {machine}; {seen}"]
    for denoiser in arguments.denoisers:
        other = {INVAD: invad(arguments.backbone, denoiser)} if arguments.invad else {}
        for structure in arguments.structures:
            model = osdirf(arguments.backbone, denoiser, structure, arguments.clusters)
            for batch in arguments.batches:
                lines += ["", f"{denoiser}, {structure}, batch {batch}, by image:", ""]
                lines += measured(arguments, {WHOLE: model, **other}, batch, rate, bandwidth)
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
