"""A run's memory, FLOPs, traffic and time, computed from its configuration before anything is launched."""

from moe.plan.counts import ParameterParts, count_parameters, parameter_parts, visible_keys
from moe.plan.flops import flops_per_token
from moe.plan.memory import MemoryPlan, estimate_memory, plan_memory
from moe.plan.run import Plan, make_plan
from moe.plan.traffic import ExchangeBytes, Flow, exchange_bytes, plan_traffic

__all__ = [
    "ExchangeBytes",
    "Flow",
    "MemoryPlan",
    "ParameterParts",
    "Plan",
    "count_parameters",
    "estimate_memory",
    "exchange_bytes",
    "flops_per_token",
    "make_plan",
    "parameter_parts",
    "plan_memory",
    "plan_traffic",
    "visible_keys",
]
