import copy
import pickle
from typing import Any

import few_shot_cases as cases
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from ds_lightning.errors import ConfigError
from ds_lightning.modules import TransferLearning
from ds_lightning.modules._task_heads import fit_logistic

TINY = {"network_options": {"width": 8}, "in_channels": 1, "image_size": cases.SIZE}


def small(**options: Any) -> TransferLearning:
    torch.manual_seed(0)
    return TransferLearning("conv4", **{"num_train_classes": cases.CLASSES, "steps": 5, "lr": 0.05, **TINY, **options})


def by_hand(model: TransferLearning, batch: dict[str, Any], task: int, make: Any, everything: bool) -> Tensor:
    """Fine-tune on one task, as anyone would write it, and return the logits after each step."""
    support, query = ({name: value[task] for name, value in batch[part].items()} for part in ("support", "query"))
    network = copy.deepcopy(model.network).eval()
    head = nn.Linear(network.num_features, int(support["label"].max()) + 1).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = make([*(network.parameters() if everything else ()), *head.parameters()])
    outputs = []
    for step in range(6):
        if step:
            optimizer.zero_grad()
            F.cross_entropy(head(network(support["image"])), support["label"]).backward()
            optimizer.step()
        outputs.append(head(network(query["image"])).detach())
    return torch.stack(outputs)


@pytest.mark.parametrize("finetune", ["head", "all"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", lambda values: torch.optim.Adam(values, lr=0.05, weight_decay=0.01)),
        ("sgd", lambda values: torch.optim.SGD(values, lr=0.05, momentum=0.9, weight_decay=0.01)),
    ],
)
def test_all_tasks_at_once_equal_each_alone(finetune: str, name: str, make: Any) -> None:
    model = small(finetune=finetune, finetune_optimizer=name, weight_decay=0.01).double().eval()
    batch = cases.batch()
    for part in ("support", "query"):
        batch[part]["image"] = batch[part]["image"].double()
    before = copy.deepcopy(model.state_dict())
    outputs = model.predictions(batch)
    # After 0, 1, 2 and 5 steps.
    assert model.recorded_steps == (0, 1, 2, 5)
    assert outputs.shape == (4, 4, 9, 3)
    assert not outputs.requires_grad
    for task in range(4):
        expected = by_hand(model, batch, task, make, finetune == "all")[[0, 1, 2, 5]]
        assert torch.allclose(outputs[:, task], expected, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_the_logistic_head_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(3).repeat(4).expand(2, -1)
    x = torch.randn(2, 12, 5, generator=generator) + label.unsqueeze(-1)
    heads, strength = fit_logistic(x, label, 3, 0.05), 0.05
    for task in range(2):
        theirs = LogisticRegression(C=1 / (strength * 12), tol=1e-10, max_iter=5000).fit(x[task], label[task])
        expected = torch.from_numpy(theirs.predict_log_proba(x[task].numpy())).float()
        assert torch.allclose(heads(x)[task].log_softmax(-1), expected, atol=1e-4)


def test_the_cosine_head_begins_at_the_mean_directions() -> None:
    model, batch = small(head="cosine", steps=0).eval(), cases.batch()
    (outputs,) = model.predictions(batch)
    for task in range(4):
        embedded = F.normalize(model.network(batch["support"]["image"][task]), dim=1)
        means = torch.stack([embedded[batch["support"]["label"][task] == way].mean(0) for way in range(3)])
        expected = 10 * F.cosine_similarity(model.network(batch["query"]["image"][task])[:, None], means[None], dim=2)
        assert torch.allclose(outputs[task], expected, atol=1e-4)


def test_pre_training_is_classification_over_all_training_classes() -> None:
    model, batch = small(), cases.batch()
    loss, outputs = model.episode_loss(batch)
    losses = []
    for part in ("support", "query"):
        for task in range(4):
            for image, label in zip(batch[part]["image"][task], batch[part]["label"][task], strict=True):
                logits = model.train_head(model.network(image[None]))
                losses.append(F.cross_entropy(logits, batch["classes"][task, label][None]))
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-5)
    own = model.train_head(model.network(batch["query"]["image"][2]))[:, batch["classes"][2]]
    assert torch.allclose(outputs[2], own, atol=1e-5)


def test_training_classes_need_not_be_the_first(tmp_path: Any) -> None:
    class Later(cases.Patterned):
        train_classes = (9, 0, 1, 2, 3, 4, 5)

    model = TransferLearning("conv4", network_options={"width": 4}, steps=2)
    cases.trainer(tmp_path).fit(model, Later())
    assert model.num_train_classes == 7
    batch = cases.batch()
    assert torch.equal(model._task_classes(batch), batch["classes"] + 1)


def test_it_learns_from_the_pre_training(tmp_path: Any) -> None:
    model = small(optimizer=lambda params: torch.optim.Adam(params, lr=0.01), num_train_classes=None)
    data, trainer = cases.Patterned(noise=1.5, tasks=40), cases.trainer(tmp_path, max_epochs=4)
    (before,) = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    (after,) = trainer.validate(model, data, verbose=False)
    assert after["val/accuracy"] > before["val/accuracy"] + 0.1, (before, after)
    assert after["val/accuracy"] == after["val/accuracy_after_5"]
    assert {name for name in after if "after" in name} == {f"val/accuracy_after_{step}" for step in (0, 1, 2, 5)}
    loaded = TransferLearning.load_from_checkpoint(_saved(trainer, tmp_path), weights_only=True).eval()
    assert loaded.num_train_classes == cases.CLASSES
    assert torch.equal(loaded.predictions(cases.batch()), model.eval().predictions(cases.batch()))


def _saved(trainer: Any, folder: Any) -> Any:
    trainer.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


@pytest.mark.parametrize(
    "options",
    [{}, {"finetune": "all"}, {"head": "cosine"}, {"head": "logistic", "weight_decay": 0.1}],
    ids=["head", "all", "cosine", "logistic"],
)
def test_adapt_gives_a_network_that_answers_as_in_the_test(options: dict[str, Any]) -> None:
    model, batch = small(**options).eval(), cases.batch()
    with torch.inference_mode():
        adapted = model.adapt({name: value[2] for name, value in batch["support"].items()})
    found = pickle.loads(pickle.dumps(adapted))(batch["query"]["image"][2])
    assert torch.allclose(found, model.predictions(batch)[-1, 2], atol=1e-4)
    assert not any(value.requires_grad for value in adapted.parameters())


@pytest.mark.parametrize("finetune", ["head", "all"])
def test_under_bf16_every_step_counts(finetune: str) -> None:
    # Autocast remembers cast weights: without care, a network that is trained would answer as at the start.
    model, batch = small(finetune=finetune, steps=10).eval(), cases.batch(noise=0.5)
    exact = model.predictions(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.predictions(batch)
    assert rough.dtype == torch.float32
    assert (exact[-1] - exact[0]).abs().max() > 0.5
    assert (rough - exact).abs().mean() < 0.1 * (exact[-1] - exact[0]).abs().mean()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"finetune": "body"}, "finetune is 'body'; expected head or all"),
        ({"head": "svm"}, "head is 'svm'; expected linear or cosine or logistic"),
        ({"finetune_optimizer": "lion"}, "finetune_optimizer is 'lion'"),
        ({"steps": -1}, "steps is -1; expected at least 0"),
        ({"lr": 0.0}, "lr is 0.0; expected a rate above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"num_train_classes": 1}, "num_train_classes is 1; expected at least 2"),
        ({"embedding": 0}, "embedding is 0"),
        ({"head": "logistic"}, "expected a weight_decay above 0"),
        ({"head": "logistic", "weight_decay": 1.0, "finetune": "all"}, "and finetune 'head'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        small(**options)


def test_what_is_missing_is_told() -> None:
    batch = cases.batch()
    del batch["classes"]
    with pytest.raises(ConfigError, match="TransferLearning needs `classes`"):
        small().episode_loss(batch)
    assert small().predictions(batch).shape == (4, 4, 9, 3)
    with pytest.raises(ConfigError, match="Sequential does not say how many features it has; give the number"):
        TransferLearning(nn.Sequential(nn.Flatten()), 6)
    with pytest.raises(ConfigError, match="resnet18 does not say how many features"):
        TransferLearning("torchvision/resnet18", 6, in_channels=1, image_size=32)
