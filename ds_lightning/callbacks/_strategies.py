"""Strategies that give each rank parts of a parameter."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
