"""Networks as plain nn.Modules."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .audio_encoder import AudioEncoder as AudioEncoder
    from .by_name import backbone as backbone
    from .channel_costs import count_macs as count_macs
    from .channel_removal import prune_channels as prune_channels
    from .cross_modal import CrossModalFusion as CrossModalFusion
    from .few_shot_networks import Conv4 as Conv4
    from .few_shot_networks import conv4 as conv4
    from .few_shot_networks import mlp as mlp
    from .pruning_plan import PruningPlan as PruningPlan
    from .pruning_plan import apply_plan as apply_plan
    from .pruning_plan import plan_of as plan_of
    from .residual import ResNet as ResNet
    from .residual import resnet as resnet
    from .series_encoder import SeriesEncoder as SeriesEncoder
    from .table_encoder import TableEncoder as TableEncoder
    from .text_encoder import TextEncoder as TextEncoder
    from .token_encoders import token_encoder as token_encoder

__all__ = [
    "AudioEncoder",
    "Conv4",
    "CrossModalFusion",
    "PruningPlan",
    "ResNet",
    "SeriesEncoder",
    "TableEncoder",
    "TextEncoder",
    "apply_plan",
    "backbone",
    "conv4",
    "count_macs",
    "mlp",
    "plan_of",
    "prune_channels",
    "resnet",
    "token_encoder",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AudioEncoder": ".audio_encoder",
        "Conv4": ".few_shot_networks",
        "PruningPlan": ".pruning_plan",
        "CrossModalFusion": ".cross_modal",
        "ResNet": ".residual",
        "SeriesEncoder": ".series_encoder",
        "TableEncoder": ".table_encoder",
        "TextEncoder": ".text_encoder",
        "apply_plan": ".pruning_plan",
        "backbone": ".by_name",
        "conv4": ".few_shot_networks",
        "count_macs": ".channel_costs",
        "mlp": ".few_shot_networks",
        "plan_of": ".pruning_plan",
        "prune_channels": ".channel_removal",
        "resnet": ".residual",
        "token_encoder": ".token_encoders",
    },
)
