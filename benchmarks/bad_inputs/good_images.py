"""Unusual images that are good: their pixels must be right."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ds_lightning.datamodules.image_files import open_image

from .case import Case, Place
from .images import RED, SIZE, encoded, read_all, tree

# File name, content, and the colour that its pixels must have.
_GOOD: dict[str, tuple[str, Callable[[], bytes], tuple[int, int, int], int]] = {
    "CMYK": ("x.jpg", lambda: encoded("CMYK", "JPEG", (0, 255, 255, 0), quality=95), (255, 0, 0), 3),
    "grey": ("x.png", lambda: encoded("L", colour=99), (99, 99, 99), 0),
    "grey with alpha": ("x.png", lambda: encoded("LA", colour=(99, 200)), (99, 99, 99), 0),
    "1 bit": ("x.png", lambda: encoded("1", colour=1), (255, 255, 255), 0),
    "16 bits": ("x.png", lambda: encoded("I;16", colour=200 * 257), (200, 200, 200), 0),
    "16 bits TIFF": ("x.tif", lambda: encoded("I;16", "TIFF", colour=200 * 257), (200, 200, 200), 0),
    "RGBA": ("x.png", lambda: encoded("RGBA", colour=(*RED, 128)), RED, 0),
    "1 x 1": ("x.png", lambda: encoded(size=(1, 1)), RED, 0),
    "very flat": ("x.png", lambda: encoded(size=(900, 1)), RED, 0),
    "a wrong suffix": ("x.png", lambda: encoded(kind="JPEG", quality=95), RED, 3),
    "upper case": ("X.PNG", encoded, RED, 0),
    "odd characters": ("é 雪\n'\"*?.png", encoded, RED, 0),
    "WebP": ("x.webp", lambda: encoded(kind="WEBP", lossless=True), RED, 0),
    "BMP": ("x.bmp", lambda: encoded(kind="BMP"), RED, 0),
    "PPM": ("x.ppm", lambda: encoded(kind="PPM"), RED, 0),
}


def _palette() -> bytes:
    file = io.BytesIO()
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(file, "PNG", transparency=0)
    return file.getvalue()


def _animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", SIZE, colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _good(what: str, name: str, content: Callable[[], bytes], colour: tuple[int, int, int], near: int) -> Case:
    def make(_: Place, folder: Path) -> Any:
        root = tree(folder, {name: content()})

        def call() -> str | None:
            pixels = open_image(root / "class0" / name)
            apart = int(np.abs(pixels.astype(int) - np.array(colour)).max())
            if pixels.dtype != np.uint8 or apart > near:
                return f"{pixels.dtype}, {apart} from {colour}: {pixels[0, 0]}"
            count = read_all(root)()
            return None if count == 9 else f"{count} of 9 images were read"

        return call

    return Case(f"images/good {what}", "", make, fine=True)


def _rotated(orientation: int) -> Case:
    """The red corner of the scene is where the camera's orientation says."""

    def make(_: Place, folder: Path) -> Any:
        # Undone by hand: a photo whose stored pixels are turned so that EXIF turns them back.
        scene = np.zeros((4, 6, 3), np.uint8)
        scene[0, 0] = 255
        stored = {3: np.rot90(scene, 2), 6: np.rot90(scene, 1), 8: np.rot90(scene, -1), 2: scene[:, ::-1]}[orientation]
        image = Image.fromarray(np.ascontiguousarray(stored))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(folder / "x.png", exif=exif)

        def call() -> str | None:
            pixels = open_image(folder / "x.png")
            return None if np.array_equal(pixels, scene) else f"turned wrong: {pixels.shape}"

        return call

    return Case(f"images/good EXIF {orientation}", "", make, fine=True)


def _nested(_: Place, folder: Path) -> Any:
    root = tree(folder)
    (root / "class1" / "deep" / "er").mkdir(parents=True)
    (root / "class1" / "deep" / "er" / "x.png").write_bytes(encoded())
    (root / "class1" / "notes.txt").write_text("not an image")
    (root / "class1" / ".hidden.png").write_text("not an image")

    def call() -> str | None:
        count = read_all(root)()
        return None if count == 9 else f"{count} of 9 images were read"

    return call


def good_image_cases() -> list[Case]:
    """Return them."""
    cases = [_good(what, *given) for what, given in _GOOD.items()]
    cases.append(_good("palette with transparency", "x.png", _palette, RED, 0))
    cases.append(_good("animated GIF", "x.gif", _animated, RED, 2))
    cases += [_rotated(orientation) for orientation in (2, 3, 6, 8)]
    cases.append(Case("images/good nested folders", "", _nested, fine=True))
    return cases
