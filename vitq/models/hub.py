"""Whether the Hugging Face hub, or another host, answers: asked first, since the hub's own client tries again for minutes."""

from __future__ import annotations

import threading
import urllib.error
import urllib.parse
import urllib.request

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
