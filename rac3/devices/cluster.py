"""GPUs by their data sheets, and the cluster and the amount of data that `rac3 plan` assumes."""

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rac3.config import InputError

GPUName = Literal["A100-40GB", "A100", "H100", "H200", "B200"]


class GPU(NamedTuple):
    """What its data sheet says: memory (GB), peak of dense bfloat16 (TFLOP/s), NVLink in one direction (GB/s)."""

    memory_gb: float
    tflops: float
    link_gb_per_second: float


GPUS: dict[GPUName, GPU] = {
    "A100-40GB": GPU(40, 312, 300),
    "A100": GPU(80, 312, 300),
    "H100": GPU(80, 989, 450),
    "H200": GPU(141, 989, 450),
    "B200": GPU(180, 2250, 900),
}
"""All of the SXM form."""


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
      gpu: which GPU; the next three are of it where they are 0.
      gpu_memory_gb: memory per GPU.
      gpu_tflops: peak TFLOP/s per GPU, dense bfloat16.
      link_gb_per_second: of each GPU to those of its host, in one direction.
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
    gpu: GPUName = "A100"
    gpu_memory_gb: float = 0.0
    gpu_tflops: float = 0.0
    link_gb_per_second: float = 0.0
    network_gb_per_second: float = 25.0
    core_gflops: float = 50.0
    decode_images_per_second: float = 200.0
    utilization: float = 0.4

    def __post_init__(self) -> None:
        of_gpu = "gpu_memory_gb", "gpu_tflops", "link_gb_per_second"
        for name in ("documents", "memory_documents", "cores", "memory_gb", "gpus", *of_gpu):
            if getattr(self, name) < 0:
                raise InputError(f"cluster.{name}={getattr(self, name)} is negative; use 0 or more")
        for name in ("hosts", "network_gb_per_second", "core_gflops", "decode_images_per_second"):
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
    def gpu_bytes(self) -> float:
        """Memory of one GPU."""
        return 1e9 * (self.gpu_memory_gb or GPUS[self.gpu].memory_gb)

    @property
    def gpu_flops(self) -> float:
        """The peak of one GPU, FLOP/s."""
        return 1e12 * (self.gpu_tflops or GPUS[self.gpu].tflops)

    @property
    def link_bytes_per_second(self) -> float:
        """Of one GPU to those of its host, in one direction."""
        return 1e9 * (self.link_gb_per_second or GPUS[self.gpu].link_gb_per_second)

    @property
    def device_flops(self) -> float:
        """FLOP/s that all GPUs of the cluster reach, or its cores if it has none."""
        return self.hosts * self.gpus * self.gpu_flops * self.utilization or self.cpu_flops

    @property
    def devices(self) -> int:
        """All GPUs, or the hosts if they have none."""
        return self.hosts * self.gpus or self.hosts

    @property
    def device_bytes(self) -> float:
        """Memory of one of `devices`."""
        return self.gpu_bytes if self.gpus else self.host_bytes

    @property
    def decoded_per_second(self) -> float:
        """Images that all cores of the cluster decode in a second."""
        return self.hosts * self.host_cores * self.decode_images_per_second
