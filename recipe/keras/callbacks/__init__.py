"""Callbacks for distributed training with Keras: the recipe's own, and those that go by Horovod's names."""

from recipe.keras.callbacks.compatible import (
    BestModelCheckpoint,
    BroadcastGlobalVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)
from recipe.keras.callbacks.own import (
    BroadcastState,
    GradualWarmup,
    MetricSums,
    ReplicaCheck,
    ScheduledRate,
    StepDecay,
    rate_of,
    set_rate,
    sum_metrics,
)

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "BroadcastState",
    "GradualWarmup",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "MetricSums",
    "ReplicaCheck",
    "ScheduledRate",
    "StepDecay",
    "rate_of",
    "set_rate",
    "sum_metrics",
]
