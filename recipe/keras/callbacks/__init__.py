"""Callbacks for distributed training with Keras: the recipe's own, and those by Horovod's names."""

from recipe.keras.callbacks.backup import BackupAndRestore
from recipe.keras.callbacks.compatible import (
    BestModelCheckpoint,
    BroadcastGlobalVariablesCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)
from recipe.keras.callbacks.metrics import MetricSums
from recipe.keras.callbacks.rates import GradualWarmup, ScheduledRate, StepDecay, rate_of, set_rate
from recipe.keras.callbacks.replicas import BroadcastState, ReplicaCheck

__all__ = [
    "BackupAndRestore",
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
]
