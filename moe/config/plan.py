"""`moe plan`: a training run, the hardware to plan it for, and the output format."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.choices import DeviceKind
from moe.config.rules import MISSING, filled, not_negative, positive, require
from moe.config.run import Config

MAX_RANKS = 2**17


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """`nodes` nodes of `gpus_per_node` ranks (on a CPU: processes). `host_memory_gb` is per node, the rest per rank.

    GB is 10⁹ bytes. `memory_gb` is the vendor's figure; `reserved_gb` of it is in use before the first tensor (CUDA
    context, NCCL's and cuBLAS's buffers; on a CPU Python and PyTorch). `peak_tflops` is the dense bfloat16 rate,
    `peak_tflops_float32` the float32 rate without tensor cores. Link rates are what one rank can send while all send.
    `link_efficiency`, the share of them that collectives reach, and `exchange_latency_us`, what an all-to-all takes
    beyond its bytes, are assumptions for the slow end of a plan's range of times.
    """

    name: str
    device: DeviceKind = DeviceKind.cuda
    nodes: int = 1
    gpus_per_node: int
    memory_gb: float
    reserved_gb: float = 3.0
    host_memory_gb: float
    peak_tflops: float
    peak_tflops_float32: float
    memory_bandwidth_gbytes_per_s: float
    intra_node_gbytes_per_s: float
    inter_node_gbytes_per_s: float
    link_efficiency: float = 0.6
    exchange_latency_us: float = 50.0

    def __post_init__(self) -> None:
        filled("hardware", self, "name")
        positive("hardware", self, "nodes", "gpus_per_node", "memory_gb", "host_memory_gb", "peak_tflops")
        positive("hardware", self, "peak_tflops_float32", "memory_bandwidth_gbytes_per_s")
        positive("hardware", self, "intra_node_gbytes_per_s", "inter_node_gbytes_per_s")
        positive("hardware", self, "link_efficiency")
        not_negative("hardware", self, "reserved_gb", "exchange_latency_us")
        require(self.link_efficiency <= 1, f"hardware.link_efficiency={self.link_efficiency} must be ≤ 1")
        require(
            self.world_size <= MAX_RANKS,
            f"hardware.nodes={self.nodes} × hardware.gpus_per_node={self.gpus_per_node} must be ≤ {MAX_RANKS} ranks",
        )
        require(
            self.reserved_gb < self.memory_gb,
            f"hardware.reserved_gb={self.reserved_gb} must be < hardware.memory_gb={self.memory_gb}",
        )

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(kw_only=True, slots=True)
class PlanSettings:
    """`imbalance`: rows on the rank of an expert group that gets most, divided by the mean. `json`: print one JSON
    object instead of the table."""

    imbalance: float = 1.5
    json: bool = False

    def __post_init__(self) -> None:
        require(
            self.imbalance >= 1,
            f"plan.imbalance={self.imbalance} must be ≥ 1: rows of the fullest expert rank over the mean",
        )
        positive("plan", self, "imbalance")


@dataclass(kw_only=True, slots=True)
class PlanConfig(Config):
    """Every key of `moe train`, and the hardware. `check_world` is called by the plan, which knows the world size."""

    hardware: HardwareConfig = MISSING  # a preset sets it: configs/plan.yaml names the default one
    plan: PlanSettings = field(default_factory=PlanSettings)

    def __post_init__(self) -> None:
        Config.__post_init__(self)  # slots=True creates a new class, in which a bare super() fails
        require(
            self.hardware.device is DeviceKind.cuda or not self.parallel.offload_optimizer,
            "parallel.offload_optimizer=true must be false on hardware.device=cpu: the optimizer is in the host's "
            "memory anyway",
        )

    @property
    def starts(self) -> bool:
        return False
