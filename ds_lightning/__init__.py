"""Divide-and-Shuffle Synchronization (DS-Sync, arXiv 2007.03298) for PyTorch Lightning.

Importing this package registers the strategies ``dssync``, ``dssync_spawn``, ``dssync_fork`` and ``dssync_notebook``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from ds_lightning.callbacks import ConsensusMonitor as ConsensusMonitor
from ds_lightning.checkpoint import AtomicCheckpointIO as AtomicCheckpointIO
from ds_lightning.checkpoint import BackgroundCheckpointIO as BackgroundCheckpointIO
from ds_lightning.groups import ScheduledGroups as ScheduledGroups
from ds_lightning.planner import plan as plan
from ds_lightning.schedule import CyclicSchedule as CyclicSchedule
from ds_lightning.schedule import GridSchedule as GridSchedule
from ds_lightning.schedule import Schedule as Schedule
from ds_lightning.schedule import ShuffleSchedule as ShuffleSchedule
from ds_lightning.schedule import consensus_rate as consensus_rate
from ds_lightning.schedule import mixing_matrix as mixing_matrix
from ds_lightning.strategy import DSSyncStrategy as DSSyncStrategy
from ds_lightning.swa import ExtendedSWA as ExtendedSWA
from ds_lightning.synchronizer import DSSynchronizer as DSSynchronizer
from ds_lightning.topology import Link as Link
from ds_lightning.topology import Topology as Topology

DSSyncStrategy.register_strategies(StrategyRegistry)
