import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import ORDER, Known, Maps, Records, Rows, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_lightning.callbacks import AttentionMaps
from ds_lightning.callbacks._permuted import permuted_batches
from ds_lightning.errors import ConfigError, NoEffectWarning


def by_hand(data: Rows) -> Tensor:
    """Return the mean matrix of `Known`, sample by sample."""
    sums, counts = torch.zeros(4, 4).double(), torch.zeros(4).double()
    for row in data.rows:
        there = [0, *(column for column in range(1, 4) if row["present"][column - 1])]
        for each in there:
            counts[each] += 1
            for key in [1] if each == 1 else there:
                sums[each, key] += 1.0 if each == 1 else 1 / len(there)
    return sums / counts[:, None]


def test_the_mean_matrix_is_that_of_a_loop_over_the_samples(tmp_path: Path) -> None:
    logger, data = Records(), Rows()
    trainer(tmp_path, AttentionMaps(samples=3), logger=logger).fit(Known(), data)
    found = logger.files["attention_epoch_0000"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["names"] == ["fused", *ORDER]
    assert torch.allclose(torch.tensor(found["matrix"]).double(), by_hand(data), atol=1e-6)
    assert torch.tensor(found["matrix"]).sum(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-6)
    # Sample 0 has no text, sample 1 no sound.
    assert [sample["present"] for sample in found["samples"]] == [["image", "audio"], ["image", "text"], list(ORDER)]
    assert found["samples"][0]["matrix"][2] is None
    assert found["samples"][0]["matrix"][0] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert list(found["samples"][1]["tokens"]) == ["image", "text"]


def test_importance_is_the_accuracy_lost_and_the_text_is_worth_nothing(tmp_path: Path) -> None:
    logger, data = Records(), Rows(absent=False)
    run = trainer(tmp_path, AttentionMaps(), logger=logger)
    run.fit(Known(), data)
    found = {name: float(run.callback_metrics[f"attention/importance/{name}"]) for name in ORDER}
    assert found == pytest.approx(logger.files["attention_epoch_0000"]["importance"])
    assert logger.files["attention_epoch_0000"]["accuracy"] == 1
    assert found["text"] == 0
    # By hand: the sound wins where it is loud; the image decides between the others.
    label = torch.arange(30) // 10
    kept = [data.collate(data.rows[start : start + 5]) for start in range(0, 30, 5)]
    for column, name in ((0, "image"), (2, "audio")):
        parts = permuted_batches(kept, name, column)
        loud = torch.cat([part["audio"].amax(dim=(1, 2)) for part in parts]) > 0.5
        bright = torch.cat([part["image"].amax(dim=(1, 2, 3)) for part in parts]) > 0.5
        guess = torch.where(loud, 2, bright.long())
        assert found[name] == pytest.approx(1 - float((guess == label).float().mean()))
        # Sorted by class: inside the batches nothing would be lost.
        assert found[name] > 0.1


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    name=st.sampled_from(["image", "text", "audio", "series"]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_permutation_deals_out_the_same_values_among_those_who_have_them(
    sizes: list[int], name: str, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, Any] = {"image": (1, 2, 2), "text": (), "audio": (2,), "series": (1,)}
    batches = []
    number = 1
    for place, size in enumerate(sizes):
        length = () if name == "image" else (2 + (place + seed) % 3,)
        # Each sample is told by its number, and its length goes along.
        value = torch.arange(number, number + size).view(-1, *[1] * len((*shapes[name], *length)))
        value = value.expand(size, *shapes[name], *length).clone()
        value = value if name == "text" else value.float()
        batch = {name: value, "present": torch.rand(size, 2, generator=generator) < 0.6, "label": torch.arange(size)}
        if masked and name in ("audio", "series"):
            batch[f"{name}_mask"] = torch.arange(length[0]) < 1 + torch.arange(size)[:, None] % length[0]
        batches.append(batch)
        number += size
    before = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    found = permuted_batches(batches, name, 1)
    # What was given stays as it was.
    assert all(torch.equal(a[key], b[key]) for a, b in zip(batches, before, strict=True) for key in a)
    have = torch.cat([batch["present"][:, 1] for batch in batches])

    def told(parts: list[dict[str, Tensor]]) -> Tensor:
        return torch.cat([part[name].flatten(1).amax(dim=1) for part in parts]).long()

    old, new = told(batches), told(found)
    assert torch.equal(old[~have], new[~have])
    assert sorted(old[have].tolist()) == sorted(new[have].tolist())
    assert all(
        torch.equal(a["label"], b["label"]) and torch.equal(a["present"], b["present"])
        for a, b in zip(batches, found, strict=True)
    )

    def length_of(parts: list[dict[str, Tensor]]) -> list[int]:
        if name == "text":
            return [int(row.count_nonzero()) for part in parts for row in part["text"]]
        masks = [part.get(f"{name}_mask", torch.ones(len(part[name]), part[name].shape[-1])) for part in parts]
        return [int(row.sum()) for mask in masks for row in mask]

    if name != "image":
        lengths = dict(zip(old.tolist(), length_of(batches), strict=True))
        assert [lengths[who] for who in new.tolist()] == length_of(found)


def test_nothing_in_the_fit_changes(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [AttentionMaps(batches=2)]):
        torch.manual_seed(4)
        model = Known()
        trainer(tmp_path, *callbacks, max_epochs=2, logger=Records()).fit(model, Rows())
        ends.append((model.weight.item(), torch.get_rng_state(), model.training))
        assert not any(model.modes[-6:])
    assert ends[0][0] == ends[1][0] != 0
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


def test_absent_entries_are_never_read(tmp_path: Path) -> None:
    found = []
    for fill in (0.0, float("nan")):
        logger = Records()
        trainer(tmp_path, AttentionMaps(), logger=logger).validate(Known(), Rows(fill=fill), verbose=False)
        found.append(logger.files["attention_validate"])
    assert found[0] == found[1]


def test_it_acts_every_n_epochs_and_at_the_last(tmp_path: Path) -> None:
    logger = Records()
    trainer(tmp_path, AttentionMaps(every_n_epochs=2, batches=1, samples=1), max_epochs=5, logger=logger).fit(
        Known(), Rows(10)
    )
    epochs = ["0001", "0003", "0004"]
    assert sorted(logger.files) == [f"attention_epoch_{epoch}" for epoch in epochs]
    assert sorted(logger.figures) == sorted(
        [f"attention{part}_epoch_{epoch}" for epoch in epochs for part in ("", "_samples")]
    )


def test_the_pictures_show_the_matrix_the_image_the_words_and_the_sound(tmp_path: Path) -> None:
    logger, data = Records(), Rows()
    trainer(tmp_path, AttentionMaps(samples=3), logger=logger).validate(Known(), data, verbose=False)
    matrix, bars, _ = logger.figures["attention_validate"].axes
    assert torch.allclose(torch.from_numpy(matrix.images[0].get_array().data), by_hand(data), atol=1e-6)
    assert [tick.get_text() for tick in matrix.get_yticklabels()] == ["fused", *ORDER]
    assert len(bars.patches) == 3
    panels = logger.figures["attention_samples_validate"].axes
    titles = [axes.get_title() for axes in panels]
    assert titles[0] == "dark"
    assert titles[1] == "image: 0.33 of the fused token"
    # The first sample has no text, the third has its words; a formula's sign is no formula.
    assert [text.get_text() for text in panels[2].texts] == ["no text"]
    words = [data.vocabulary.decode([number]) for number in data.rows[2]["text"].tolist()]
    assert [text.get_text() for text in panels[10].texts] == words
    # The image, and the attention over it.
    assert len(panels[1].images) == 2
    assert len(panels[3].images) == 1


def test_labels_of_several_classes_at_once(tmp_path: Path) -> None:
    class Several(Rows):
        def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            batch = super().collate(rows)
            return {**batch, "label": torch.nn.functional.one_hot(batch["label"], 3).float()}

    class Signed(Known):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            logits = super().forward(batch)
            return logits - logits.amax(dim=1, keepdim=True) + 0.1

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self(batch)

    logger = Records()
    trainer(tmp_path, AttentionMaps(samples=1), logger=logger).validate(Signed(), Several(absent=False), verbose=False)
    found = logger.files["attention_validate"]
    assert found["accuracy"] == 1
    assert found["importance"]["text"] == 0
    assert found["importance"]["image"] > 0
    assert found["samples"][0]["label"] == [1, 0, 0]


def test_batches_without_presence_and_importance_off(tmp_path: Path) -> None:
    class Whole(Rows):
        def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {key: value for key, value in super().collate(rows).items() if key not in ("present", "label")}

    class All(Known):
        def attention_maps(self, batch: dict[str, Tensor]) -> Maps:
            return super().attention_maps({**batch, "present": torch.ones(len(batch["image"]), 3, dtype=torch.bool)})

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            pass

    logger = Records()
    trainer(tmp_path, AttentionMaps(importance=False), logger=logger).validate(
        All(), Whole(absent=False), verbose=False
    )
    found = logger.files["attention_validate"]
    assert found["matrix"][0] == pytest.approx([0.25] * 4)
    assert found["importance"] == {}
    with pytest.raises(ConfigError, match=r"no label.*importance=False"):
        trainer(tmp_path, AttentionMaps()).validate(_forward_of_all(All)(), Whole(absent=False), verbose=False)


def _forward_of_all(kind: type[Known]) -> type[Known]:
    class WithForward(kind):  # type: ignore[misc,valid-type]
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward({**batch, "present": torch.ones(len(batch["image"]), 3, dtype=torch.bool)})

    return WithForward


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
        ({"samples": -1}, "samples is -1"),
        ({"batches": 0}, "batches is 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AttentionMaps(**options)


class Doubled(Known):
    def attention_maps(self, batch: dict[str, Tensor]) -> Maps:
        return super().attention_maps(batch)._replace(matrix=2 * self.share(batch))


class Cut(Known):
    def attention_maps(self, batch: dict[str, Tensor]) -> Maps:
        return super().attention_maps(batch)._replace(matrix=self.share(batch)[:, :3])


class Bare(Known):
    def attention_maps(self, batch: dict[str, Tensor]) -> Any:
        return self.share(batch)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Doubled, "sum is 1 off 1"), (Cut, r"a matrix \(5, 3, 4\)"), (Bare, "gave a Tensor; expected names")],
)
def test_maps_of_another_form_are_refused(tmp_path: Path, kind: type[Known], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, AttentionMaps()).validate(kind(), Rows(10), verbose=False)


def test_a_module_without_maps_is_refused_and_a_fit_without_validation_is_said(tmp_path: Path) -> None:
    class Plain(Known):
        attention_maps = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match=r"needs a module with `attention_maps\(batch\)`.*Plain has none"):
        trainer(tmp_path, AttentionMaps()).fit(Plain(), Rows(10))
    with pytest.warns(NoEffectWarning, match="AttentionMaps measured nothing"):
        trainer(tmp_path, AttentionMaps(), limit_val_batches=0).fit(Known(), Rows(10))


def test_the_real_fusion_is_shown(tmp_path: Path) -> None:
    from ds_lightning.modules import MultimodalFusion

    logger = Records()
    options = {
        "image": {"in_channels": 1, "image_size": 4},
        "text": {"vocab_size": 5, "depth": 0},
        "audio": {"mels": 2},
    }
    model = MultimodalFusion(dict.fromkeys(ORDER), 3, width=8, depth=2, heads=2, encoder_options=options)
    run = trainer(tmp_path, AttentionMaps(samples=2), logger=logger, max_epochs=1)
    run.fit(model, Rows(10))
    found = logger.files["attention_epoch_0000"]
    assert torch.tensor(found["matrix"]).sum(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert found["accuracy"] == pytest.approx(float(run.callback_metrics["val/accuracy"]))
    assert sum(map(sum, found["samples"][1]["tokens"].values())) < 1
