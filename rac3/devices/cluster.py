"""How much there is and on what it runs: what `rac3 plan` reckons with, and nothing else."""

import os
from dataclasses import dataclass

from rac3.config import InputError


@dataclass(frozen=True)
class Scale:
    """Sizes of the data and of the cluster. They decide nothing that is computed. GB are 10^9 bytes.

    Attributes:
      documents: of the training source; 0 takes the number that is ingested.
      memory_documents: of each part of `Data.memory`; 0 as above.
      image_kilobytes: of an encoded picture, on average.
      hosts: machines of the cluster.
      cores: CPU cores of a host; 0 for those of this machine.
      memory_gb: host memory of each; 0 for that of this machine.
      gpus: of a host; 0 for a cluster of CPUs.
      gpu_memory_gb: of each.
      gpu_tflops: of each, for dense products in bfloat16: 312 of an A100, 989 of an H100.
      core_gflops: of each core in float32.
      decode_images_per_second: pictures that one core decodes and scales.
      utilization: the share of those peaks that is reached.
    """

    documents: int = 0
    memory_documents: int = 0
    image_kilobytes: float = 20.0
    hosts: int = 1
    cores: int = 0
    memory_gb: float = 0.0
    gpus: int = 0
    gpu_memory_gb: float = 80.0
    gpu_tflops: float = 312.0
    core_gflops: float = 50.0
    decode_images_per_second: float = 200.0
    utilization: float = 0.4

    def __post_init__(self) -> None:
        for name in ("documents", "memory_documents", "cores", "memory_gb", "gpus"):
            if getattr(self, name) < 0:
                raise InputError(f"scale.{name}={getattr(self, name)} is negative; use 0 or more")
        for name in ("hosts", "gpu_memory_gb", "gpu_tflops", "core_gflops", "decode_images_per_second"):
            if getattr(self, name) <= 0:
                raise InputError(f"scale.{name}={getattr(self, name)} must be above 0")
        if not 0 < self.utilization <= 1:
            raise InputError(f"scale.utilization={self.utilization} is outside (0, 1]; 0.3 to 0.6 is usual")

    @property
    def host_cores(self) -> int:
        return self.cores or len(os.sched_getaffinity(0))

    @property
    def host_bytes(self) -> float:
        """Memory of one host."""
        return self.memory_gb * 1e9 or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    @property
    def cpu_flops(self) -> float:
        """FLOP/s of all cores of the cluster, as far as they are reached."""
        return self.hosts * self.host_cores * self.core_gflops * 1e9 * self.utilization

    @property
    def device_flops(self) -> float:
        """FLOP/s of all GPUs of the cluster, or of its cores if it has none, as far as they are reached."""
        return self.hosts * self.gpus * self.gpu_tflops * 1e12 * self.utilization or self.cpu_flops

    @property
    def decoded_per_second(self) -> float:
        """Pictures that all cores of the cluster decode."""
        return self.hosts * self.host_cores * self.decode_images_per_second
