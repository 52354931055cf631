"""The global random generators of Python, NumPy and torch: reading, setting, seeding, and private streams."""

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand


def seed_cpu(seed: int) -> None:
    """Seed the three generators of the CPU; CUDA's are left alone.

    Args:
        seed: in [0, 2**32).
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


class Stream:
    """A context in which the CPU's global generators are a stream of its own; entered again, it goes on.

    NumPy's generator is exchanged, not copied: reading and setting it costs 70 us. The exchange drops the second half
    of a pair that the legacy `np.random.randn` keeps back, on both sides, whether the fit was resumed or not.

    Args:
        seed: of the stream, in [0, 2**32).
        goes_on: whether it keeps its place when it is left; else it starts from its seed each time.
    """

    def __init__(self, seed: int = 0, *, goes_on: bool = True) -> None:
        self.seed = seed
        self._goes_on = goes_on
        self._numpy: np.random.MT19937 | None = None
        self._inner: tuple[Any, torch.Tensor] | None = None

    def restarted(self, seed: int) -> "Stream":
        """Return this stream, which starts from another seed when it is entered next."""
        self.seed, self._inner = seed, None
        return self

    def __enter__(self) -> None:
        """Put the stream in the place of the global generators."""
        if self._numpy is None:
            self._numpy = np.random.MT19937(0)
        self._outer = random.getstate(), mtrand.get_bit_generator(), torch.default_generator.get_state()
        mtrand.set_bit_generator(self._numpy)
        if self._inner is None:
            seed_cpu(self.seed)
        else:
            random.setstate(self._inner[0])
            torch.default_generator.set_state(self._inner[1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep where the stream is, and put the global generators back."""
        if self._goes_on:
            self._inner = random.getstate(), torch.default_generator.get_state()
        python, numpy, torchs = self._outer
        random.setstate(python)
        mtrand.set_bit_generator(numpy)
        torch.default_generator.set_state(torchs)


def read_state() -> dict[str, Any]:
    """Return the state of all global generators, CUDA's of this process included, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state()
    if name != "MT19937":
        raise RuntimeError(f"NumPy's global generator is {name}; expected MT19937, its default")
    # CUDA's states are kept on the host: reading them waits for nothing.
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if ready else []
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": torch.default_generator.get_state(),
        "cuda": list(cuda),
    }


def write_state(state: dict[str, Any]) -> None:
    """Set the global generators.

    Args:
        state: what `read_state` gave. States of more CUDA devices than there are here are left out.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.default_generator.set_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)
