"""What labels are worth with and without contrastive pre-training: supervised, probed and fine-tuned at each share.

The same network throughout. Supervised training (`supervised`) and fine-tuning (`finetune`) are tuned alike, at each
share of the labels: optimizer, rate, weight decay and augmentation by the validation accuracy of the first seed, then
every seed is trained with the best and tested once. The pre-training (`ContrastivePretraining`) sees all training
samples and no label; `probe` is logistic regression on its frozen features, `knn` its neighbours' vote. Of texts,
`tfidf` is the usual baseline: TF-IDF and logistic regression. `distilled`, on demand (--methods), fine-tunes the
encoder once more, on what the fine-tuned network says of all training images (SimCLRv2, arXiv 2006.10029).

`cifar10`, `sst2` and `20newsgroups` need `--data-dir` with cifar10_jpeg.npz, sst2_{train,dev,test}.txt or
20newsgroups.npz; `fashion` the folder that torchvision reads. `mnist5k` is always there.

Prints JSON: the test accuracies of all seeds, `of_full` (fine-tuned over supervised with all labels) and
`above_supervised` (fine-tuned minus supervised with the same labels, paired by seed).
Run: `OMP_NUM_THREADS=1 python benchmarks/contrastive.py mnist5k --seeds 1`, or on a GPU
     `python benchmarks/contrastive.py cifar10 --data-dir DIR --device cuda --seeds 5 --jobs 5`.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contrastive_data import IMAGES, TEXTS, labelled, prepare
from contrastive_training import Pretraining, Run, pretrain, supervised, tfidf
from gpu_processes import training_processes
from seed_spread import spread

# (optimizer, rate, weight decay, augmentation), the likely ones first: --grid takes only so many.
AUGMENTS = ("crop_flip", "views")
IMAGE_GRID = {
    "supervised": [
        *itertools.product(("sgd",), (0.1, 0.3, 0.03), (5e-4,), AUGMENTS),
        *itertools.product(("adamw",), (3e-3, 1e-3), (0.05,), AUGMENTS),
        *itertools.product(("sgd",), (0.1,), (5e-3,), AUGMENTS),
    ],
    "finetune": [
        ("adamw", 3e-3, 0.05, "crop_flip"),
        ("adamw", 1e-3, 0.05, "views"),
        ("adamw", 1e-3, 0.05, "crop_flip"),
        ("adamw", 3e-3, 0.05, "views"),
        *itertools.product(("adamw",), (3e-4,), (0.05,), AUGMENTS),
        *itertools.product(("sgd",), (0.1, 0.3, 0.03), (5e-4,), AUGMENTS),
    ],
}
TEXT_GRID = {
    "supervised": list(itertools.product(("adamw",), (3e-3, 1e-2, 1e-3, 3e-4), (0.01, 0.3), ("none",))),
    "finetune": list(itertools.product(("adamw",), (1e-3, 3e-3, 3e-4, 1e-4), (0.01, 0.3), ("none",))),
}
METHODS = ("supervised", "finetune", "distilled")


def percent(share: float) -> str:
    return f"{100 * share:g}pct"


def bench(options: argparse.Namespace, pool: ProcessPoolExecutor, cache: Path) -> dict[str, Any]:
    common = {
        "name": options.what,
        "cache": str(cache),
        "device": options.device,
        "network": options.network,
        "network_options": options.network_options,
    }
    before = Pretraining(
        **common,
        epochs=options.epochs,
        steps=options.pretrain_steps,
        batch_size=options.batch_size,
        lr=options.pretrain_lr,
        temperature=options.temperature,
        view_options=options.view_options,
        shares=tuple(options.shares),
    )
    seeds = list(range(options.seeds))
    pretrained = [pool.submit(pretrain, replace(before, seed=seed)) for seed in seeds]
    grids = TEXT_GRID if options.what in TEXTS else IMAGE_GRID
    base = Run(**common, steps=options.steps)
    data = labelled(options.what, cache, batch_size=64, seed=0)
    data.prepare_data()
    data.setup("fit")
    total = data.dataset_info()["splits"]["train"]
    sizes = {share: None if share == 1 else max(data.num_classes, round(share * total)) for share in options.shares}

    def variants(kind: str, run: Run) -> list[Run]:
        found = [
            replace(run, optimizer=name, lr=lr, weight_decay=decay, augment=how) for name, lr, decay, how in grids[kind]
        ]
        return found[: options.grid] if options.grid else found

    def tune(kind: str, encoder: str = "") -> dict[float, list[tuple[Run, Any]]]:
        return {
            share: [
                (run, pool.submit(supervised, run))
                for run in variants(kind, replace(base, train_size=size, encoder=encoder))
            ]
            for share, size in sizes.items()
        }

    def kept(share: float, seed: int) -> str:
        return str(cache / f"finetune_{share:g}_seed{seed}.pt")

    def best(tried: list[tuple[Run, Any]]) -> Run:
        return max(tried, key=lambda pair: pair[1].result()["accuracy"])[0]

    tuned = {"supervised": tune("supervised")} if "supervised" in options.methods else {}
    paths = [future.result()["path"] for future in pretrained]
    if "finetune" in options.methods:
        tuned["finetune"] = tune("finetune", paths[0])
    tests: dict[str, dict[float, list[Any]]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for kind, by_share in tuned.items():
        tests[kind], chosen[kind] = {}, {}
        for share, tried in by_share.items():
            run = best(tried)
            row = {name: getattr(run, name) for name in ("optimizer", "lr", "weight_decay", "augment")}
            chosen[kind][percent(share)] = {**row, "validation": [round(f.result()["accuracy"], 4) for _, f in tried]}
            tests[kind][share] = [
                pool.submit(
                    supervised,
                    replace(
                        run,
                        seed=seed,
                        split="test",
                        encoder=paths[seed] if kind == "finetune" else "",
                        keep=kept(share, seed) if kind == "finetune" else "",
                    ),
                )
                for seed in seeds
            ]
    if "distilled" in options.methods:
        # The fine-tuning's best setting, for twice the steps; nothing more is tuned.
        tests["distilled"] = {}
        for share, teachers in tests["finetune"].items():
            if share == 1:
                continue
            for teacher in teachers:
                teacher.result()
            student = replace(best(tuned["finetune"][share]), train_size=None, steps=2 * options.steps, split="test")
            tests["distilled"][share] = [
                pool.submit(supervised, replace(student, seed=seed, encoder=paths[seed], teacher=kept(share, seed)))
                for seed in seeds
            ]
    if options.what in TEXTS:
        tests["tfidf"] = {
            share: [pool.submit(tfidf, replace(base, train_size=size, seed=seed)) for seed in seeds]
            for share, size in sizes.items()
        }
    values = {
        kind: {share: [future.result()["accuracy"] for future in futures] for share, futures in by_share.items()}
        for kind, by_share in tests.items()
    }
    probes = [future.result() for future in pretrained]
    result: dict[str, Any] = {
        "setting": {**asdict(before), "supervised_steps": options.steps, "cache": None},
        "labels": {percent(share): size or total for share, size in sizes.items()},
        "tuned": chosen,
        **{
            kind: {percent(share): spread(accuracies) for share, accuracies in by_share.items()}
            for kind, by_share in values.items()
        },
        "probe": {percent(share): spread([row[f"accuracy_{percent(share)}"] for row in probes]) for share in sizes},
        "knn": spread([row["knn"] for row in probes]),
        "effective_rank": spread([row["effective_rank"] for row in probes]),
        "pretraining_seconds": [round(row["seconds"]) for row in probes],
    }
    if not {"supervised", "finetune"} <= values.keys():
        return result
    full = values["supervised"].get(1.0)
    result["above_supervised"] = {
        percent(share): spread([a - b for a, b in zip(values["finetune"][share], plain, strict=True)])
        for share, plain in values["supervised"].items()
    }
    if full is not None:
        result["of_full"] = {
            name: {percent(share): round(statistics.fmean(found) / statistics.fmean(full), 4) for share, found in rows}
            for name, rows in (
                ("supervised", values["supervised"].items()),
                ("finetune", values["finetune"].items()),
                ("probe", ((share, result["probe"][percent(share)]["values"]) for share in sizes)),
            )
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*IMAGES, *TEXTS))
    parser.add_argument("--data-dir", default="data", help="folder of the files")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="of the labels")
    parser.add_argument("--seeds", type=int, default=1, help="how many; the first one tunes")
    parser.add_argument("--network", help="resnet8 for images, bag for texts when left out")
    parser.add_argument("--network-options", default="{}", help='JSON, such as {"width": 32}')
    parser.add_argument("--epochs", type=int, default=100, help="of the pre-training")
    parser.add_argument("--pretrain-steps", type=int, default=-1, help="at most; -1: no limit")
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=512, help="of the pre-training")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--view-options", default="{}", help='JSON over the defaults, such as {"color": 1.0}')
    parser.add_argument("--steps", type=int, default=2000, help="of each supervised training and fine-tuning")
    parser.add_argument("--grid", type=int, default=0, help="only so many settings of each grid; 0: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["supervised", "finetune"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, in turn on the GPUs that are there")
    options = parser.parse_args()
    if "distilled" in options.methods and "finetune" not in options.methods:
        parser.error("distilled needs finetune, its teacher: --methods finetune distilled")
    options.network = options.network or ("bag" if options.what in TEXTS else "resnet8")
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        training_processes(options.jobs, options.device) as pool,
    ):
        prepare(options.what, options.data_dir, Path(folder))
        result = bench(options, pool, Path(folder))
    environment = {"torch": torch.__version__, "device": options.device, "jobs": options.jobs}
    if options.device == "cuda":
        environment["device"] = torch.cuda.get_device_name()
    print(json.dumps({**environment, "seconds": round(time.perf_counter() - begin), **result}, indent=2))


if __name__ == "__main__":
    main()
