"""What channel pruning saves, and what it costs in accuracy.

`speed`: torchvision's ResNet-50, 224 x 224 pixels, new weights, pruned to half of its multiply-accumulates. On a CPU:
one image, one thread, CPU time of this process alone; beside ours, torch-pruning by itself at a channel ratio that
comes to half (as it is, and with its `round_to=8`), and the masks that Lightning's ModelPruning sets
(torch.nn.utils.prune, made permanent). On a GPU: training steps (bf16, channels_last),
with `--graph` without the host's share, with `--compile` all networks compiled after pruning; ours with either `scope`
and several `round_to`, and with `--early` in two calls: layers with large maps go first, until that share of all the
work is left. All take turns; medians, and the median over the turns of the ratio to the unpruned network.

`quality`: ResNet-18, SGD and cosine, always as many steps in all. `unpruned`; `progressive`: ProgressivePruning within
the one fit; `one_shot_finetune`: 60% of the steps, then pruned at once, the rest with a second cosine; `scratch`: what
`progressive` ends with, trained from new weights. The rate of `unpruned` is tuned by the validation accuracy of the
first seed, and taken by all; so are, for each target, the rate of the fine-tuning, as a share of it, and the `end` of
`progressive` (--ends). With `--early` the one removal is by hand, by magnitude, layers with large maps first, and each
layer of the front or the rest loses the same share. Test accuracies of all seeds and their differences to `unpruned`,
paired by seed; seconds are those of training alone, and depend on how many jobs share a GPU. `mnist5k` is always there;
`cifar10` needs `--data-dir` with cifar10_jpeg.npz, `fashion` the folder that torchvision reads.

Prints JSON.
Run: `python benchmarks/pruning.py speed`, or on a GPU
     `python benchmarks/pruning.py speed --device cuda --graph` and
     `python benchmarks/pruning.py quality cifar10 --data-dir DIR --device cuda --seeds 5 --jobs 8`.
"""

import argparse
import json
import time

import torch
from pruning_quality import METHODS, SHAPES, quality
from pruning_speed import speed

from ds_lightning.networks.channel_importance import IMPORTANCES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("speed")
    timing.add_argument("--turns", type=int, default=20)
    timing.add_argument("--per-turn", type=int, default=5, help="passes or steps")
    timing.add_argument("--batch-size", type=int, default=128, help="of training steps")
    timing.add_argument("--image-size", type=int, default=224)
    timing.add_argument("--graph", action="store_true", help="each training step as one CUDA graph")
    timing.add_argument("--compile", action="store_true", help="training steps of networks that torch.compile took")
    timing.add_argument("--scopes", nargs="+", choices=("global", "layer"), default=["global", "layer"])
    timing.add_argument("--round-to", type=int, nargs="+", default=[8, 16, 32, 64], help="of training steps")
    timing.add_argument("--early", type=float, nargs="*", default=[], help="of training steps")
    judging = commands.add_parser("quality")
    judging.add_argument("what", choices=tuple(SHAPES))
    judging.add_argument("--data-dir", default="data", help="folder of the files")
    judging.add_argument("--seeds", type=int, default=1, help="how many; the first one tunes")
    judging.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25], help="shares of the MACs to keep")
    judging.add_argument(
        "--ends", type=float, nargs="+", default=[0.3, 0.45, 0.6], help="of progressive, to choose from"
    )
    judging.add_argument(
        "--rates", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2], help="of unpruned, to choose from"
    )
    judging.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside unpruned")
    judging.add_argument("--schedule", choices=("cubic", "linear", "one-shot"), default="cubic", help="of progressive")
    judging.add_argument("--importance", choices=IMPORTANCES, default="magnitude", help="of both that remove")
    judging.add_argument("--scope", choices=("global", "layer"), default="global", help="of both that remove")
    judging.add_argument("--early", type=float, default=0.0, help="of one_shot_finetune, as for speed")
    judging.add_argument("--sparsity", type=float, default=0.0, help="of progressive")
    judging.add_argument("--round-to", type=int, default=8, help="channels are multiples of this")
    judging.add_argument("--steps", type=int, default=2000, help="of each method, in all")
    judging.add_argument("--batch-size", type=int, default=256)
    judging.add_argument("--width", type=int, default=64, help="channels of the first stage")
    judging.add_argument("--jobs", type=int, default=1, help="processes")
    for command in (timing, judging):
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    begin = time.perf_counter()
    result = (speed if options.command == "speed" else quality)(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    environment = {"torch": torch.__version__, "device": device, "jobs": getattr(options, "jobs", 1)}
    print(json.dumps({**environment, "seconds": round(time.perf_counter() - begin), **result}, indent=2))


if __name__ == "__main__":
    main()
