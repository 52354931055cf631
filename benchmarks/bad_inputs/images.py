"""Bad images, image folders and image sets."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ds_lightning.datamodules import CIFAR10, FashionMNIST, ImageFolder

from .case import Case, Place

RED, SIZE = (200, 30, 40), (20, 16)


def encoded(
    mode: str = "RGB", kind: str = "PNG", colour: Any = RED, size: tuple[int, int] = SIZE, **more: Any
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **more)
    return file.getvalue()


def _noise(kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **more)
    return file.getvalue()


def _giant(kind: str = "PNG") -> bytes:
    """Name 60,000 x 60,000 pixels (10 GB as RGB) in a header."""
    if kind == "BMP":
        good = bytearray(encoded(kind="BMP"))
        good[18:26] = struct.pack("<ii", 60000, 60000)
        return bytes(good)
    if kind == "GIF":
        good = bytearray(encoded("P", "GIF", 1))
        good[6:10] = struct.pack("<HH", 60000, 60000)
        return bytes(good)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes(20_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tree(folder: Path, bad: dict[str, bytes] | None = None, classes: int = 2, each: int = 4) -> Path:
    root = folder / "photos"
    for number in range(classes):
        (root / f"class{number}").mkdir(parents=True)
        for image in range(each):
            (root / f"class{number}" / f"{image}.png").write_bytes(encoded(colour=(number * 90, image, 7)))
    for name, content in (bad or {}).items():
        (root / "class0" / name).write_bytes(content)
    return root


def read_all(root: Path, **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        data = ImageFolder(str(root), image_size=8, batch_size=4, **{"val_fraction": 0.25, **options})
        data.prepare_data()
        data.setup()
        return sum(
            len(batch["label"]) for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader
        )

    return call


def _file(what: str, name: str, content: bytes) -> Case:
    return Case(f"images/{what}", name, lambda place, folder: read_all(tree(folder, {name: content})))


def _by_command(what: str, name: str, content: bytes, workers: int = 0) -> Case:
    def make(_: Place, folder: Path) -> list[str]:
        root = tree(folder, {name: content}, each=12)
        words = ["fit", "--config=small.yaml", "--data=ImageFolder", f"--data.data_dir={root}", "--data.image_size=8"]
        words += ["--data.val_fraction=0.1", "--data.train_size=null", "--trainer.logger=false"]
        return [*words, f"--data.num_workers={workers}", "--trainer.enable_checkpointing=false"]

    return Case(f"images/fit {what}", name, make)


def _layout(what: str, says: str, change: Callable[[Path], Any], **options: Any) -> Case:
    def make(_: Place, folder: Path) -> Any:
        root = tree(folder)
        return read_all(change(root) or root, **options)

    return Case(f"images/folder {what}", says, make)


def _no_image(root: Path) -> None:
    (root / "class2").mkdir()
    (root / "class2" / "readme.txt").write_text("nothing")


def _broken_link(root: Path) -> None:
    (root / "class0" / "link.png").symlink_to(root / "gone.png")


def _loop(root: Path) -> None:
    (root / "class0" / "link.png").symlink_to(root / "class0" / "link.png")


def _named_folder(root: Path) -> None:
    (root / "class0" / "folder.png").symlink_to(root / "class1")


def _fifo(root: Path) -> None:
    import os

    os.mkfifo(root / "class0" / "pipe.png")


def _test_class(root: Path) -> Path:
    tree(root / "split" / "train")
    (root / "split" / "train" / "photos").rename(root / "split" / "t")
    (root / "split" / "train").rmdir()
    (root / "split" / "t").rename(root / "split" / "train")
    (root / "split" / "test" / "stranger").mkdir(parents=True)
    (root / "split" / "test" / "stranger" / "0.png").write_bytes(encoded())
    return root / "split"


def _emptied(root: Path) -> None:
    for file in (root / "class1").iterdir():
        file.unlink()


def _set(kind: type[FashionMNIST | CIFAR10], what: str, says: str, change: Callable[[Path, Path], Any]) -> Case:
    """A torchvision set whose files were written by hand and then damaged."""

    def make(_: Place, folder: Path) -> Any:
        root = folder / kind.folder
        root.mkdir(parents=True)
        for name in kind.files:
            many = 10 if name.startswith("t10k") else 20
            label = struct.pack(">II", 2049, many) + bytes(number % 10 for number in range(many))
            image = struct.pack(">IIII", 2051, many, 28, 28) + bytes(many * 784)
            (root / name).write_bytes(label if "labels" in name else image)
        change(root, folder)

        def call() -> Any:
            data = kind(str(folder), download=False, val_fraction=0.5)
            data.prepare_data()
            data.setup()
            return len(next(iter(data.train_dataloader()))["label"])

        return call

    return Case(f"images/{kind.__name__} {what}", says, make)


def image_cases(chance: random.Random) -> list[Case]:
    """Return the bad images, folders and sets."""
    sources = {"jpg": _noise("JPEG"), "png": _noise("PNG"), "webp": _noise("WEBP"), "gif": _noise("GIF")}
    sources |= {"bmp": _noise("BMP"), "tif": _noise("TIFF", compression="tiff_lzw"), "ppm": _noise("PPM")}
    cases = []
    for suffix, content in sources.items():
        for _ in range(3 if suffix in ("jpg", "png") else 1):
            share = chance.uniform(0.05, 0.9)
            cut = content[: int(share * len(content))]
            cases.append(_file(f"{suffix} cut at {share:.4f}", f"bad.{suffix}", cut))
    for name, content in (
        ("empty.jpg", b""),
        ("text.png", b"not an image\n"),
        ("page.jpg", b"<html><body>404</body></html>"),
        ("zeros.png", bytes(500)),
        ("header.png", b"\x89PNG\r\n\x1a\n"),
        ("giant.png", _giant()),
        ("giant.bmp", _giant("BMP")),
        ("giant.gif", _giant("GIF")),
        ("float.tif", encoded("F", "TIFF", 0.5)),
        ("archive.jpg", b"PK\x03\x04" + bytes(100)),
        ("flipped.png", bytes(byte ^ 4 if at == 200 else byte for at, byte in enumerate(sources["png"]))),
    ):
        cases.append(_file(name, name, content))
    cases.append(_by_command("cut", "bad.jpg", sources["jpg"][:900]))
    cases.append(_by_command("empty, with 2 workers", "bad.png", b"", workers=2))
    cases += [
        _layout("missing", "gone", lambda root: root / "gone"),
        _layout("is a file", "0.png", lambda root: root / "class0" / "0.png"),
        _layout("without classes", "class0", lambda root: root / "class0"),
        _layout("class without images", "class2", _no_image),
        _layout("class emptied", "class1", _emptied),
        _layout("broken link", "link.png", _broken_link),
        _layout("link to itself", "link.png", _loop),
        _layout("a pipe", "pipe.png", _fifo),
        _layout("unknown test class", "stranger", _test_class),
        _layout("too few for a split", "val_fraction", lambda root: None, val_fraction=0.01),
        _layout("too few to train on", "train_size", lambda root: None, train_size=100),
    ]
    cases += [
        _set(FashionMNIST, "images cut", "train-images", lambda root, _: _cut(root / "train-images-idx3-ubyte", 500)),
        _set(FashionMNIST, "labels cut", "train-labels", lambda root, _: _cut(root / "train-labels-idx1-ubyte", 12)),
        _set(FashionMNIST, "empty", "t10k-images", lambda root, _: _cut(root / "t10k-images-idx3-ubyte", 0)),
        _set(FashionMNIST, "a file is missing", "t10k-labels", lambda root, _: (root / FashionMNIST.files[3]).unlink()),
        _set(FashionMNIST, "text", "train-images", lambda root, _: (root / FashionMNIST.files[0]).write_text("hello")),
        _set(
            FashionMNIST, "a giant header", "train-images", lambda root, _: _cut(root / FashionMNIST.files[0], 0, _IDX)
        ),
        _set(FashionMNIST, "swapped", "FashionMNIST", lambda root, _: _cut(root / FashionMNIST.files[0], 0, _LABELS)),
        _set(FashionMNIST, "no folder", "FashionMNIST", lambda root, folder: root.rename(folder / "elsewhere")),
        _set(CIFAR10, "garbage", "cifar-10-batches-py", lambda root, _: None),
        _set(CIFAR10, "a file is missing", "data_batch_3", lambda root, _: (root / "data_batch_3").unlink()),
        _set(CIFAR10, "malicious", "cifar-10-batches-py", lambda root, _: _poison(root)),
    ]
    return cases


_IDX = struct.pack(">IIII", 2051, 2**31, 28, 28)
_LABELS = struct.pack(">II", 2049, 20) + bytes(20)


def _cut(path: Path, size: int, instead: bytes | None = None) -> None:
    path.write_bytes(path.read_bytes()[:size] if instead is None else instead)


def _poison(root: Path) -> None:
    import pickle

    from .checkpoints import Malicious

    for name in CIFAR10.files:
        (root / name).write_bytes(pickle.dumps(Malicious()))
