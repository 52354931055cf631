"""Channels leave a network step by step while it is trained."""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ds_lightning.errors import NoEffectWarning
from ds_lightning.networks.channel_graph import ChannelGraph
from ds_lightning.networks.pruning_plan import save_plan

from ._group_lasso import GroupLasso
from ._log_step import log_step
from ._pruned_parts import prune_when_loaded, remove_channels
from ._pruning_checks import Inputs, check_alone, check_arguments, check_fit, example_inputs, network_at
from ._pruning_decision import PruningRule
from ._pruning_monitors import count_afresh, forget_best
from ._pruning_report import PruningReport, costs
from ._pruning_schedule import PruningSchedule, schedule_of
from ._standing_still import StandingStill


class ProgressivePruning(pl.Callback):
    """Remove channels of a network while it is trained; it is smaller and faster at once, and training goes on.

    **When it acts.** After the optimizer step of each removal (`schedule`, `start`, `end`, `every`), in
    `on_train_batch_end`. At the first batch it traces the network, and refuses what can't work.

    **What it changes.** Parameters and buffers are replaced by smaller ones, and with them what hangs on them: the
    optimizers' parameters and states, DDP, the averages of WeightAveraging and StochasticWeightAveraging, and every
    callback, and the module, that has `on_channels_removed(trainer, pl_module, plan)`; what follows the network in
    `extend_pruning_plan(plan)` of the module. EarlyStopping counts afresh after each removal, and
    `ModelCheckpoint(monitor=...)` looks for its best afresh after the last one; files from before stay. Schedulers and
    GradScaler stay as they are. The network's outputs keep their number. The next step is looked at: a parameter that
    has a gradient and stands still is an error, and so is an old one that gets a gradient. Running statistics of
    BatchNorm follow by themselves within some ten training steps.

    **What it logs.** At each removal `pruning/macs` (multiply-accumulates of a sample), `pruning/params`,
    `pruning/macs_share` (of those before the first removal), `pruning/size_mb`, `pruning/latency_ms` (of one sample);
    with a validation loader of a classifier's batches also `pruning/accuracy_before`, `pruning/accuracy_after`, and
    before the next removal and at the end `pruning/accuracy_recovered`. Loggers with `log_figure` get pictures of the
    channels that are left, and at the end of accuracy and MACs.

    **Checkpoint.** Counts, shares and, under the key `ds_lightning.pruning_plan`, what was removed in all, as plain
    Python. A fit that is resumed with `ckpt_path`, and validate, test and predict with this callback, start from the
    unpruned module, and lose the channels before the weights are loaded; a fit goes on bit for bit on a CPU from an
    epoch's end, with `ExactResume` from any batch (not with `measure="latency"`). Without the callback: modules of
    ds_lightning do it by themselves, others with `load_pruned`.

    **Limits.** One in a Trainer. Refused: strategies that hold parts of a parameter (FSDP, DeepSpeed, ModelParallel) or
    spawn or fork their processes (use `ddp` in a script), compiled networks, LBFGS and optimizers with states of other
    shapes, networks that can't be traced, targets that can't be reached.
    Checkpoints from before a removal no longer fit the module that is in memory; give a new one. There is no recovery
    beyond training: choose `end` so that enough steps are left.

    **Cost.** Per removal a copy of the network on the CPU, a trace of it and some forward passes of one sample; one
    copy of the parameters in the step after it. With `sparsity` a pass over the parameters each step.

    Args:
        target: the share of the measure to keep, in (0, 1).
        measure: `macs`, `params`, or `latency` (seconds of a forward pass).
        schedule: `cubic`: fast at first; `linear`; `one-shot`: all at `start`.
        start: where the schedule begins; the first removal is `every` later. A float in [0, 1] is a share of the fit's
            steps, an int an optimizer step.
        end: the last removal; likewise.
        every: optimizer steps between removals, >= 1; None: 8 removals.
        importance: `magnitude`; `taylor`, from the gradients of that very step; `bn_scale`; `random`.
        scope: `global`: channels of all layers are compared; `layer`: each layer loses the same share.
        round_to: layers keep multiples of this many channels, >= 1.
        exclude: fnmatch patterns on paths of modules in the network that keep their channels.
        min_channels: that each layer keeps at least, >= 1.
        sparsity: strength of a group lasso on all channels that can go, >= 0, from the first step to the last removal:
            adds `sparsity * w / ||group||` to the gradients, in closed form.
        network: path of the submodule to prune; None: all that the LightningModule's `forward` calls.
        seed: of `random`.
        report_batches: of the validation loader on which the accuracy is measured, >= 0; 0: not measured.

    Raises:
        ConfigError: an argument out of range; at the start of fit or its first batch what is refused, before any
            weight is touched.

    Paper: schedule: Zhu and Gupta 2017, arXiv 1710.01878; dependencies and sparsity: Fang et al. 2023, arXiv
    2301.12900; taylor: Molchanov et al. 2019, arXiv 1906.10771; bn_scale: Liu et al. 2017, arXiv 1708.06519.

    Example:
        >>> import lightning.pytorch as pl
        >>> pruning = ProgressivePruning(target=0.5, exclude=["stem"])
        >>> trainer = pl.Trainer(callbacks=[pruning], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        target: float = 0.5,
        measure: Literal["macs", "params", "latency"] = "macs",
        schedule: Literal["cubic", "linear", "one-shot"] = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.6,
        every: int | None = None,
        importance: Literal["magnitude", "taylor", "bn_scale", "random"] = "magnitude",
        scope: Literal["global", "layer"] = "global",
        round_to: int = 8,
        exclude: list[str] | None = None,
        min_channels: int = 8,
        sparsity: float = 0.0,
        network: str | None = None,
        seed: int = 0,
        report_batches: int = 8,
    ) -> None:
        choices = {"measure": measure, "schedule": schedule, "importance": importance, "scope": scope}
        counts = {"round_to": round_to, "min_channels": min_channels}
        check_arguments(target, choices, start, end, every, counts, sparsity, exclude, report_batches)
        self.target = target
        self.schedule = schedule
        self.start = start
        self.end = end
        self.every = every
        self.sparsity = sparsity
        self.network = network
        self.rule = PruningRule(measure, importance, scope, round_to, tuple(exclude or ()), min_channels, seed)
        self._report = PruningReport(report_batches)
        self._handle: RemovableHandle | None = None
        self._forget()

    def _forget(self) -> None:
        self._made = 0
        self._shares = {"macs": 1.0, self.rule.measure: 1.0}
        self._report.points = []
        self._release()

    def _release(self) -> None:
        self._removals: PruningSchedule | None = None
        self._inputs: Inputs | None = None
        self._graph: ChannelGraph | None = None
        self._lasso: GroupLasso | None = None
        self._gradients: dict[str, Tensor] | None = None
        self._watch: StandingStill | None = None
        self._stepped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; get the module ready for a checkpoint with fewer channels."""
        check_alone(trainer, ProgressivePruning)
        if stage == "fit":
            self._forget()
        self._remove_hooks()
        self._handle = prune_when_loaded(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what can't work."""
        check_fit(trainer, pl_module, self.network)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay out the removals."""
        total = trainer.estimated_stepping_batches
        self._removals = schedule_of(self.schedule, self.target, self.start, self.end, self.every, total)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Trace the network with the first batch, and see whether the target can be reached."""
        if self._inputs is not None:
            return
        assert self._removals is not None
        self._inputs = example_inputs(pl_module, self.network, batch)
        if self._made < len(self._removals.steps):
            target = self.target / self._shares[self.rule.measure]
            with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                self.rule.check_reachable(self._traced(pl_module), network_at(pl_module, self.network), target)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep gradients for a removal that is due, add the group lasso's, and copy for the look at the next step."""
        assert self._removals is not None
        self._stepped = True
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        # A fused optimizer unscales in its step, which comes after this.
        fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = scaler.get_scale() if fused else 1.0
        if self.rule.importance == "taylor" and self._due(trainer) > self._made:
            self._keep_gradients(pl_module, optimizer, scale)
        if self.sparsity and self._made < len(self._removals.steps):
            if self._lasso is None:
                with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                    groups = self._traced(pl_module).groups
                self._lasso = GroupLasso(network_at(pl_module, self.network), groups)
            self._lasso.pull(optimizer, self.sparsity * scale)
        if self._watch is not None:
            self._watch.before(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove channels when it is time; checkpoints of this batch come after this."""
        stepped, self._stepped = self._stepped, False
        due = self._due(trainer)
        if stepped and due > self._made:
            with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
                self._remove(trainer, pl_module, due)
            self._gradients = None
            assert self._removals is not None
            if self._made == len(self._removals.steps):
                forget_best(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure once more, and say what came out, or that it was less than what was asked for."""
        if self._removals is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._report.end(trainer, pl_module)
        measure, planned = self.rule.measure, len(self._removals.steps)
        share = f"{self._shares[measure]:.1%} of its {measure}"
        if self._made < planned:
            rank_zero_warn(
                f"ProgressivePruning did not get to its target: the fit ended after {self._made} of {planned} "
                f"removals, and the network has {share}; expected {self.target:.1%}. Let it train to the end",
                category=NoEffectWarning,
            )
        else:
            rank_zero_info(f"ProgressivePruning: the network has {share}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks off; the counts stay, for a checkpoint that is written now."""
        self._remove_hooks()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off and let go of the module; the counts stay."""
        self._remove_hooks()
        if stage == "fit":
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python."""
        return {"made": self._made, "shares": dict(self._shares), "points": [dict(p) for p in self._report.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts over."""
        self._made = state_dict["made"]
        self._shares.update(state_dict["shares"])
        self._report.points = [dict(point) for point in state_dict["points"]]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put in what was removed, from which the network can be built."""
        save_plan(checkpoint, pl_module)

    def _remove_hooks(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._watch is not None:
            self._watch.remove()

    def _due(self, trainer: pl.Trainer) -> int:
        # Lightning counts this batch's step after on_train_batch_end.
        return 0 if self._removals is None else self._removals.due(log_step(trainer)[0] + 1)

    def _traced(self, module: pl.LightningModule) -> ChannelGraph:
        if self._graph is None:
            assert self._inputs is not None
            self._graph = self.rule.graph(network_at(module, self.network), self._inputs)
        return self._graph

    def _keep_gradients(self, module: pl.LightningModule, optimizer: Optimizer, scale: float) -> None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self._gradients = self._gradients or {}
        for name, parameter in network_at(module, self.network).named_parameters():
            if parameter in held and parameter.grad is not None:
                self._gradients[name] = parameter.grad.detach() / scale

    def _remove(self, trainer: pl.Trainer, module: pl.LightningModule, due: int) -> None:
        assert self._removals is not None
        assert self._inputs is not None
        network = network_at(module, self.network)
        target = self._removals.keeps[due - 1] / self._shares[self.rule.measure]
        if target >= 1:  # an earlier removal went as far already
            self._made = due
            return
        plan = self.rule.decide(trainer, self._traced(module), network, target, self._gradients, due)
        if plan is None:  # gradients overflowed: the next step's will do
            return
        self._graph, self._lasso, self._made = None, None, due
        if not plan:
            return
        before, accuracy = costs(network, self._inputs), self._report.accuracy(trainer, module)
        if self._watch is not None:
            self._watch.remove()
        self._watch = remove_channels(trainer, module, plan.under(self.network) if self.network else plan)
        count_afresh(trainer)
        after, macs = costs(network, self._inputs), self._shares["macs"]
        shares = {measure: share * after[measure] / before[measure] for measure, share in self._shares.items()}
        # Measured, or of other inputs, they differ between ranks, which have to go on together.
        self._shares = trainer.strategy.broadcast(shares, src=0)
        self._report.removed(trainer, module, network, after, (macs, self._shares["macs"]), accuracy)
