"""What is in a checkpoint file, read without importing or running anything that it names, and without torch."""

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ds_lightning.errors import DataError

_STORAGES = {
    "BFloat16": "bfloat16",
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "Int": "int32",
    "Long": "int64",
    "Short": "int16",
}
_BYTES = {
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2, "complex32": 4},
    **{"int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8, "complex64": 8, "complex128": 16},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1},
}
_REBUILDS = (
    *("parameter", "parameter_with_state", "qtensor", "tensor", "tensor_v2", "tensor_v3", "sparse_tensor"),
    *("meta_tensor_no_storage", "nested_tensor", "wrapper_subclass"),
    *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"),
)
# The part of torch's weights_only list that checkpoints use; a test holds it inside torch's own.
SAFE_GLOBALS = frozenset(
    {
        *("collections.OrderedDict", "collections.Counter", "_codecs.encode"),
        *("builtins.bytearray", "builtins.set", "builtins.complex"),
        *("torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter"),
        *("torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2"),
        *("torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
        *(f"torch._utils._rebuild_{name}" for name in _REBUILDS),
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _BYTES),
    }
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_NOT_A_ZIP = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError, OverflowError),
)
# Whatever a crafted pickle can make the stand-ins raise.
_UNREADABLE = (pickle.UnpicklingError, TypeError, AttributeError, LookupError, RuntimeError, MemoryError, *_NOT_A_ZIP)


class Unread:
    """Stands for an object of a class, or the result of a function, that was not imported."""

    name = "unknown"

    def __new__(cls, *args: Any, **kwargs: Any) -> "Unread":  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def _take(self, *args: Any, **kwargs: Any) -> "Unread":
        return self

    # All that the pickle machine can do to an object.
    __call__ = __setstate__ = __setitem__ = append = extend = add = update = _take

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True)
class TensorOutline:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: str
    place: tuple[str, int]  # storage and offset: equal for tied weights

    @property
    def values(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """The bytes of its elements; 0 for a dtype that is not known here."""
        return self.values * _BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class Outline:
    """A checkpoint without the values of its tensors.

    Attributes:
        content: what was saved, with `TensorOutline` for tensors and `Unread` for what was not imported; None when
            the pickle can't be followed without running it.
        globals: every class and function that loading would import, sorted.
        format_version: torch's number for the file format.
    """

    content: Any
    globals: tuple[str, ...]
    format_version: str

    @property
    def refused(self) -> tuple[str, ...]:
        """The globals that are not on the safe list: loading with `weights_only=True` refuses them."""
        return tuple(name for name in self.globals if name not in SAFE_GLOBALS)


def check_complete(path: str | Path) -> None:
    """Read a checkpoint file through and compare the CRC-32 of every record.

    Args:
        path: a file as `torch.save` writes it.

    Raises:
        FileNotFoundError: when there is no such file.
        DataError: when it is torn, damaged or no checkpoint; one line.
    """
    with _open(path) as archive:
        try:
            damaged = archive.testzip()
        except _NOT_A_ZIP as error:
            raise _torn(path, _line(error)) from error
    if damaged is not None:
        raise _torn(path, f"the CRC-32 of its record {damaged} is wrong")


def read_outline(path: str | Path) -> Outline:
    """Read what a checkpoint holds; nothing that it names is imported or run, and no tensor is read.

    Args:
        path: a file as `torch.save` writes it.

    Raises:
        FileNotFoundError: when there is no such file.
        DataError: when it is torn or no checkpoint; one line. Tensors are not looked at: `check_complete` does that.

    Example:
        >>> read_outline("last.ckpt").content["global_step"]  # doctest: +SKIP
        1200
    """
    with _open(path) as archive:
        name = _pickle_name(path, archive)
        folder = name.removesuffix("data.pkl")
        try:
            data = archive.read(name)
            version = archive.read(f"{folder}version").decode("ascii", "replace").strip()
        except KeyError as error:
            raise _foreign(path, "the record 'version' is not in it") from error
        except _NOT_A_ZIP as error:
            raise _torn(path, _line(error)) from error
    reader = _Reader(data)
    try:
        content = reader.load()
    except _UNREADABLE:
        content = None
        reader.seen.update(_named_in(data))
    return Outline(content, tuple(sorted(reader.seen)), version)


def _open(path: str | Path) -> zipfile.ZipFile:
    path = Path(path)
    if path.is_dir():
        raise DataError(
            f"checkpoint {path} is a folder, as sharded strategies write it; "
            "make one file of it with `python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        )
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} not found; check the path")
    with path.open("rb") as file:
        head = file.read(4)
    try:
        archive = zipfile.ZipFile(path)
    except _NOT_A_ZIP as error:
        if b"PK\x03\x04".startswith(head):
            raise _torn(path, "its zip end record is missing or wrong") from error
        raise _foreign(path, f"it starts with {head!r}") from error
    try:
        _pickle_name(path, archive)
    except DataError:
        archive.close()
        raise
    return archive


def _pickle_name(path: str | Path, archive: zipfile.ZipFile) -> str:
    records = archive.infolist()
    names = [record.filename for record in records]
    found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise _foreign(path, "the record 'data.pkl' is not in it")
    if found[0].replace("data.pkl", "constants.pkl") in names:
        raise _foreign(path, "it is a TorchScript archive")
    # torch never compresses; a record that claims to be could unpack to any size.
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise _torn(path, "a record is compressed, which torch.save never does")
    return found[0]


def _torn(path: str | Path, reason: str) -> DataError:
    return DataError(
        f"checkpoint {path} is torn or damaged: {reason}; use the one before it, "
        "which ds_lightning.checkpoints.newest_checkpoint(folder) finds"
    )


def _foreign(path: str | Path, reason: str) -> DataError:
    return DataError(f"{path} is no checkpoint: {reason}; expected a file written by torch.save (torch 1.6 or later)")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Reader(pickle.Unpickler):
    """The pickle machine with a stand-in for everything that it would import."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.seen: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        self.seen.add(full)
        return _STAND_INS.get(full) or type("Unread", (Unread,), {"name": full})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        return _Storage(_STORAGES.get(kind.name.removeprefix("torch.").removesuffix("Storage"), "bytes"), str(key))


def _named_in(data: bytes) -> set[str]:
    """List the GLOBAL and INST words of a pickle that can't be followed, up to where it stops making sense."""
    names = set()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                names.add(f"{_PYTHON_2.get(module, module)}.{name}")
    except _UNREADABLE:
        return names
    return names


def _tensor(storage: Any, offset: int, shape: Any, *_: Any) -> TensorOutline:
    return TensorOutline(tuple(map(int, shape)), storage.dtype, (storage.key, int(offset)))


def _typed_tensor(
    storage: Any, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    return TensorOutline(tuple(map(int, shape)), dtype.name.removeprefix("torch."), (storage.key, int(offset)))


def _first(first: Any, *_: Any) -> Any:
    return first


def _subclass(function: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    return function(*arguments)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}
