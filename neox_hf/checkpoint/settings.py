"""The `hub:` section of a recipe."""

import re
from dataclasses import dataclass

from neox_hf.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Where checkpoints are published, and how patiently.

    push: publish each checkpoint as revision `step<N>` and the final model on `main`.
    repo_id: `owner/name`. private: make the repository private when it is created.
    require_push: end with a non-zero exit code when something could not be pushed.
    license: of the model card. timeout: seconds for which the Hub may stay silent before a request is given up.
    attempts: tries at one revision before it is set aside. retry_wait: seconds before the second try; doubles up to 60.
    wait_at_end: seconds that the end of a run waits for uploads; what remains is pushed later by one command.
    """

    push: bool = False
    repo_id: str | None = None
    private: bool = False
    require_push: bool = False
    license: str = "apache-2.0"
    timeout: float = 120.0
    attempts: int = 6
    retry_wait: float = 2.0
    wait_at_end: float = 600.0

    def __post_init__(self) -> None:
        if self.push and self.repo_id is None:
            raise RecipeError("hub.push is true but hub.repo_id is missing; set hub.repo_id=owner/name")
        if self.repo_id is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo_id):
            raise RecipeError(f"hub.repo_id={self.repo_id!r} is not of the form owner/name; an example: me/pythia-160m")
        if self.timeout <= 0:
            raise RecipeError(f"hub.timeout={self.timeout} must be a positive number of seconds")
        if self.attempts < 1:
            raise RecipeError(f"hub.attempts={self.attempts} must be at least 1")
        for name in ("retry_wait", "wait_at_end"):
            if getattr(self, name) < 0:
                raise RecipeError(f"hub.{name}={getattr(self, name)} must be a number of seconds of at least 0")
