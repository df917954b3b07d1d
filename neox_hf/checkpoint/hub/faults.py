"""What can go wrong with a push, sorted by what to do next: try again, skip this revision, or stop."""

import json
from collections.abc import Iterator, Mapping


class PushFault(Exception):
    """A push that did not happen. The message is the reason a user reads."""


class Unreachable(PushFault):
    """The network or the server failed; the same push may work later. wait: seconds the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Rejected(PushFault):
    """These files will not go up as they are; other revisions may."""


class Refused(PushFault):
    """Nothing can be pushed until the user changes something: no token, no permission, offline mode."""


REFUSALS = {
    401: "the Hub does not accept the token (401): log in again with `hf auth login`, or set HF_TOKEN",
    402: "the Hub asks for payment (402): the account has no space left for this repository",
    403: "the token may not write to this repository (403): use a token with write access to it",
    404: "the repository was not found (404): check hub.repo_id and that the token may see it",
}

# Besides 5xx: time-out, conflicts with another commit (409, 412), too early, too many requests.
RETRIED_STATUSES = frozenset({408, 409, 412, 425, 429})


LONGEST_SUMMARY = 300  # characters


def as_fault(error: Exception) -> PushFault:
    """Sort any exception of a push. `huggingface_hub` wraps some HTTP errors, so causes are searched as well."""
    if isinstance(error, PushFault):
        return error
    response = next((e.response for e in _causes(error) if getattr(e, "response", None) is not None), None)
    summary = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_SUMMARY]}"
    if response is None:
        # Without an HTTP answer, a ValueError is the client refusing our input. Broken JSON is a server's or a proxy's.
        ours = isinstance(error, (ValueError, FileNotFoundError)) and not isinstance(error, json.JSONDecodeError)
        return Rejected(summary) if ours else Unreachable(summary)
    if response.status_code in REFUSALS:
        return Refused(REFUSALS[response.status_code])
    if response.status_code in RETRIED_STATUSES or response.status_code >= 500:
        return Unreachable(f"the Hub answered {response.status_code}", _retry_after(response.headers))
    return Rejected(f"the Hub answered {response.status_code} ({summary})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a `Retry-After` header; its other form, a date, is rare and counts as none."""
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
