"""What gpu_benchmark.py finds: tables and goals, printed and written as they come."""
from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import vitq

GOAL_HEADERS = ("goal", "found", "must", "aim")


@dataclass(frozen=True)
class Goal:
    """A figure beside what it must be and what it aims at: at least that, or at most."""

    what: str
    found: float
    must: float | None
    aim: float | None = None
    at_least: bool = True

    def cells(self) -> tuple:
        sign = "≥" if self.at_least else "≤"

        def verdict(limit: float | None) -> str | None:
            if limit is None:
                return None
            met = self.found >= limit if self.at_least else self.found <= limit
            return f"{sign} {limit:g} {'met' if met else 'MISSED'}"

        return self.what, f"{self.found:.2f}", verdict(self.must), verdict(self.aim)


class Results:
    """Tables and goals as they come: printed, and written to the files that were asked for."""

    def __init__(self, args: argparse.Namespace, machine: str):
        self.args, self.machine, self.began = args, machine, time.perf_counter()
        self.tables: list[dict] = []
        self.goals: list[Goal] = []

    def add(self, title: str, headers: tuple, rows: list[tuple], goals: list[Goal]) -> None:
        self.tables.append({"title": title, "headers": headers, "rows": rows})
        self.goals += goals
        print(f"\n{title}  [{time.perf_counter() - self.began:.0f} s]\n{vitq.report.table(headers, rows)}", flush=True)
        if goals:
            print(vitq.report.table(GOAL_HEADERS, [goal.cells() for goal in goals]), flush=True)
        self.write()

    def write(self) -> None:
        if self.args.json:
            vitq.report.write_json(self.args.json, {"machine": self.machine, "batch": self.args.batch, "tables": self.tables,
                                                    "goals": self.goals})
        if self.args.markdown:
            parts = [self.machine]
            if self.goals:
                parts += ["## Goals", vitq.report.markdown_table(GOAL_HEADERS, [goal.cells() for goal in self.goals])]
            for table in self.tables:
                parts += [f"## {table['title']}", vitq.report.markdown_table(table["headers"], table["rows"])]
            self.args.markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
