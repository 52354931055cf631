"""CPU, memory, disk, network and GPU use, under MLflow's own names."""

import threading
from typing import Any

from ds_lightning.tracking.harmless import harmless
from ds_lightning.tracking.metrics import MetricRows
from ds_lightning.tracking.runs import Run


class SystemMetrics:
    """Sample the machine on a thread.

    MLflow's own monitor reads the run back from the database at each sample, and with its default settings
    logs nothing in a short run. This one uses the same monitors and names (`system/...`), takes a sample
    every `interval` seconds and a last one at the end.

    Args:
        interval: seconds between samples.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._rows = MetricRows()
        self._thread: threading.Thread | None = None
        self._monitors: list[Any] = []

    def start(self, run: Run) -> None:
        """Start sampling, if it is not going on.

        Args:
            run: the run that gets the samples; its `system_step` goes on from one `fit` to the next.
        """
        with harmless("machine metrics"):
            if self._thread is not None:
                return
            # Not in the constructor: a tracker is pickled and copied, with this in it.
            self._run, self._end = run, threading.Event()
            self._monitors = _monitors()
            # psutil's first CPU figure is always 0.0: it has no interval to refer to.
            self._monitors[0].collect_metrics()
            self._monitors[0].clear_metrics()
            self._thread = threading.Thread(target=self._watch, name="system-metrics", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take the last sample and stop, if it is going on."""
        with harmless("machine metrics"):
            if self._thread is None:
                return
            self._end.set()
            self._thread.join()
            self._thread = None
            self._sample()

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics.update({f"system/{key}": value for key, value in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()
        self._run.metrics(self._rows.rows(metrics, self._run.system_step))
        self._run.system_step += 1


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    # MLflow's monitors have no annotations.
    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    monitors = [kind() for kind in kinds]
    gpu: Any = GPUMonitor
    try:
        monitors.append(gpu())
    except (ImportError, RuntimeError):
        # No nvidia-ml-py, or no NVIDIA GPU: there is nothing to measure.
        return monitors
    return monitors
