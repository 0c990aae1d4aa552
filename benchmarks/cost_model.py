# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What each part of OSDIRF costs for an image: operations, bytes, time, and how close that is to the machine's limit.

    python benchmarks/cost_model.py --backbone efficientnet_b4 --denoisers mlp unet dit_s

Weights are random, which changes no cost. Operations are torch's count (a multiplication and an addition are two);
bytes are those of weights, and of what goes into a part and comes out. The floor is the larger of operations by the
measured rate of a large matrix product and bytes by the measured rate of a copy; caches can be faster than the second.
Parts take turns, and so do the whole network and the bare backbone; times are medians. InvAD is the same denoiser asked
three times, as the paper has it. OpenVINO's are the same networks in float32, by its latency hint;
torch.compile's have frozen weights.
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

from anomalib_osdirf.density import PositionMixture, SumByKind
from anomalib_osdirf.models.feature_network import upsampled
from anomalib_osdirf.models.invad import InvADModel
from anomalib_osdirf.models.osdirf import OSDIRFModel
from anomalib_osdirf.models.osdirf.torch_model import DeployedOSDIRF

WHOLE, BARE = "all", "bare backbone"
INVAD, INVERSION = "InvAD", "InvAD's inversion"
_SIZE = (256, 256)

Part = tuple[str, Callable[[], Any], nn.Module | None, list[Tensor]]


def shared(arguments: argparse.Namespace, denoiser: str) -> dict[str, Any]:
    """Return the arguments that both models have, after fixing the random weights."""
    torch.manual_seed(0)
    return {
        "backbone": arguments.backbone,
        "layers": None,
        "feature_dim": 96,
        "grid_size": 16,
        "denoiser": denoiser,
        "prediction_type": "v_prediction",
        "ema_decay": 0.999,
    }


def osdirf(arguments: argparse.Namespace, denoiser: str, kinds: int) -> DeployedOSDIRF:
    """Build OSDIRF's network that scores, of so many kinds of image."""
    model = OSDIRFModel(
        timestep=120,
        state="scaled",
        image_score="max_top_k",
        density="position_full",
        map_grid_size=arguments.map_grid_size or None,
        **shared(arguments, denoiser),
    )
    return of_kinds(model.eval().deploy(), kinds)


def invad(arguments: argparse.Namespace, denoiser: str) -> nn.Module:
    """Build InvAD's network that scores, with three steps."""
    model = InvADModel(
        num_inference_steps=3,
        timestep_spacing="paper",
        image_score="nll_diff",
        density="standard",
        **shared(arguments, denoiser),
    )
    return model.eval().deploy().eval()


@torch.no_grad()
def of_kinds(network: DeployedOSDIRF, kinds: int) -> DeployedOSDIRF:
    """Give the network Gaussians of several kinds of image, as far apart as random images are."""
    images = torch.rand(kinds, 1, 3, *_SIZE)
    centres = torch.cat([network.field_of(network.backbone.pool(network.backbone(image))) for image in images])
    _, dim, side, _ = centres.shape
    network.density = nn.Identity()  # which is not to be in memory beside the other one
    density, score = PositionMixture(dim, side), SumByKind(2)
    density.set_buffers(
        mean=centres.flatten(2).transpose(1, 2),
        whitener=torch.eye(dim).repeat(kinds, side**2, 1, 1),
        log_normaliser=torch.zeros(kinds, side**2),
    )
    density.choice.set_gaussians(centres.flatten(1), torch.ones(kinds, dim * side**2))
    score.set_buffers(**{name: torch.ones(kinds, *value.shape[1:]) for name, value in score.named_buffers()})
    network.density, network.score = density, score
    return network.eval()


def parts(network: DeployedOSDIRF, batch: int) -> list[Part]:
    """Return the parts in the order in which the network runs them: name, run, weights, inputs."""
    images = torch.rand(batch, 3, *_SIZE)
    maps = network.backbone.maps(images)
    pooled = network.backbone.pool(network.backbone.coarse(maps))
    z = network.whitening(pooled)
    field = network.field(z)
    nll = network.density.map(field)
    result: list[Part] = [
        ("backbone", lambda: network.backbone.maps(images), network.backbone, [images]),
        ("grid", lambda: network.backbone.pool(network.backbone.coarse(maps)), None, maps),
        ("whitening", lambda: network.whitening(pooled), network.whitening, [pooled]),
        ("denoiser", lambda: network.field(z), network.denoiser, [z]),
        ("density", lambda: network.density.map(field), network.density, [field]),
    ]
    if network.feature_density is not None:
        density, side = network.feature_density, network.details_size
        assert side is not None
        details = network.whitening(network.backbone.fine(maps, side))
        result += [
            ("fine features", lambda: network.whitening(network.backbone.fine(maps, side)), network.whitening, maps),
            ("their density", lambda: density.map(details), density, [details]),
        ]
    result.append(("up-sampling", lambda: upsampled(nll, _SIZE), None, [nll]))
    return result


def bytes_of(part: Part) -> int:
    """Bytes of weights, inputs and outputs."""
    _, run, weights, inputs = part
    outputs = run()
    tensors = [*inputs, *(outputs if isinstance(outputs, list) else [outputs])]
    kept = [] if weights is None else [*weights.parameters(), *weights.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *kept])


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
    parser.add_argument("--denoisers", nargs="+", default=["mlp", "unet", "dit_s"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--map-grid-size", type=int, default=32, help="0 leaves the features' own density out")
    parser.add_argument("--kinds", type=int, default=9, help="of image, that OSDIRF's density is of")
    parser.add_argument(
        "--invad", action=argparse.BooleanOptionalAction, default=True, help="its network needs three denoisers' memory"
    )
    parser.add_argument("--openvino", action="store_true", help="time OpenVINO's networks, too")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's networks, too")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("results/cost_model.md"))
    return parser.parse_args()


def main() -> None:
    """Print a Markdown table for each denoiser and batch size, and keep them."""
    arguments = parsed()
    rate, bandwidth = machine_rates()
    machine = f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} G operations/s, {bandwidth / 1e9:.1f} GB/s"
    lines = [f"torch {torch.__version__}, {machine}; {arguments.backbone}, 256 x 256, float32, {arguments.kinds} kinds"]
    for denoiser in arguments.denoisers:
        network = osdirf(arguments, denoiser, arguments.kinds)
        other = invad(arguments, denoiser) if arguments.invad else None
        for batch in arguments.batches:
            with torch.inference_mode():
                every = parts(network, batch)
                images = every[0][3][0]
                z = every[3][3][0]
                runs = {name: run for name, run, *_ in every}
                runs |= {WHOLE: partial(network, images), BARE: partial(network.backbone.maps, images)}
                if other is not None:
                    runs |= {INVAD: partial(other, images), INVERSION: partial(other.field, z)}
                rounds = max(3, arguments.rounds // batch)
                seconds = medians(runs, rounds)
                engines = {"torch": seconds}
                networks = {WHOLE: network, BARE: network.backbone.network}
                if other is not None:
                    networks[INVAD] = other
                if arguments.compile:
                    engines["torch.compile"] = medians(inductor_runs(networks, images), rounds)
                if arguments.openvino:
                    engines["OpenVINO"] = medians(openvino_runs(networks, images), rounds)
                costs = {part[0]: (operations_of(part), bytes_of(part)) for part in every}
            costs[WHOLE] = tuple(map(sum, zip(*costs.values(), strict=True)))
            lines += [
                "",
                f"{denoiser}, batch {batch}, by image:",
                "",
                "| part | M operations | MB | ms | floor, ms | share |",
                "|---|---|---|---|---|---|",
            ]
            for name, (operations, size) in costs.items():
                floor = max(operations / rate, size / bandwidth)
                lines.append(
                    f"| {name} | {operations / batch / 1e6:.1f} | {size / batch / 1e6:.2f} | "
                    f"{1000 * seconds[name] / batch:.2f} | {1000 * floor / batch:.2f} | "
                    f"{seconds[name] / seconds[WHOLE]:.0%} |"
                )
            lines.append("")
            for engine, times in engines.items():
                relative = f"{times[WHOLE] / times[BARE]:.2f} times the bare backbone"
                more = f"; InvAD takes {times[INVAD] / times[WHOLE]:.2f} times as long" if INVAD in times else ""
                lines.append(f"{engine}: {1000 * times[WHOLE] / batch:.1f} ms, {relative}{more}.")
            if INVERSION in seconds:
                inversion = seconds[INVERSION] / seconds["denoiser"]
                lines.append(f"InvAD's inversion takes {inversion:.2f} times as long as the denoiser's one evaluation.")
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
