"""Score a folder of images with an exported model. Needs openvino, numpy and pillow: no torch, no anomalib, not us."""

import sys
from pathlib import Path

import numpy as np
import openvino
from PIL import Image, UnidentifiedImageError

model = openvino.compile_model(sys.argv[1])
for file in sorted(Path(sys.argv[2]).iterdir()):
    try:
        pixels = np.asarray(Image.open(file).convert("RGB"), np.float32)
    except (UnidentifiedImageError, IsADirectoryError):
        continue  # no image
    image = pixels.transpose(2, 0, 1)[None] / 255
    result = model(image)
    print(file.name, f"{result['pred_score'].item():.6f}", "defect" if result["pred_label"].item() else "good")
