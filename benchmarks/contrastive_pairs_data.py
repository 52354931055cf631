"""Emoji and stamp pairs, their splits, and the baselines that need no training, for benchmarks/contrastive_pairs.py."""

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen_features import features_of, lite0, sentence_features
from torch import Tensor
from torch.nn import functional as F

from ds_lightning.functional.embedding_quality import recall_at
from ds_lightning.functional.seeds import derived_seed

FILES = {"emoji": "emoji64.npz", "stamps": "stamps_img_text.npz"}
ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def prepare(what: str, data_dir: str, cache: Path, lite0_size: int, device: str) -> set[str]:
    """Read the pairs into a file of the cache; return which pretrained features are in it, of `lite0`, `minilm`."""
    path = Path(data_dir, FILES[what])
    if not path.is_file():
        sys.exit(f"{path} is missing; set --data-dir to the folder that has it")
    with np.load(path, allow_pickle=False) as table:
        pictures = torch.from_numpy(table["x"]).permute(0, 3, 1, 2).contiguous()
        names = (table["name"] if what == "emoji" else table["caption_en"]).tolist()
        vendors = table["vendor"].tolist() if what == "emoji" else []
    if what == "emoji":
        rows: dict[str, dict[str, list[int]]] = {}
        for row, (name, vendor) in enumerate(zip(names, vendors, strict=True)):
            rows.setdefault(name, {}).setdefault(vendor, []).append(row)
        one, other = sorted(set(vendors))
        # Two emojis have one name: which picture belongs to which is not said.
        pairs = [(by[one][0], by[other][0]) for by in rows.values() if [*map(len, by.values())] == [1, 1]]
        sides = [pictures[list(side)] for side in zip(*pairs, strict=True)]
        names = [name for name, by in rows.items() if [*map(len, by.values())] == [1, 1]]
    else:
        sides = [pictures]
    kept = once(sides)
    sides, names = [side[kept] for side in sides], [names[row] for row in kept]
    group = torch.tensor([sorted(set(names)).index(name) for name in names])
    saved: dict[str, Any] = {"sides": sides, "group": group, "captions": names if what == "stamps" else []}
    network = lite0()
    if network is not None:
        saved["lite0"] = [features_of(network, side, lite0_size, device) for side in sides]
    sentences = sentence_features(names) if what == "stamps" else None
    if sentences is not None:
        saved["minilm"] = sentences
    torch.save(saved, cache / f"{what}.pt")
    return {"lite0", "minilm"} & saved.keys()


def once(sides: list[Tensor]) -> list[int]:
    """Return the rows none of whose pictures is an earlier row's."""
    seen: list[set[bytes]] = [set() for _ in sides]
    kept = []
    for row in range(len(sides[0])):
        found = [side[row].numpy().tobytes() for side in sides]
        if not any(picture in earlier for picture, earlier in zip(found, seen, strict=True)):
            kept.append(row)
        for picture, earlier in zip(found, seen, strict=True):
            earlier.add(picture)
    return kept


@functools.lru_cache(maxsize=1)
def prepared(path: str) -> dict[str, Any]:
    return torch.load(path, mmap=True, weights_only=True)


def split_rows(group: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the rows of each split, of `val` and `test` one of each group: 70, 10 and 20% of the groups."""
    total = int(group.max()) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(derived_seed(0, "validation pairs")))
    val, rest = order[: total // 10], order[total // 10 :]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(derived_seed(seed, "test pairs")))]
    parts = {"val": val, "test": rest[: total // 5], "train": rest[total // 5 :]}
    first = {number: row for row, number in reversed(list(enumerate(group.tolist())))}
    found = {split: torch.tensor([first[number] for number in sorted(part.tolist())]) for split, part in parts.items()}
    return {**found, "train": torch.isin(group, parts["train"]).nonzero()[:, 0]}


def standardised(features: Tensor, train: Tensor) -> Tensor:
    std, mean = torch.std_mean(features[train], 0)
    return (features - mean) / std.clamp_min(1e-6)


def scores(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return R@1 and R@5 from the first side to the second, back (`_reverse`), and their mean."""
    found: dict[str, float] = {}
    for k, there, back in zip((1, 5), recall_at(first, second, [1, 5]), recall_at(second, first, [1, 5]), strict=True):
        found |= {f"r{k}": float(there), f"r{k}_reverse": float(back), f"r{k}_mean": float(there + back) / 2}
    return found


def baselines(what: str, cache: str, seed: int) -> dict[str, dict[str, float]]:
    """Return the scores of what needs no training, or only a regression, on the test pairs."""
    saved = prepared(str(Path(cache, f"{what}.pt")))
    rows = split_rows(saved["group"], seed)
    test, train = rows["test"], rows["train"]
    pixels = [side.flatten(1).float() / 255 for side in saved["sides"]]
    if what == "emoji":
        found = {"pixels": scores(*((side - side[train].mean(0))[test] for side in pixels))}
        if "lite0" in saved:
            found["lite0"] = scores(*(side[test] for side in saved["lite0"]))
            found["lite0_standardised"] = scores(*(standardised(side, train)[test] for side in saved["lite0"]))
        return found
    chance = {f"r{k}{end}": min(1.0, k / len(test)) for k in (1, 5) for end in ("", "_reverse", "_mean")}
    small = F.adaptive_avg_pool2d(saved["sides"][0].float() / 255, 12).flatten(1)
    found = {"chance": chance, "ridge_pixels": ridge(small, saved["captions"], rows)}
    if "lite0" in saved:
        found["ridge_lite0"] = ridge(saved["lite0"][0], saved["captions"], rows)
    if {"lite0", "minilm"} <= saved.keys():
        sentences = standardised(saved["minilm"], train).double()
        found["ridge_lite0_minilm"] = ridge_to([sentences], saved["lite0"][0], rows)
    return found


def ridge(features: Tensor, captions: list[str], rows: dict[str, Tensor]) -> dict[str, float]:
    """Return the scores of ridge regression from features to TF-IDF; validation chooses words or letters."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = [captions[row] for row in rows["train"].tolist()]
    targets = []
    for options in ({"token_pattern": r"\w+"}, {"analyzer": "char_wb", "ngram_range": (2, 4)}):
        tfidf = TfidfVectorizer(sublinear_tf=True, **options).fit(known)
        targets.append(torch.from_numpy(tfidf.transform(captions).toarray()))
    return ridge_to(targets, features, rows)


def ridge_to(targets: list[Tensor], features: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """Return the test scores of ridge regression to that target, and of that strength, which validation likes best."""
    x = standardised(features, rows["train"]).double()
    known = x[rows["train"]]
    values, vectors = torch.linalg.eigh(known @ known.T)
    best: tuple[float, dict[str, float]] = (-1.0, {})
    for y in targets:
        mean = y[rows["train"]].mean(0)
        for alpha in ALPHAS:
            solved = vectors @ ((vectors.T @ (y[rows["train"]] - mean)) / (values[:, None] + alpha))
            guess, truth = x @ (known.T @ solved), y - mean
            val = scores(guess[rows["val"]], truth[rows["val"]])
            if val["r1_mean"] + val["r5_mean"] > best[0]:
                best = val["r1_mean"] + val["r5_mean"], scores(guess[rows["test"]], truth[rows["test"]])
    return best[1]
