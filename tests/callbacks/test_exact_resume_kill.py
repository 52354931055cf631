"""Real deaths and real processes."""

import multiprocessing
import random
import signal
import time

import exact_resume_cases as cases
import lightning.pytorch as pl
import torch

from ds_lightning.callbacks import ExactResume


def start(root, seed):
    root.mkdir(exist_ok=True)
    # A fork needs no new import of Lightning, which takes seconds.
    process = multiprocessing.get_context("fork").Process(target=cases.main, args=(root, seed, 2))
    process.start()
    return process


def test_killed_three_times_it_ends_bit_equal(tmp_path):
    uninterrupted, killed = start(tmp_path / "a", seed=1), tmp_path / "b"
    steps = [0]
    draw = random.Random()
    for seed in (1, 2, 3):
        process = start(killed, seed)
        # Killed a random while after it has trained on, so that each death falls into new steps.
        while process.is_alive() and max(reached(killed), default=0) <= steps[-1]:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(max(reached(killed)))
    assert steps == sorted(set(steps))
    last = start(killed, seed=4)
    for process in (uninterrupted, last):
        process.join(200)
        assert process.exitcode == 0
    assert torch.equal(torch.load(killed / "weights.pt"), torch.load(tmp_path / "a" / "weights.pt"))


def reached(root):
    return [int(path.stem.removeprefix("step=").split("-")[0]) for path in root.glob("step=*.ckpt")]


class Ranks(cases.Records):
    def on_train_end(self):
        everything = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everything, (self.seen, self.reported))
        if self.trainer.is_global_zero:
            torch.save((cases.weights(self), everything), self.trainer.default_root_dir + "/end.pt")


def test_two_ranks_resume_exactly(tmp_path):
    results = []
    for seed, resume in ((1, None), (9, tmp_path / "step=4.ckpt")):
        pl.seed_everything(seed, verbose=False)
        saver = () if resume else (cases.every_step(tmp_path),)
        trainer = cases.trainer(tmp_path, ExactResume(), *saver, epochs=3, strategy="ddp_fork", devices=2)
        trainer.fit(Ranks(), cases.loader("shuffle", 0), ckpt_path=resume, weights_only=True if resume else None)
        results.append(torch.load(tmp_path / "end.pt"))
    (whole, whole_ranks), (resumed, resumed_ranks) = results
    assert torch.equal(resumed, whole)
    for (seen, reported), (seen_again, reported_again) in zip(whole_ranks, resumed_ranks, strict=True):
        assert seen_again == seen[4:]
        assert reported_again == reported[1:]
    assert not set(whole_ranks[0][0][0][2]) & set(whole_ranks[1][0][0][2])
