"""The encoders of benchmarks/multimodal.py."""

from multimodal_data import ArrayBatches
from torch import Tensor, nn

from ds_lightning.networks import token_encoder


class MapTokens(nn.Module):
    """Takes a feature map (B, C, H, W) of a frozen network for H * W tokens."""

    def __init__(self, num_features: int, dropout: float) -> None:
        super().__init__()
        self.num_features, self.dropout = num_features, nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.dropout(x.flatten(2).transpose(1, 2)), None


class Sentence(nn.Module):
    """Features (B, D) as they are, with dropout."""

    def __init__(self, num_features: int, dropout: float) -> None:
        super().__init__()
        self.num_features, self.dropout = num_features, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x)


def encoders_of(data: ArrayBatches, features: tuple[str, ...], dropout: float) -> dict[str, nn.Module]:
    """Return an encoder for each modality that the batches hold."""
    found: dict[str, nn.Module] = {}
    for name, shape in data.input_shapes.items():
        if name == "image" and "lite0" in features:
            found[name] = MapTokens(shape[0], dropout)
        elif name == "image":
            found[name] = token_encoder("image", "resnet8", in_channels=shape[0], image_size=shape[1], width=32)
        elif name == "text" and "minilm" in features:
            found[name] = Sentence(shape[0], dropout)
        elif name == "text":
            options = {"depth": 0, "embedding_dropout": 0.2, "dropout": 0.3}
            found[name] = token_encoder("text", vocab_size=data.vocab_size, **options)
        else:
            found[name] = token_encoder("audio", mels=shape[0], dropout=0.1)
    return found
