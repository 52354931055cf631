import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.networks import CrossModalFusion
from ds_lightning.networks.cross_modal import modality_dropout

DIMS = {"image": 6, "audio": 5, "text": 4}
NAMES = list(DIMS)


def small(**options: Any) -> CrossModalFusion:
    torch.manual_seed(0)
    return CrossModalFusion(DIMS, width=16, heads=2, **options).eval()


def some_tokens(rows: int, seed: int, lengths: tuple[int, ...] = (4, 3, 5)) -> dict[str, tuple[Tensor, Tensor]]:
    """Random tokens whose masks are random too, with at least the first token of each modality."""
    draw = torch.Generator().manual_seed(seed)
    tokens = {}
    for (name, size), length in zip(DIMS.items(), lengths, strict=True):
        mask = torch.rand(rows, length, generator=draw) < 0.6
        mask[:, 0] = True
        hidden = torch.randn(rows, length, size, generator=draw)
        tokens[name] = (hidden.masked_fill(~mask[..., None], torch.nan), mask)
    return tokens


def absent_as_nan(tokens: dict[str, tuple[Tensor, Tensor]], present: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (hidden.masked_fill(~present[:, column, None, None], torch.nan), mask)
        for column, (name, (hidden, mask)) in enumerate(tokens.items())
    }


def what_is_there(
    tokens: dict[str, tuple[Tensor, Tensor]], present: Tensor, row: int
) -> dict[str, tuple[Tensor, None]]:
    """One sample with its real tokens alone, without any mask."""
    return {
        name: (hidden[row][mask[row]][None], None)
        for column, (name, (hidden, mask)) in enumerate(tokens.items())
        if present[row, column]
    }


def some_present(rows: int, seed: int) -> Tensor:
    present = torch.rand(rows, len(DIMS), generator=torch.Generator().manual_seed(seed)) < 0.5
    present[range(rows), torch.randint(len(DIMS), (rows,), generator=torch.Generator().manual_seed(seed))] = True
    return present


@settings(deadline=None, max_examples=20)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 10_000))
def test_what_is_absent_changes_nothing(lengths: tuple[int, int, int], seed: int) -> None:
    network = small()
    tokens, present = some_tokens(3, seed, lengths), some_present(3, seed)
    fused = network(absent_as_nan(tokens, present), present)
    attention = network.attention(absent_as_nan(tokens, present), present)
    for row in range(3):
        there = what_is_there(tokens, present, row)
        alone = network(there)
        assert torch.allclose(fused[row], alone[0], rtol=0, atol=1e-6)
        alone_attention = network.attention(there)
        assert torch.allclose(attention.matrix[row], alone_attention.matrix[0], rtol=0, atol=1e-6)
        for name, (_, mask) in tokens.items():
            real = mask[row] & present[row, NAMES.index(name)]
            assert (attention.tokens[name][row][:, ~real] == 0).all()
            if real.any():
                mine, theirs = attention.tokens[name][row][:, real], alone_attention.tokens[name][0]
                assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def some_number(fused: Tensor, directions: Tensor) -> Tensor:
    # Not the squares: those of a normalised vector have a fixed sum.
    return (fused * directions).sum()


def test_what_is_absent_changes_no_gradient() -> None:
    tokens, present = some_tokens(4, 1), some_present(4, 1)
    directions = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    doubled = {name: (hidden.double(), mask) for name, (hidden, mask) in absent_as_nan(tokens, present).items()}
    network = small().double()
    inputs = {name: hidden.requires_grad_() for name, (hidden, _) in doubled.items()}
    some_number(network(doubled, present), directions).backward()
    alone = small().double()
    for row in range(4):
        some_number(alone(what_is_there(doubled, present, row)), directions).backward()
    for (name, mine), theirs in zip(network.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11), name
    for column, (name, (_, mask)) in enumerate(doubled.items()):
        read = mask & present[:, column, None]
        assert (inputs[name].grad[~read] == 0).all()
        assert (inputs[name].grad[read].abs().sum(-1) > 0).all()


def test_a_modality_that_nobody_has_may_be_left_out() -> None:
    network, tokens = small(), some_tokens(3, 2)
    present = torch.tensor([[True, False, True]] * 3)
    left_out = {name: tokens[name] for name in ("text", "image")}
    for present_there in (None, present):
        mine, theirs = network(left_out, present_there), network(tokens, present)
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)
    assert set(network.attention(left_out).tokens) == {"text", "image"}


def test_masks_of_nothing_but_true_are_no_masks() -> None:
    network = small()
    bare = {name: (torch.randn(2, 3, size), None) for name, size in DIMS.items()}
    full = {name: (hidden, torch.ones(2, 3, dtype=torch.bool)) for name, (hidden, _) in bare.items()}
    expected = network(bare)
    for tokens, present in ((full, None), (bare, torch.ones(2, 3, dtype=torch.bool))):
        assert torch.allclose(network(tokens, present), expected, rtol=0, atol=1e-6)


def test_a_sample_without_anything_is_finite() -> None:
    network = small().train()
    tokens = {name: (torch.full((2, 3, size), torch.nan), None) for name, size in DIMS.items()}
    present = torch.zeros(2, 3, dtype=torch.bool)
    output = network(tokens, present)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    # With no key but its own, attention is the value itself.
    network.eval()
    hidden = network.fused_token
    for block in network.blocks:
        value = block.queries_keys_values(block.attention_norm(hidden)).chunk(3, dim=-1)[2]
        hidden = hidden + block.projection(value)
        hidden = hidden + block.mlp(block.mlp_norm(hidden))
    assert torch.allclose(network(tokens, present), network.norm(hidden)[0].expand(2, -1), atol=1e-6)


def torchs_layer(block: nn.Module, width: int, heads: int) -> nn.TransformerEncoderLayer:
    theirs = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    names = {
        "attention_norm": "norm1",
        "queries_keys_values": "self_attn.in_proj_",
        "projection": "self_attn.out_proj",
        "mlp_norm": "norm2",
        "mlp.0": "linear1",
        "mlp.3": "linear2",
    }
    state = {}
    for key, value in block.state_dict().items():
        module, _, kind = key.rpartition(".")
        target = names[module]
        state[f"{target}{kind}" if target.endswith("_") else f"{target}.{kind}"] = value
    theirs.load_state_dict(state)
    return theirs


def test_the_layers_and_the_matrix_are_those_of_torchs_attention() -> None:
    network, tokens = small(depth=2), some_tokens(3, 3)
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    parts, real, group = [network.fused_token.expand(3, 1, -1)], [torch.ones(3, 1, dtype=torch.bool)], [0]
    for column, (name, (hidden, mask)) in enumerate(tokens.items()):
        there = mask & present[:, column, None]
        projected = network.projections[name](hidden.nan_to_num())
        parts.append(projected + network.modality_embedding[column])
        real.append(there)
        group += [column + 1] * hidden.shape[1]
    hidden, kept = torch.cat(parts, dim=1), torch.cat(real, dim=1)
    found = network.attention(tokens, present)
    for depth, block in enumerate(network.blocks):
        layer = torchs_layer(block, 16, 2)
        normed = layer.norm1(hidden)
        _, weights = layer.self_attn(normed, normed, normed, key_padding_mask=~kept, need_weights=True)
        for row in range(3):
            expected = torch.zeros(4, 4)
            for query in range(4):
                queries = [i for i, g in enumerate(group) if g == query and kept[row, i]]
                for key in range(4):
                    keys = [i for i, g in enumerate(group) if g == key and kept[row, i]]
                    if queries and keys:
                        expected[query, key] = weights[row][queries][:, keys].sum() / len(queries)
            assert torch.allclose(found.matrix[row, depth], expected, atol=1e-6)
        for column, name in enumerate(NAMES):
            columns = [i for i, g in enumerate(group) if g == column + 1]
            assert torch.allclose(found.tokens[name][:, depth], weights[:, 0, columns], atol=1e-6)
        hidden = layer(hidden, src_key_padding_mask=~kept)
    assert torch.allclose(network(tokens, present), network.norm(hidden[:, 0]), atol=1e-5)


def test_the_rows_of_what_is_present_sum_to_one() -> None:
    present = some_present(5, 4)
    matrix = small(depth=3).attention(some_tokens(5, 4), present).matrix
    assert matrix.shape == (5, 3, 4, 4)
    there = torch.cat([torch.ones(5, 1, dtype=torch.bool), present], dim=1)
    assert torch.allclose(matrix.sum(-1), there[:, None].float().expand(-1, 3, -1), atol=1e-6)
    assert (matrix.masked_select(~there[:, None, None, :].expand_as(matrix)) == 0).all()


def test_what_modalities_say_together_is_learned() -> None:
    # The label is whether two signs agree: neither modality alone, nor a sum over them, tells anything.
    torch.manual_seed(0)
    network, head = CrossModalFusion({"series": 4, "table": 4}, width=16, heads=2, dropout=0.0), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 3e-3)
    signs = torch.randint(2, (64, 2))
    vectors = torch.randn(2, 2, 3, 4)
    tokens = {name: (vectors[i, signs[:, i]], None) for i, name in enumerate(("series", "table"))}
    label = signs[:, 0] ^ signs[:, 1]
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(head(network(tokens)), label).backward()
        optimizer.step()
    assert (head(network(tokens)).argmax(1) == label).float().mean() > 0.99


def test_half_precision_keeps_the_masks_exact() -> None:
    network, tokens, present = small(), some_tokens(3, 5), some_present(3, 5)
    other = {name: (hidden.nan_to_num(7.0), mask) for name, (hidden, mask) in tokens.items()}
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = network(absent_as_nan(tokens, present), present), network(other, present)
    assert torch.equal(mine, theirs)
    assert torch.allclose(mine.float(), network(other, present), atol=0.1)


def test_dropout_differs_in_training_alone() -> None:
    network = small(dropout=0.3)
    tokens = {name: (torch.randn(1, 3, size).expand(2, -1, -1), None) for name, size in DIMS.items()}
    assert torch.allclose(*network(tokens), atol=1e-6)
    assert not torch.allclose(*network.train()(tokens), atol=1e-3)


def test_a_copy_from_its_state_is_the_same() -> None:
    network, tokens = small(), some_tokens(2, 6)
    other = CrossModalFusion(DIMS, width=16, heads=2).eval()
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    assert torch.equal(other(tokens), network(tokens))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_modality_dropout_drops_as_often_as_it_says(p: float) -> None:
    rows = 20_000
    present = torch.tensor([[True, True, True, False]]).expand(rows, -1)
    kept = modality_dropout(present, p, generator=torch.Generator().manual_seed(0))
    assert not kept[:, 3].any()
    assert kept.any(dim=1).all()
    # Where all three would go, one of them stays, each as often.
    assert torch.allclose(kept[:, :3].float().mean(0), torch.tensor(1 - p + p**3 / 3), atol=0.015)
    assert abs((kept.sum(1) == 3).float().mean() - (1 - p) ** 3) < 0.015
    again = modality_dropout(present, p, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept, again)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.integers(0, 9999))
def test_modality_dropout_never_drops_the_last_one(rows: int, modalities: int, p: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, modalities, generator=draw) < 0.5
    kept = modality_dropout(present, p, generator=draw)
    assert not (kept & ~present).any()
    assert torch.equal(kept.any(1), present.any(1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dims": {}}, "dims is empty; expected at least one modality"),
        ({"dims": {"image": 0}}, r"dims\['image'\] is 0; expected at least 1"),
        ({"width": 10}, "width is 10; expected a multiple of the 4 heads"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"heads": 0}, "heads is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; expected a probability in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CrossModalFusion(**{"dims": DIMS, **arguments})


def test_a_wrong_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p is -0.1; expected a probability in \[0, 1\]"):
        modality_dropout(torch.ones(2, 2, dtype=torch.bool), -0.1)


@pytest.mark.parametrize(
    ("tokens", "present", "text"),
    [
        ({}, None, "expected one or more of image, audio, text"),
        ({"table": (torch.zeros(2, 3, 6), None)}, None, r"modalities \['table'\]"),
        ({"image": (torch.zeros(2, 6), None)}, None, r"image have the shape \(2, 6\); expected \(2, N, 6\)"),
        ({"image": (torch.zeros(2, 3, 5), None)}, None, r"the shape \(2, 3, 5\)"),
        (
            {"image": (torch.zeros(2, 3, 6), None), "text": (torch.zeros(3, 3, 4), None)},
            None,
            r"tokens of text have the shape \(3, 3, 4\)",
        ),
        ({"image": (torch.zeros(2, 3, 6), torch.ones(2, 3))}, None, "mask of the tokens of image is torch.float32"),
        ({"image": (torch.zeros(2, 3, 6), None)}, torch.ones(2, 2, dtype=torch.bool), r"present is .*shape \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(tokens: Any, present: Tensor | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small()(tokens, present)
