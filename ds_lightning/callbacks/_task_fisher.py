"""The Fisher information of a task at a module as it is, over the ranks of a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ds_lightning.errors import ConfigError
from ds_lightning.functional.batch import MODALITIES, as_batch, input_of, restrict
from ds_lightning.functional.consolidation import path_curvature, weighted_labels
from ds_lightning.functional.fisher import fisher_sums
from ds_lightning.functional.fisher_labels import label_loss
from ds_lightning.functional.seeds import derived_seed

from ._eval_mode import eval_mode

Kind = Literal["true", "empirical"]
_STEP = 0.01  # of the path, for the central difference
_HINT = "give loss_fn=(module, batch) -> (B,) with fisher='empirical' and merge=None"


def logits_of(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the module's logits of a batch, (B, C), minus infinity for outputs that are not allowed.

    Raises:
        ConfigError: the output is something else.
    """
    logits = module(input_of(batch))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"the module's output is {got}; expected logits, (B, C); otherwise {_HINT}")
    return restrict(logits, batch)


def classified(batch: Any) -> dict[str, Tensor]:
    """Return what of a batch a classifier needs: its one input, `label` and `allowed`.

    Raises:
        ConfigError: the batch has another form, or its labels are no class numbers.
    """
    try:
        found = as_batch(batch)
        input_of(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error}; otherwise {_HINT}") from error
    label = found.get("label")
    if label is not None and (label.is_floating_point() or label.ndim != 1):
        raise ConfigError(
            f"the labels are {label.dtype} of shape {tuple(label.shape)}; expected class numbers, (B,) integers; "
            f"otherwise {_HINT}"
        )
    return {name: found[name] for name in (*MODALITIES, "label", "allowed") if name in found}


class TaskFisher:
    """Sums over the samples of one task, shared out over the ranks; equal on all of them.

    Args:
        trainer: in a fit.
        module: what is trained; only its parameters are changed for a moment, and put back.
        parameters: by name.
        batches: gives the task's batches, anew at each call, all of them on every rank.
        loss_fn: `(module, batch) -> (B,)`; None: the cross-entropy of the logits.
        chunk_size: samples at a time.
        seed: of the drawn labels.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        parameters: Mapping[str, nn.Parameter],
        batches: Callable[[], Iterable[Any]],
        loss_fn: Callable[[Any, Any], Tensor] | None,
        chunk_size: int | None,
        seed: int,
    ) -> None:
        self.trainer, self.module, self.parameters, self.batches = trainer, module, parameters, batches
        self.loss_fn, self.chunk_size, self.seed = loss_fn, chunk_size, seed
        self.labels = torch.zeros(0, dtype=torch.long)

    def diagonal(self, kind: Kind) -> dict[str, Tensor]:
        """Return the diagonal Fisher information of each parameter, float32 or float64.

        Raises:
            ConfigError: batches or outputs do not fit, the task has no samples, or a result is not finite.
        """
        with _undisturbed(self.module):
            if self.loss_fn is None:
                labelled: Iterator[Any] = self._labelled(kind)
                loss = label_loss(logits_of)
            else:
                labelled, loss = self._shares(self._seen(self.batches())), self.loss_fn
            first = next(labelled, None)
            if first is None:  # a task of fewer samples than ranks
                sums, samples = {name: torch.zeros_like(p) for name, p in self.parameters.items()}, 0
            else:
                found = fisher_sums(
                    self.module,
                    chain([first], labelled),
                    loss,
                    parameters=self.parameters,
                    chunk_size=self.chunk_size,
                )
                sums, samples = found.sums, found.samples
        count = int(self._over_ranks(torch.tensor(float(samples), device=self.trainer.strategy.root_device)))
        if count == 0:
            raise ConfigError("the task has no training samples; expected at least one")
        with torch.inference_mode(False), torch.no_grad():
            fisher = {name: self._over_ranks(value) / count for name, value in sums.items()}
        wrong = [name for name, value in fisher.items() if not bool(value.isfinite().all())]
        if wrong:
            raise ConfigError(
                f"the Fisher information of {', '.join(wrong[:3])} is NaN or inf; expected finite losses and "
                "parameters at the end of a task: look at the training, FiniteGuard finds the step"
            )
        return fisher

    def curvature(self, path: Mapping[str, Tensor]) -> float:
        """Return `v' F v` with the full Fisher matrix of kind true, v the path: a mean over samples."""
        total = torch.zeros(2, dtype=torch.float64)
        with _undisturbed(self.module), torch.no_grad():
            for batch in self._shares(classified(batch) for batch in self.batches()):
                here = logits_of(self.module, batch)
                with self._moved(path, _STEP):
                    forward = logits_of(self.module, batch)
                with self._moved(path, -_STEP):
                    backward = logits_of(self.module, batch)
                values = path_curvature(here, forward, backward, _STEP)
                total += torch.stack([values.sum().cpu(), torch.tensor(float(len(values)), dtype=torch.float64)])
        total = self._over_ranks(total.to(self.trainer.strategy.root_device))
        return float(total[0] / total[1])

    def _labelled(self, kind: Kind) -> Iterator[Any]:
        """Yield batches with labels and scale, as `label_loss` takes them."""
        # Numbers for all samples on every rank: a draw must not depend on how they are shared out.
        generator = torch.Generator().manual_seed(self.seed)

        def numbered() -> Iterator[Any]:
            for batch in self._seen(classified(batch) for batch in self.batches()):
                yield batch, torch.rand(_size(batch), generator=generator, dtype=torch.float64)

        for batch, uniform in self._shares(numbered()):
            if kind == "empirical":
                if "label" not in batch:
                    raise ConfigError("batches have no label; expected labels for fisher='empirical'")
                yield batch, batch["label"], torch.ones(len(uniform), device=batch["label"].device)
                continue
            with torch.no_grad():
                logits = logits_of(self.module, batch)
                labels, weight = weighted_labels(logits, uniform.to(logits.device))
            # The scale of a loss is squared with its gradient.
            yield batch, labels, weight.sqrt().to(torch.promote_types(logits.dtype, torch.float32))

    def _seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Note the classes that go by."""
        for batch in batches:
            label = labels_in(batch)
            if label is not None:
                self.labels = torch.unique(torch.cat([self.labels, label.cpu().long()]))
            yield batch

    def _shares(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield this rank's samples of each batch."""
        rank, world, seen = self.trainer.global_rank, self.trainer.world_size, 0
        for batch in batches:
            if world == 1:
                yield batch
                continue
            size = _size(batch)
            first = (rank - seen) % world
            seen += size
            if first < size:
                yield tree_map(lambda x, first=first: x[first::world] if isinstance(x, Tensor) else x, batch)

    def _over_ranks(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    @contextmanager
    def _moved(self, path: Mapping[str, Tensor], step: float) -> Iterator[None]:
        """Move the parameters along the path, and put the very same numbers back."""
        before = {name: self.parameters[name].detach().clone() for name in path}
        try:
            for name, v in path.items():
                self.parameters[name].add_((step * v).to(before[name].dtype))
            yield
        finally:
            for name, value in before.items():
                self.parameters[name].copy_(value)


def labels_in(batch: Any) -> Tensor | None:
    """Return the class numbers of a batch, where it has any."""
    try:
        label = as_batch(batch).get("label")
    except TypeError:
        return None
    return label if isinstance(label, Tensor) and not label.is_floating_point() else None


def seed_of_task(seed: int, tasks: int) -> int:
    """Return the seed of a task's drawn labels."""
    return derived_seed(seed, "ewc labels", tasks)


def _size(batch: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda x: sizes.append(len(x)) if isinstance(x, Tensor) and x.ndim else None, batch)
    return sizes[0] if sizes else 0


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Put the module in eval mode without autocast; leave modes and random generators as they were."""
    device = next(module.parameters()).device.type
    with isolate_rng(include_cuda=device == "cuda"), torch.autocast(device, enabled=False), eval_mode(module):
        yield
