"""The lines that `--dry-run` prints of memory and speed."""

from neox_hf.errors import RecipeError
from neox_hf.planning.devices import H200, Device
from neox_hf.planning.plan import plan
from neox_hf.training.dry_run import NAMES_WIDTH, planned_world_size
from neox_hf.training.recipe import Recipe


def plan_report(recipe: Recipe, device: Device = H200) -> str:
    """Memory and speed of the world that was launched, or of the smallest that fits, as comments of YAML.

    Where the recipe alone does not decide the model's sizes, the line says so.

    Raises:
        TopologyError: the recipe does not fit the world this process was launched in.
    """
    try:
        lines = plan(recipe, planned_world_size(recipe), device).lines()
    except RecipeError as error:
        lines = {f"on {device.name}": str(error)}
    return "\n".join(f"# {name + ':':<{NAMES_WIDTH}}{text}" for name, text in lines.items())
