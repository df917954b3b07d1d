"""The `hub:` section of a recipe."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Where checkpoints are published.

    push: publish each checkpoint as revision `step<N>` and the final model on `main`.
    repo_id: `owner/name`. private: make the repository private when it is created.
    require_push: end with a non-zero exit code when something could not be pushed.
    """

    push: bool = False
    repo_id: str | None = None
    private: bool = False
    require_push: bool = False
    license: str = "apache-2.0"
