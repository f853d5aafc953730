"""Reports: Markdown and one self-contained HTML page, of one run or of many.

    raybert report runs/mrpc-* --out report

Runs that differ only by seed stand as one row, mean ± sample standard deviation. The page loads
nothing from anywhere: styles and plots are inside it, and it needs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raybert import __version__, tables
from raybert.card import model_card
from raybert.errors import UserError
from raybert.folders import write_whole
from raybert.groups import Group, Spread, clock_note, counted_at, group_runs, on_front
from raybert.pages import render
from raybert.results import (
    RETAINED,
    Run,
    RunReport,
    build,
    read_metrics,
    read_runs,
    retained,
    validated,
)
from raybert.storage import pull, push
from raybert.views import speed_at, task_views

__all__ = [
    "RunReport",
    "build",
    "check_out",
    "model_card",
    "read_runs",
    "retained",
    "summary_table",
    "write_report",
    "write_run_report",
]


SIGNATURE = "Written by raybert"
"""What the last line of a report in Markdown begins with."""


def write_run_report(folder: Path, report: RunReport | Mapping[str, Any]) -> RunReport:
    """Write ``report.json``, ``report.md`` and ``report.html``, each whole or not at all.

    Args:
        folder: the run folder; its ``recipe.yaml`` and ``metrics.jsonl`` are shown in the page.
        report: what ``build`` returned, or the same as a mapping.

    Raises:
        UserError: the report is not valid.
    """
    folder = Path(folder)
    if not isinstance(report, RunReport):
        report = validated(report, f"the report for {folder}")
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    run = Run(report, recipe, tuple(read_metrics(folder / "metrics.jsonl")))
    write_whole(folder / "report.md", _markdown([run], report.name))
    write_whole(folder / "report.html", _html([run], report.name))
    # Last: a run counts as finished once it is there.
    write_whole(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    for name in ("report.md", "report.html", "report.json"):
        push(folder / name)
    return report


def write_report(runs: Sequence[Run], out: Path) -> tuple[Path, Path]:
    """Write one report over several runs.

    Args:
        runs: one or more.
        out: the folder to write ``report.md`` and ``report.html`` into; or, ending in ``.md`` or
            ``.html``, the file's name, and the other is written beside it.

    Returns:
        The Markdown file and the HTML file.
    """
    files = _files(out)
    title = runs[0].report.name if len(runs) == 1 else "Compression report"
    write_whole(files[0], _markdown(runs, title))
    write_whole(files[1], _html(runs, title))
    for file in files:
        push(file)
    return files


def _files(out: Path) -> tuple[Path, Path]:
    stem = out.with_suffix("") if out.suffix in (".md", ".html") else out / "report"
    return stem.parent / f"{stem.name}.md", stem.parent / f"{stem.name}.html"


def check_out(out: Path) -> None:
    """Refuse to write over anything but a report over several runs that was written earlier.

    Args:
        out: as `write_report` takes it.

    Raises:
        UserError: there is a file that is none, or the page of a run.
    """
    files = _files(out)
    there = [file for file in files if pull(file)]
    # The Markdown is written first, and an interruption may leave it alone.
    last = files[0].read_bytes().rstrip().rpartition(b"\n")[2] if files[0] in there else b""
    runs_own = files[0].name == "report.md" and pull(files[0].with_name("recipe.yaml"))
    if there and (runs_own or not last.startswith(SIGNATURE.encode())):
        raise UserError(
            f"{there[0]} exists and is no report that `raybert report` wrote; nothing is "
            "overwritten. Choose another --out."
        )


def summary_table(runs: Sequence[Run]) -> str:
    """The runs as a plain table for the terminal; those that differ only by seed share a line."""
    groups = group_runs(runs)
    front = _front(groups) if len(groups) > 1 else []
    head = ("run", "metric", "teacher", "student", "floor", "retained", "weights", "speed-up")
    always = len(head)
    head += ("onnx", "onnx speed-up", "pareto", "")
    rows = []
    for group in groups:
        first = group.first
        own = tables.score(group.spread(lambda r: r.student.score))
        weights = Spread.of([r.student.bytes.weights for r in group.reports])
        exported = Spread.of([r.onnx.bytes for r in group.reports if r.onnx])
        goal = own if group.is_teacher else tables.score(group.teacher(lambda m: m.score))
        rows.append(
            [
                f"{first.task}: {group.label}",
                first.metric,
                goal,
                "" if group.is_teacher else own,
                tables.score(first.floor),
                "" if group.is_teacher else tables.percent(group.spread(lambda r: r.retained)),
                tables.megabytes(weights) if weights else tables.MISSING,
                "" if group.is_teacher else speed_at(group, groups, "torch"),
                tables.megabytes(exported) if exported else "",
                "" if group.is_teacher else speed_at(group, groups, "onnx"),
                "*" if group in front else "",
                group.caveat,
            ]
        )
    used = [i for i in range(len(head)) if i < always or any(row[i] for row in rows)]
    widths = [max(len(line[i]) for line in (head, *rows)) for i in used]
    lines = [
        "  ".join(
            line[i].ljust(width) if n < 2 else line[i].rjust(width)
            for n, (i, width) in enumerate(zip(used, widths, strict=True))
        ).rstrip()
        for line in (head, ["-" * width for width in _full(widths, used)], *rows)
    ]
    for task, own in _by_task(groups).items():
        note = clock_note(own)
        if len(own) > 1 and note and not counted_at(own):
            lines.append(f"{task}: {note}")
    return "\n".join(lines)


def _by_task(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.first.task, []).append(group)
    return found


def _front(groups: Sequence[Group]) -> list[Group]:
    """The groups that are on their task's Pareto front."""
    found: list[Group] = []
    for own in _by_task(groups).values():
        found += [group for group, there in zip(own, on_front(own), strict=True) if there]
    return found


def _full(widths: list[int], used: list[int]) -> list[int]:
    """The widths by column number, 0 for a column that is not shown."""
    return [dict(zip(used, widths, strict=True)).get(i, 0) for i in range(max(used) + 1)]


def _machines(runs: Sequence[Run]) -> list[tuple[dict[str, Any], list[str]]]:
    """Each distinct machine with the names of the runs that were measured on it."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    reports = [run.report for run in runs]
    measured = [(report.hardware, report.name) for report in reports]
    measured += [(r.elsewhere, f"{r.name}, times of ONNX Runtime") for r in reports if r.elsewhere]
    for hardware, name in measured:
        names = next((names for machine, names in found if machine == hardware), None)
        if names is None:
            found.append((hardware, [name]))
        else:
            names.append(name)
    return found


def _html(runs: Sequence[Run], title: str) -> str:
    return render(
        "report.html",
        title=title,
        created=max(run.report.created for run in runs),
        runs=runs,
        tasks=task_views(runs, charts=True),
        machines=_machines(runs),
        retained_note=RETAINED,
    )


def _markdown(runs: Sequence[Run], title: str) -> str:
    safe = tables.escape_markdown
    parts = [f"# {safe(title)}"]
    for view in task_views(runs, charts=False):
        parts.append(f"## {safe(view.name)}")
        rows = [
            [safe(f"{row.group.label}; {row.seeds}"), *(safe(str(cell)) for cell in row.cells)]
            for row in view.rows
        ]
        parts.append(tables.markdown_table(["Run", *map(safe, view.head)], rows))
        parts += [safe(view.note)] if view.note else []
    notes = [
        f"- {safe(r.name)}: {safe(note)}" for r in (x.report for x in runs) for note in r.notes
    ]
    if any(run.report.simulated or run.report.simulated_methods for run in runs):
        parts.append(
            "**Simulated**: a run, or a method of its chain, that is marked so saves no time in "
            "PyTorch on the machine measured on."
        )
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    parts += ["## How retained is defined", RETAINED, "## Hardware"]
    for machine, names in _machines(runs):
        shown = [f"- {safe(key)}: {safe(tables.plain(value))}" for key, value in machine.items()]
        parts.append(f"{safe(', '.join(names))}:\n\n" + "\n".join(shown))
    for run in runs:
        for phase, tables_ in run.report.facts.items():
            for title, values in tables_.items():
                told = safe(title.capitalize())
                parts.append(f"## {told} of {safe(run.report.name)}, {safe(phase)}")
                rows = [[safe(name), f"{value:.4g}"] for name, value in values.items()]
                parts.append(tables.markdown_table(["Where", told], rows))
    for run in runs:
        parts.append(f"## Recipe of {safe(run.report.name)}")
        # Indented rather than fenced: nothing in a recipe can end it.
        parts.append("\n".join(f"    {line}" for line in run.recipe.splitlines()))
    parts.append(f"{SIGNATURE} {__version__}; MB are 10^6 bytes, a multiply-add is 2 FLOPs.")
    return "\n\n".join(parts) + "\n"
