"""One repository on the Hub, through `huggingface_hub`: make it, make its branches, commit files to them.

Every failure leaves here as a `PushFault`, which says whether to try again.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from neox_hf.checkpoint.hub.allow_list import check_contents, is_weights, secrets_of_environment
from neox_hf.checkpoint.hub.faults import Refused, as_fault

MAIN = "main"


def prepare_client(timeout: float) -> None:
    """Make `huggingface_hub` of this process fit for the background.

    Its HTTP client waits for ever unless told otherwise, so a silent server would hold an upload until the process
    ends; `timeout` is in seconds of silence in one request. Its progress bars would draw over those of training.
    The client is shared by the process, so call this before other threads use it.
    """

    def client_with_timeout() -> Any:
        client = default_client_factory()  # of httpx or httpx2, by the version of huggingface_hub
        client.timeout = timeout
        return client

    set_client_factory(client_with_timeout)
    disable_progress_bars()


class HubRepository:
    """A model repository, made when first pushed to."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.repo_id = repo_id
        self._private = private
        self._api = HfApi()
        self._made = False

    def push(self, revision: str, files: list[Path], title: str) -> None:
        """Commit `files` to the branch `revision`. Raises PushFault.

        Pushing the same files again changes nothing; other weights take the place of those that were there.
        """
        try:
            check_contents(files, [*secrets_of_environment(), _token()])
            self._make()
            if revision != MAIN:
                self._api.create_branch(self.repo_id, branch=revision, revision=self._first_commit, exist_ok=True)
            self._commit(revision, files, title)
        except Exception as error:
            raise as_fault(error) from error

    def _make(self) -> None:
        if not self._made:
            self._api.create_repo(self.repo_id, private=self._private, exist_ok=True)
            self._made = True

    @cached_property
    def _first_commit(self) -> str:
        """Branches start here, where the repository is empty, so that each holds one checkpoint and nothing else."""
        return self._api.list_repo_commits(self.repo_id, revision=MAIN)[-1].commit_id

    def _commit(self, revision: str, files: list[Path], title: str) -> None:
        additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
        for addition in additions:
            # One by one: for several files the client would start threads that keep a process from ending.
            self._api.preupload_lfs_files(self.repo_id, [addition], revision=revision, free_memory=False)
        names = {path.name for path in files}
        present = self._api.list_repo_files(self.repo_id, revision=revision)
        ours = [name for name in present if "/" not in name]  # nothing goes into folders: those are somebody else's
        stale = [CommitOperationDelete(name) for name in ours if is_weights(name) and name not in names]
        self._api.create_commit(self.repo_id, [*additions, *stale], commit_message=title, revision=revision)


def _token() -> str:
    if is_offline_mode():
        raise Refused("offline mode is on (HF_HUB_OFFLINE)")
    if (token := get_token()) is None:
        raise Refused("there is no access token: set HF_TOKEN, or log in with `hf auth login`")
    return token
