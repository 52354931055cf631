"""How fast a manifest is read after caching, and what masks cost in the fusion, for benchmarks/multimodal.py."""

import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ds_lightning.datamodules import MultimodalManifest
from ds_lightning.networks import CrossModalFusion

RATE = 16000
SIDE = 28
TARGET = {"samples_per_second": 2000, "mask_cost_percent": 5}


def speeds(samples: int, workers: int, device: str) -> dict[str, Any]:
    """Return samples a second, and the cost of masks."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_manifest(Path(folder), samples)
        reading = manifest_speed(written, Path(folder, "cache"), workers)
    return {"target": TARGET, "samples": samples, "workers": workers, **reading, "masks": mask_cost(device)}


def write_manifest(folder: Path, samples: int) -> Path:
    """Write pictures of 28 x 28 pixels, clips of a second and a manifest of both."""
    import soundfile

    generator = np.random.default_rng(0)
    path = folder / "samples.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["photo", "clip", "kind"])
        for number in range(samples):
            picture = generator.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
            soundfile.write(folder / f"{number}.wav", 0.1 * generator.standard_normal(RATE), RATE)
            rows.writerow([f"{number}.png", f"{number}.wav", "even" if number % 2 == 0 else "odd"])
    return path


def manifest_speed(path: Path, cache: Path, workers: int, epochs: int = 5) -> dict[str, Any]:
    """Return the seconds of the first reading, and the training samples a second after it, for both kinds of cache."""
    schema = {
        "columns": {
            "photo": {"modality": "image", "size": SIDE, "channels": 1},
            "clip": {"modality": "audio", "sample_rate": RATE, "mels": 40, "max_seconds": 1},
        },
        "label": "kind",
    }
    found: dict[str, Any] = {}
    for name, kept in (("memory", "memory"), ("folder", str(cache))):
        data = MultimodalManifest(str(path), schema, batch_size=128, num_workers=workers, cache=kept)
        begin = time.perf_counter()
        data.setup("fit")
        first = time.perf_counter() - begin
        loader = data.train_dataloader()
        rates = []
        for _ in range(epochs):
            begin = time.perf_counter()
            seen = sum(len(batch["label"]) for batch in loader)
            rates.append(seen / (time.perf_counter() - begin))
        found[f"cache_{name}"] = {
            "decoding_seconds": round(first, 2),
            # The first epoch starts the workers; where they persist it alone does.
            "samples_per_second": [round(rate) for rate in rates],
            "median": round(statistics.median(rates)),
        }
    return found


def mask_cost(device: str, rounds: int = 60) -> dict[str, Any]:
    """Return milliseconds of a forward and backward pass of the fusion with and without masks, taken in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fusion = CrossModalFusion({"image": 64, "audio": 128}, dropout=0.0).to(device).train()
    image, audio = torch.randn(64, 49, 64, device=device), torch.randn(64, 13, 128, device=device)
    real = torch.arange(13, device=device) < torch.randint(6, 14, (64, 1), device=device)
    present = torch.rand(64, 2, device=device) < 0.8
    present[:, 0] |= ~present.any(dim=1)
    inputs = {
        "without": ({"image": (image, None), "audio": (audio, None)}, None),
        "with": ({"image": (image, None), "audio": (audio, real)}, present),
    }
    times: dict[str, list[float]] = {name: [] for name in inputs}
    for turn in range(rounds + 5):
        for name, given in inputs.items():
            begin = time.perf_counter()
            fusion(*given).sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 5:
                times[name].append(time.perf_counter() - begin)
    middle = {name: statistics.median(values) for name, values in times.items()}
    # Pairs are neighbours in time: what else the machine does meets both.
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return {
        **{f"{name}_masks_ms": round(1000 * value, 2) for name, value in middle.items()},
        "cost_percent": round(100 * (statistics.median(ratios) - 1), 1),
    }
