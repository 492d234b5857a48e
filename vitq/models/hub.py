"""Whether the Hugging Face hub, or another host, answers: asked first, since the hub's own client tries again for minutes. And files from there."""

from __future__ import annotations

import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 5.0


class Unavailable(Exception):
    """Why something cannot be had from the network."""


def probe(url: str) -> None:
    """Raises Unavailable unless `url` answers within TIMEOUT_S.

    In a thread, for looking a host name up is outside any socket's timeout and can take half a minute.
    """
    outcome: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "vitq"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                outcome.append("")
        except urllib.error.HTTPError as e:
            outcome.append(f"{url} answers {e.code} {e.reason}")
        except (OSError, ValueError) as e:
            outcome.append(f"{urllib.parse.urlparse(url).netloc} cannot be reached: {getattr(e, 'reason', e)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    reason = outcome[0] if outcome else f"no answer from {url} in {TIMEOUT_S:.0f} s"
    if reason:
        raise Unavailable(reason)


def unreachable() -> str | None:
    """Why the Hugging Face hub cannot be asked, None where it can."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        probe(huggingface_hub.constants.ENDPOINT)
    except Unavailable as error:
        return str(error)
    return None


def snapshot(name: str, patterns: Sequence[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A folder with the files of the repository `name`, USER/REPOSITORY, whose names match a pattern: downloaded, or those of the hub's cache where
    it does not answer.

    Raises FileNotFoundError where the hub knows no such repository or revision, ConnectionError where neither the hub nor its cache gives it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    options = {"allow_patterns": list(patterns), "revision": revision, "token": token}
    reason = unreachable()
    if reason is None:
        try:
            return Path(snapshot_download(name, etag_timeout=TIMEOUT_S, **options))
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(f"{name} is neither a folder nor a repository on the hub that can be read: {error}") from error
        except Exception as error:  # the hub's client lets its HTTP library's errors through, and that library changes
            raise ConnectionError(f"downloading {name} failed: {error}") from error
    try:
        return Path(snapshot_download(name, local_files_only=True, **options))
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{name} is neither a folder nor in the hub's cache, and the hub cannot give it: {reason}") from error
