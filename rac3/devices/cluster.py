"""The cluster and the amount of data that `rac3 plan` assumes. Nothing else reads them."""

import os
from dataclasses import dataclass

from rac3.config import InputError


@dataclass(frozen=True)
class Cluster:
    """The cluster and how much data: what `rac3 plan` assumes. No result depends on it. GB are 10^9 bytes.

    Attributes:
      documents: training documents; 0 takes the number ingested.
      memory_documents: documents in each part of `Data.memory`; 0 takes the number ingested.
      image_kilobytes: mean size of an encoded image.
      hosts: machines in the cluster.
      cores: CPU cores per host; 0 means as many as this machine has.
      memory_gb: RAM per host; 0 means as much as this machine has.
      gpus: GPUs per host; 0 for a CPU cluster.
      gpu_memory_gb: memory per GPU.
      gpu_tflops: peak TFLOP/s per GPU, dense bfloat16: 312 for an A100, 989 for an H100.
      link_gb_per_second: of each GPU to those of its host, in one direction: 300 for an A100, 450 for an H100.
      network_gb_per_second: of each GPU to other hosts, in one direction: 25 for a port of 200 Gbit/s.
      core_gflops: peak GFLOP/s per core in float32.
      decode_images_per_second: images that one core decodes and resizes.
      utilization: the share of these peaks that is reached.
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
    link_gb_per_second: float = 300.0
    network_gb_per_second: float = 25.0
    core_gflops: float = 50.0
    decode_images_per_second: float = 200.0
    utilization: float = 0.4

    def __post_init__(self) -> None:
        for name in ("documents", "memory_documents", "cores", "memory_gb", "gpus"):
            if getattr(self, name) < 0:
                raise InputError(f"cluster.{name}={getattr(self, name)} is negative; use 0 or more")
        rates = "gpu_tflops", "link_gb_per_second", "network_gb_per_second", "core_gflops", "decode_images_per_second"
        for name in ("hosts", "gpu_memory_gb", *rates):
            if getattr(self, name) <= 0:
                raise InputError(f"cluster.{name}={getattr(self, name)} is not above 0; use a positive number")
        if not 0 < self.utilization <= 1:
            raise InputError(f"cluster.utilization={self.utilization} is outside (0, 1]; 0.3 to 0.6 is usual")

    @property
    def host_cores(self) -> int:
        return self.cores or len(os.sched_getaffinity(0))

    @property
    def host_bytes(self) -> float:
        """RAM of one host."""
        return self.memory_gb * 1e9 or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    @property
    def cpu_flops(self) -> float:
        """FLOP/s that all cores of the cluster reach."""
        return self.hosts * self.host_cores * self.core_gflops * 1e9 * self.utilization

    @property
    def device_flops(self) -> float:
        """FLOP/s that all GPUs of the cluster reach, or its cores if it has none."""
        return self.hosts * self.gpus * self.gpu_tflops * 1e12 * self.utilization or self.cpu_flops

    @property
    def devices(self) -> int:
        """All GPUs, or the hosts if they have none."""
        return self.hosts * self.gpus or self.hosts

    @property
    def device_bytes(self) -> float:
        """Memory of one of `devices`."""
        return 1e9 * self.gpu_memory_gb if self.gpus else self.host_bytes

    @property
    def decoded_per_second(self) -> float:
        """Images that all cores of the cluster decode in a second."""
        return self.hosts * self.host_cores * self.decode_images_per_second
