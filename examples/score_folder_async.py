"""The same with several images under way at a time, for throughput."""

import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image, UnidentifiedImageError


def report(request: openvino.InferRequest, name: str) -> None:
    """Called when an image is done."""
    print(name, f"{request.get_tensor('pred_score').data.item():.6f}")


queue = openvino.AsyncInferQueue(openvino.compile_model(sys.argv[1], "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"}))
queue.set_callback(report)
for file in sorted(Path(sys.argv[2]).iterdir()):
    try:
        pixels = np.asarray(Image.open(file).convert("RGB"), np.float32)
    except (UnidentifiedImageError, IsADirectoryError):
        continue  # no image
    image = pixels.transpose(2, 0, 1)[None] / 255
    queue.start_async({0: image}, file.name)
queue.wait_all()
