"""Processes for many trainings at once, spread over the GPUs that are there."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def training_processes(jobs: int, device: str) -> ProcessPoolExecutor:
    """Return a pool whose processes see one GPU each, in turn; without a GPU all are alike.

    Args:
        jobs: processes.
        device: `cuda`, or another name, which changes nothing.
    """
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus < 2:
        return ProcessPoolExecutor(jobs, mp_context=context)
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number % gpus)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_see_one_gpu, initargs=(numbers,))


def _see_one_gpu(numbers: Any) -> None:
    # CUDA reads this when it is first used, which is later.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = numbers.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[number] if seen else str(number)
