"""The plan of a recipe: memory of every stage, and the speed."""

from dataclasses import dataclass

from neox_hf.planning.devices import Device
from neox_hf.planning.job import Job
from neox_hf.planning.memory import RankMemory, memory_of_stages
from neox_hf.planning.throughput import Step, step_of
from neox_hf.training.recipe import Recipe

PARTS_SHOWN = 5

TIGHT = 0.9
"""Share of a device beyond which the allocator may find no room in one piece."""


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on `world_size` of `device`. memory: of a rank of each stage."""

    device: Device
    world_size: int
    memory: tuple[RankMemory, ...]
    step: Step

    @property
    def fullest(self) -> RankMemory:
        """Of the stage whose ranks hold most."""
        return max(self.memory, key=lambda memory: memory.peak)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's tensors fit into a device."""
        return self.fullest.peak <= self.device.gib

    @property
    def fits_well(self) -> bool:
        """Whether they do with the room that the allocator needs."""
        return self.fullest.peak <= TIGHT * self.device.gib

    def lines(self) -> dict[str, str]:
        """The plan in words, by name."""
        return {
            f"on {self.device.name}": self._memory_in_words(),
            "speed": self._speed_in_words() if self.fits else "-",
        }

    def _memory_in_words(self) -> str:
        rank = self.fullest
        stage = f" of stage {self.memory.index(rank)}" if len(self.memory) > 1 else ""
        kept = {
            "weights": rank.weights,
            "gradients": rank.gradients,
            "optimizer": rank.optimizer,
            "activations": rank.activations + rank.layer + rank.loss,
            "messages": rank.messages,
        }
        parts = ", ".join(f"{name} {gib:.3g}" for name, gib in kept.items() if gib)
        tight = "; that is tight" if not self.fits_well else ""
        verdict = tight if self.fits else "; it does not fit"
        return f"{rank.peak:.3g} of {self.device.gib:.4g} GiB at the peak of a rank{stage}{verdict} ({parts})"

    def _speed_in_words(self) -> str:
        step = self.step
        dearest = sorted(step.parts.items(), key=lambda part: -part[1])[:PARTS_SHOWN]
        shares = ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in dearest if seconds)
        return (
            f"about {step.tokens_per_second:,.0f} tokens/s, {step.tflops_per_device:.0f} TFLOP/s a device, "
            f"{step.seconds:.3g} s a step ({shares})"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.lines().items())


def plan(recipe: Recipe, world_size: int, device: Device) -> Plan:
    """Memory and speed of `recipe` on `world_size` of `device`, which need not be there.

    Raises:
        RecipeError: the recipe alone does not decide the model's sizes.
        TopologyError: it does not fit that world.
    """
    return plan_job(Job.of(recipe, world_size), device)


def plan_job(job: Job, device: Device) -> Plan:
    """`plan` of what was read from a recipe already, or changed since."""
    return Plan(device, job.topology.world_size, tuple(memory_of_stages(job)), step_of(job, device))
