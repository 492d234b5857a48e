"""What a tool prints."""
from __future__ import annotations

from tqdm import tqdm


class Bar(tqdm):
    """Starts over with each further reading of what it counts."""

    def update(self, n: float = 1) -> bool | None:
        if self.total and self.n + n > self.total:
            self.reset()
        return super().update(n)


class Console:
    """Where lines go: steps (not with --quiet), results (not with --json), notes (kept too), progress bars on a terminal."""

    def __init__(self, quiet: bool, json: bool):
        self.quiet, self.json = quiet or json, json
        self.notes: list[str] = []

    def step(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        if not self.json:
            print(f"note: {text}", flush=True)

    def result(self, text: str) -> None:
        if not self.json:
            print(text, flush=True)

    def bar(self, what: str, total: int | None, unit: str = "images") -> Bar:
        return Bar(desc=what, total=total, unit=f" {unit}", leave=False, disable=True if self.quiet else None)
