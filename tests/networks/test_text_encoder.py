from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_lightning.errors import ConfigError
from ds_lightning.networks import TextEncoder, backbone

KINDS = [{"depth": 2}, {"depth": 0}, {"depth": 1, "pool": "max"}]


def small(**options: Any) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(20, width=16, max_length=12, **options).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(0, 6), st.integers(0, 99))
def test_padding_changes_nothing(kind: dict[str, Any], length: int, padding: int, seed: int) -> None:
    network = small(num_classes=3, **kind)
    text = tokens(2, length, seed)
    padded = torch.cat([text, torch.zeros(2, padding, dtype=torch.int64)], dim=1)
    # A longer neighbour in the batch is what makes padding.
    batch = torch.cat([padded, tokens(1, length + padding, seed + 1)])
    assert torch.allclose(network(batch)[:2], network(text), atol=1e-5)


def test_the_transformer_is_torchs_with_the_norm_first() -> None:
    network = small(depth=1, heads=2)
    block, width = network.features.blocks[0], 16
    theirs = nn.TransformerEncoderLayer(
        width, 2, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    attention = theirs.self_attn
    pairs = [
        (attention.in_proj_weight, block.queries_keys_values.weight),
        (attention.in_proj_bias, block.queries_keys_values.bias),
        (attention.out_proj.weight, block.projection.weight),
        (attention.out_proj.bias, block.projection.bias),
        *zip(theirs.norm1.parameters(), block.attention_norm.parameters(), strict=True),
        *zip(theirs.norm2.parameters(), block.mlp_norm.parameters(), strict=True),
        *zip(theirs.linear1.parameters(), block.mlp[0].parameters(), strict=True),
        *zip(theirs.linear2.parameters(), block.mlp[3].parameters(), strict=True),
    ]
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
    text = tokens(3, 7)
    text[1, 4:] = 0
    features = network.features
    hidden = features.embedding(text) + features.positions.weight[:7]
    hidden = features.norm(theirs(hidden, src_key_padding_mask=text == 0))
    expected = torch.stack([row[: int((ids != 0).sum())].mean(0) for row, ids in zip(hidden, text, strict=True)])
    assert torch.allclose(network(text), expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_bag_pools_the_embeddings_of_what_is_no_padding(pool: str) -> None:
    features = small(depth=0, pool=pool).features
    text = tokens(3, 7)
    text[0, 1:] = 0
    text[1, 4:] = 0
    rows = [features.embedding.weight[ids[ids != 0]] for ids in text]
    pooled = torch.stack([row.mean(0) if pool == "mean" else row.max(0).values for row in rows])
    assert torch.allclose(features(text), features.bag(features.norm(pooled)), atol=1e-5)


def test_a_bag_has_no_order_and_a_transformer_has() -> None:
    text = tokens(1, 6)
    assert torch.allclose(small(depth=0)(text), small(depth=0)(text.flip(1)), atol=1e-6)
    assert not torch.allclose(small()(text), small()(text.flip(1)), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_is_finite_with_its_gradients(kind: dict[str, Any]) -> None:
    network = small(num_classes=2, **kind)
    text = tokens(2, 4)
    text[0] = 0
    network(text).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert (network.features.embedding.weight.grad[0] == 0).all()
    nothing = torch.zeros(1, 4, dtype=torch.int64)
    assert torch.equal(network(nothing), network(nothing[:, :1]))


def test_dropout_differs_in_training_alone() -> None:
    text = tokens(2, 6).repeat(2, 1)
    for options in ({"dropout": 0.3}, {"dropout": 0.0, "embedding_dropout": 0.5}):
        network = small(**options)
        assert torch.equal(network(text)[:2], network(text)[2:])
        network.train()
        assert not torch.equal(network(text)[:2], network(text)[2:])


def test_by_name() -> None:
    text = tokens(2, 5)
    network = backbone("text", num_classes=4, vocab_size=20, depth=1, in_channels=1, image_size=None)
    assert network(text).shape == (2, 4)
    assert network.features(text).shape == (2, network.num_features)
    assert not backbone("bag", num_classes=4, vocab_size=20).features.blocks
    with pytest.raises(ConfigError, match="network 'text' needs the option vocab_size"):
        backbone("text", num_classes=4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vocab_size": 1}, "vocab_size is 1; expected at least 2"),
        ({"width": 10}, "width is 10; expected a multiple of the 4 heads"),
        ({"depth": -1}, "depth is -1; expected at least 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; expected a probability in \[0, 1\)"),
        ({"embedding_dropout": -0.1}, "embedding_dropout is -0.1"),
        ({"pool": "first"}, "pool is 'first'; expected mean or max"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TextEncoder(**{"vocab_size": 20, **options})


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.zeros(2, 13, dtype=torch.int64), "the texts have 13 tokens; expected 1 to max_length, 12"),
        (torch.zeros(2, 5), r"shape \(2, 5\) and type torch.float32; expected token ids"),
        (torch.zeros(5, dtype=torch.int64), r"shape \(5,\)"),
    ],
)
def test_a_wrong_input_is_refused(batch: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small()(batch)
