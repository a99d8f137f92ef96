"""From a configuration to the parts of a run: policy, task, rewards, and the run as a whole."""

from pertoken.assembly.policy import build_controls, build_engine, build_optimizer, build_policy, refuse_segments
from pertoken.assembly.rewards import build_rewards
from pertoken.assembly.run import build_evaluator, build_kl, build_run, build_turns
from pertoken.assembly.task import build_task, fitting

__all__ = [
    "build_controls",
    "build_engine",
    "build_evaluator",
    "build_kl",
    "build_optimizer",
    "build_policy",
    "build_rewards",
    "build_run",
    "build_task",
    "build_turns",
    "fitting",
    "refuse_segments",
]
