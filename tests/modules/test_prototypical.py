import copy
import pickle
from typing import Any

import few_shot_cases as cases
import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.modules import PrototypicalNetwork
from ds_lightning.modules.prototypical import prototypes, squared_distances

QUICK = {"network_options": {"width": 8}, "in_channels": 1, "image_size": cases.SIZE}


def small(**options: Any) -> PrototypicalNetwork:
    torch.manual_seed(0)
    return PrototypicalNetwork("conv4", **{**QUICK, **options})


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_means_and_distances_equal_a_double_loop(tasks: int, ways: int, shots: int, queries: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(ways).repeat(shots).expand(tasks, -1)
    label = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in label])
    support = torch.randn(tasks, ways * shots, 4, generator=generator, dtype=torch.float64)
    query = torch.randn(tasks, queries, 4, generator=generator, dtype=torch.float64)
    centres = prototypes(support, label, ways)
    found = squared_distances(query, centres)
    for task in range(tasks):
        for way in range(ways):
            own = [support[task, n] for n in range(ways * shots) if int(label[task, n]) == way]
            mean = sum(own) / len(own)
            assert torch.allclose(centres[task, way], mean)
            for q in range(queries):
                expected = sum((query[task, q, d] - mean[d]) ** 2 for d in range(4))
                assert torch.allclose(found[task, q, way], expected)


def test_far_from_the_origin_distances_stay_exact() -> None:
    query, centres = torch.tensor([[[1000.0, 1000.5]]]), torch.tensor([[[1000.0, 1000.0], [1000.0, 1001.0]]])
    assert torch.allclose(squared_distances(query, centres), torch.tensor([[[0.25, 0.25]]]), atol=1e-4)


def test_the_loss_is_the_papers_over_a_loop() -> None:
    model, batch = small(), cases.batch()
    loss, logits = model.episode_loss(batch)
    expected = []
    for task in range(4):
        embedded = model.network(batch["support"]["image"][task])
        means = torch.stack([embedded[batch["support"]["label"][task] == way].mean(0) for way in range(3)])
        distances = torch.cdist(model.network(batch["query"]["image"][task]), means) ** 2
        assert torch.allclose(-distances, logits[task], atol=1e-4)
        expected.append(F.cross_entropy(-distances, batch["query"]["label"][task]))
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-5)


def test_it_learns_and_any_ways_will_do(tmp_path: Any) -> None:
    model = small(optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    data = cases.Patterned(test_ways=5, noise=1.5, tasks=40)
    trainer = cases.trainer(tmp_path, max_epochs=4)
    (before,) = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    (after,) = trainer.validate(model, data, verbose=False)
    assert after["val/accuracy"] > before["val/accuracy"] + 0.1, (before, after)
    assert trainer.predict(model, data)[0].shape == (2, 15, 5)


def test_adapt_gives_a_network_of_its_own() -> None:
    model, batch = small(), cases.batch(ways=4)
    support = {name: value[1] for name, value in batch["support"].items()}
    with torch.inference_mode():
        adapted = model.adapt(support)
    assert not any(isinstance(part, L.LightningModule) for part in adapted.modules())
    assert not adapted.training
    expected = model.eval().predictions(batch)[0, 1]
    kept = pickle.loads(pickle.dumps(copy.deepcopy(adapted)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.allclose(kept(batch["query"]["image"][1]), expected, atol=1e-4)
    assert kept(batch["query"]["image"][1]).shape[1] == 4


@pytest.mark.parametrize("label", [[0, 0, 2], [1, 1, 2], [0, 0, 0]])
def test_a_class_without_samples_is_told(label: list[int]) -> None:
    support = {"image": torch.zeros(3, 1, 16, 16), "label": torch.tensor(label)}
    with pytest.raises(ValueError, match="expected each of 0 to ways - 1"):
        small().adapt(support)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ConfigError, match="embedding is 0; expected at least 1"):
        PrototypicalNetwork(embedding=0)
    with pytest.raises(ConfigError, match=r"gave \(24, 0\); expected embeddings .* torchvision needs embedding=D"):
        PrototypicalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(256, 0))).predictions(
            {"support": cases.batch(tasks=2)["support"], "query": cases.batch(tasks=2, queries=2)["query"]}
        )
    waves = {"table": torch.zeros(2, 3, 1), "target": torch.zeros(2, 3, 1)}
    with pytest.raises(ConfigError, match="PrototypicalNetwork needs class indices in `label`"):
        PrototypicalNetwork(nn.Linear(1, 2)).predictions({"support": waves, "query": waves})


def test_resume_is_bit_equal(tmp_path: Any) -> None:
    data = cases.Patterned()

    def fit(epochs: int, ckpt: Any = None) -> PrototypicalNetwork:
        model = small()
        trainer = cases.trainer(tmp_path, max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(model, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole = fit(3)
    fit(1)
    resumed = fit(3, tmp_path / "1.ckpt")
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    loaded = PrototypicalNetwork.load_from_checkpoint(tmp_path / "3.ckpt", weights_only=True)
    assert torch.equal(loaded.predictions(cases.batch()), resumed.predictions(cases.batch()))
