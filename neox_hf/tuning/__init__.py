"""Which launch of each kernel, and which algorithm of each product, is the quickest on this device, for the shapes of a
recipe: `python -m neox_hf.tune`.

Runs use what is found by `kernels/launch_choice.py` and `kernels/product_choice.py`; nothing here is imported by a run.
"""

from neox_hf.tuning.device_clock import DeviceClock
from neox_hf.tuning.layer_work import layer_work
from neox_hf.tuning.product_work import compute_products
from neox_hf.tuning.report import product_table, table
from neox_hf.tuning.search import Outcome, Tuning, search
from neox_hf.tuning.sizes import Sizes
from neox_hf.tuning.step_work import step_work
from neox_hf.tuning.work import Work

__all__ = [
    "DeviceClock",
    "Outcome",
    "Sizes",
    "Tuning",
    "Work",
    "compute_products",
    "layer_work",
    "product_table",
    "search",
    "step_work",
    "table",
]
