"""Every configuration dataclass, its types, defaults and rules.

The YAML under ``configs/`` says only what differs from the defaults here. A broken rule raises `UserError`, whose text
names the key, its value, the rule and the fix; the command prints it as one line on stderr and ends with exit code 2.
Field names are Hugging Face's wherever Hugging Face has one.
"""

from moe.config.adapter import AdapterConfig
from moe.config.analyze import AnalyzeConfig, AnalyzeSettings
from moe.config.chat import ChatConfig
from moe.config.choices import (
    AdapterKind,
    AnswerMetric,
    AttentionBackend,
    BiasUpdate,
    DeviceKind,
    DropPolicy,
    EngineKind,
    ExpertBackend,
    ExportDtype,
    ExportFormat,
    Initializer,
    LongRows,
    LossOn,
    Mlp,
    OptimizerKind,
    Packing,
    Precision,
    Pruner,
    QkNorm,
    Recompute,
    RecordKind,
    Sampler,
    Schedule,
    ScoringFunction,
    SourceFormat,
    TemplateName,
    TokenizerKind,
    TrackingBackend,
)
from moe.config.data import DataConfig, SourceConfig, TokenizerConfig
from moe.config.evaluate import EvaluateConfig
from moe.config.generate import GenerateConfig
from moe.config.interop import ExportConfig, ImportConfig
from moe.config.model import ExpertsConfig, ModelConfig
from moe.config.optim import OptimConfig
from moe.config.plan import HardwareConfig, PlanConfig, PlanSettings
from moe.config.prepare import PrepareConfig
from moe.config.router import RouterConfig
from moe.config.router_kinds import (
    ExpertChoiceRouterConfig,
    GroupLimitedRouterConfig,
    GumbelRouterConfig,
    NoisyTopKRouterConfig,
    TokenChoiceConfig,
    TopKRouterConfig,
)
from moe.config.run import Config
from moe.config.sweep import SweepConfig, SweepSettings
from moe.config.train import (
    AlarmConfig,
    CheckpointConfig,
    GuardConfig,
    ParallelConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.config.upcycle import UpcycleConfig
from moe.config.validate import ValidateConfig

__all__ = [
    "AdapterConfig",
    "AdapterKind",
    "AlarmConfig",
    "AnalyzeConfig",
    "AnalyzeSettings",
    "AnswerMetric",
    "AttentionBackend",
    "BiasUpdate",
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeviceKind",
    "DropPolicy",
    "EngineKind",
    "EvaluateConfig",
    "ExpertBackend",
    "ExpertChoiceRouterConfig",
    "ExpertsConfig",
    "ExportConfig",
    "ExportDtype",
    "ExportFormat",
    "GenerateConfig",
    "GroupLimitedRouterConfig",
    "GuardConfig",
    "GumbelRouterConfig",
    "HardwareConfig",
    "ImportConfig",
    "Initializer",
    "LongRows",
    "LossOn",
    "Mlp",
    "ModelConfig",
    "NoisyTopKRouterConfig",
    "OptimConfig",
    "OptimizerKind",
    "Packing",
    "ParallelConfig",
    "PlanConfig",
    "PlanSettings",
    "Precision",
    "PrepareConfig",
    "Pruner",
    "QkNorm",
    "Recompute",
    "RecordKind",
    "RouterConfig",
    "Sampler",
    "Schedule",
    "ScoringFunction",
    "SourceConfig",
    "SourceFormat",
    "SweepConfig",
    "SweepSettings",
    "TemplateName",
    "TokenChoiceConfig",
    "TokenizerConfig",
    "TokenizerKind",
    "TopKRouterConfig",
    "TrackingBackend",
    "TrackingConfig",
    "TrainConfig",
    "UpcycleConfig",
    "ValidateConfig",
]
