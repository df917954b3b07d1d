"""Memory and throughput of a recipe, before it runs: computed from its sizes, on a laptop."""

from neox_hf.planning.devices import DEVICES, Device, device_called
from neox_hf.planning.job import Job
from neox_hf.planning.memory import RankMemory, memory_of_stages
from neox_hf.planning.plan import Plan, plan, plan_job
from neox_hf.planning.report import plan_report
from neox_hf.planning.throughput import Step, step_of

__all__ = [
    "DEVICES",
    "Device",
    "Job",
    "Plan",
    "RankMemory",
    "Step",
    "device_called",
    "memory_of_stages",
    "plan",
    "plan_job",
    "plan_report",
    "step_of",
]
