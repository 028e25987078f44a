"""A Hugging Face hub as a model sees it that is read from there: whatever is asked is asked of one commit.

What a commit holds never changes, so its listings can be remembered, and files that are read one after another
belong together even if the repository changes meanwhile.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from huggingface_hub import HfApi, HfFileSystem, constants


class PinnedHub(HfFileSystem):
    """The hub, where a branch or a tag stays what it was when it was first asked for.

    It takes no notice of later commits, so it is to be made anew for each model, with `skip_instance_cache`;
    what it remembers goes with it. Making it asks nothing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._commits: dict[tuple[str, str, str], str] = {}
        self._pinning = threading.Lock()

    def resolve_path(self, path: str, revision: str | None = None) -> Any:
        """What a path means; the library asks the hub for nothing that it did not look up here."""
        resolved: Any = super().resolve_path(path, revision)
        if hasattr(resolved, "repo_id"):  # buckets have no commits
            # Only what is asked for: the names of files keep the revision as it was written.
            resolved.revision = self._commit(resolved.repo_type, resolved.repo_id, resolved.revision)
        return resolved

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget what is not there, and what was heard from elsewhere than a commit."""
        if path:
            with suppress(FileNotFoundError):
                self.resolve_path(path)
        if not self._commits:
            super().invalidate_cache(path)

    def as_written(self, text: str) -> str:
        """A message without commits that the user did not write; some versions of the library put them in names."""
        for (_, _, revision), commit in list(self._commits.items()):
            text = text if revision == commit else text.replace(f"@{commit}", "")
        return text

    def _commit(self, repo_type: str, repo_id: str, revision: str) -> str:
        key = (repo_type, repo_id, revision)
        with self._pinning:
            if key not in self._commits:
                api = HfApi(endpoint=self.endpoint, token=self.token)
                timeout = constants.HF_HUB_ETAG_TIMEOUT
                info = api.repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=timeout)
                if info.sha is None:
                    return revision
                self._commits[key] = info.sha
            return self._commits[key]
