"""Where vitq keeps what it would otherwise have to find again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """VITQ_CACHE, or vitq in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VITQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitq"
