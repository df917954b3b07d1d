"""Which launch of each kernel is the quickest on this device, for the shapes of a recipe: `python -m neox_hf.tune`.

Runs use what is found by `kernels/launch_choice.py`; nothing here is imported by a run.
"""

from neox_hf.tuning.device_clock import DeviceClock
from neox_hf.tuning.layer_work import layer_work
from neox_hf.tuning.report import table
from neox_hf.tuning.search import Outcome, Tuning, search
from neox_hf.tuning.sizes import Sizes
from neox_hf.tuning.step_work import step_work
from neox_hf.tuning.work import Work

__all__ = ["DeviceClock", "Outcome", "Sizes", "Tuning", "Work", "layer_work", "search", "step_work", "table"]
