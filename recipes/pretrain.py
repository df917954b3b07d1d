"""Pretrain a GPT-NeoX model.

accelerate launch recipes/pretrain.py --config recipes/pythia_160m.yaml train.output_dir=runs/mine
accelerate launch recipes/pretrain.py --config base.yaml mine.yaml -d configs train.learning_rate=3e-4
python recipes/pretrain.py --config recipes/neox_20b.yaml --dry-run
"""

import sys

from neox_hf.planning import plan_report
from neox_hf.training.command_line import exit_on_user_error, parse_command_line
from neox_hf.training.console import launched_rank, log_to_stderr
from neox_hf.training.dry_run import dry_run_report
from neox_hf.training.pretraining import pretrain
from neox_hf.training.recipe import load_recipe


@exit_on_user_error()
def main() -> int:
    log_to_stderr(launched_rank())
    command = parse_command_line(sys.argv[1:])
    recipe = load_recipe(command.paths, command.directory, command.overrides)
    if command.dry_run:
        print(dry_run_report(recipe))
        print(plan_report(recipe))
        return 0
    return pretrain(recipe)


if __name__ == "__main__":
    sys.exit(main())
