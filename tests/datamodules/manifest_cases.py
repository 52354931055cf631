"""Small manifests and the files that they name, for tests."""

import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image

SCHEMA = {
    "columns": {
        "photo": {"modality": "image", "size": 8},
        "words": {"modality": "text", "max_length": 6},
        "clip": {"modality": "audio", "sample_rate": 8000, "mels": 8, "max_seconds": 0.5},
        "sensor": {"modality": "series", "channels": 2, "length": 20},
        "age": {"modality": "table"},
        "income": {"modality": "table"},
    },
    "label": {"column": "y"},
}


def write_wave(path, samples, rate=8000, channels=1):
    """16 bits, by the standard library; samples are floats in [-1, 1], interleaved."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).round().astype("<i2").tobytes())
    return path


def good_files(folder: Path):
    """One good file of each kind, and the row that names them."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(256, size=(8, 12, 3), dtype=np.uint8)).save(folder / "a.png")
    write_wave(folder / "a.wav", np.sin(np.arange(4000) * 0.3) * 0.5)
    np.save(folder / "a.npy", generator.normal(size=(2, 30)))
    return {
        "photo": "a.png",
        "words": "a small cat",
        "clip": "a.wav",
        "sensor": "a.npy",
        "age": "3.5",
        "income": "",
        "y": "cat",
        "line": 2,
    }


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
