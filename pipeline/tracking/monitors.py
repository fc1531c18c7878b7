"""The monitors by which MLflow measures a machine."""

from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor


def load_monitors() -> list[BaseMetricsMonitor]:
    """What MLflow looks at a machine with: processor, memory, disk, network, and NVIDIA GPUs if there are any."""
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # how it says that there is no GPU, or no package to ask it with
        monitors.append(GPUMonitor())
    return monitors
