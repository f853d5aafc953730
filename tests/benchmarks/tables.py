"""The README's tables, written anew from the files in tests/benchmarks/results/.

    python tests/benchmarks/tables.py [--check]

What stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` belongs to this script.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raybert.groups import Spread
from raybert.methods import METHODS
from raybert.tables import (
    MISSING,
    count,
    duration,
    escape_markdown,
    markdown_table,
    megabytes,
    percent,
    score,
    times,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results:(\S+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
TRAINING = ("step_time", "tokens", "distillation_step", "cached_step", "memory")
TRAINING += ("lobert_factorise", "throughput", "soak")
LATENCY = ("onnx_latency", "theseus_latency", "lobert_latency", "q8bert_latency")
LATENCY += ("ebert_latency", "ma_bert_latency")
PROCESSORS = {"amx": "AMX", "vnni": "VNNI", "avx512": "AVX-512", "avx2": "AVX2", "cpu": "other"}
PROCESSORS |= {"gpu": "GPU"}
BACKENDS = {"torch": "PyTorch", "onnx": "ONNX Runtime"}
SEARCHING = ("tune_overhead_1", "tune_overhead_2", "tune_grid", "queue_of_trials")
ACCURACY = ("post_training", "lobert_data_aware")
COLUMNS = ["Task", "Method", "Metric", "Teacher", "Student", "Floor", "Retained", "Ratio"]
COLUMNS += ["Size", "FLOPs", "PyTorch 1 / 8", "ONNX 1 / 8", "Seeds", "Trained for"]
SHAPES = ("1x128", "8x128")


def spread(value: dict[str, Any] | None) -> Spread | None:
    """A mean and deviation read back."""
    return None if value is None else Spread(**value)


def load(name: str) -> dict[str, Any] | None:
    """A result file, or nothing where it has not been measured yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def machine(hardware: dict[str, Any]) -> str:
    """Where something was measured, in a few words."""
    name = hardware["gpu"] or hardware["cpu"]
    sets = f" ({', '.join(hardware['instructions'])})" if hardware["instructions"] else ""
    return (
        f"{name}{sets}, cores: {hardware['cores']}, threads: {hardware['threads']}, "
        f"{hardware['memory_gb']:.0f} GB, Python {hardware['python']}"
    )


def listed(versions: dict[str, Any]) -> str:
    """Packages and their versions."""
    return ", ".join(f"{package} {number}" for package, number in versions.items() if number)


# -- quality ---------------------------------------------------------------------------------------


def quality_row(group: dict[str, Any]) -> list[str]:
    """One chain on one task."""
    teacher, student = group["teacher"], group["student"]
    seconds = group["training_seconds"]
    caveat = group.get("caveat", "simulated" if group["simulated"] else "")  # older files lack it
    method = escape_markdown(group["label"]) + (f" ({escape_markdown(caveat)})" if caveat else "")

    def of(key: str, unit: Callable[[float], str]) -> str:
        return f"{unit(student[key]['mean'])} of {unit(teacher[key]['mean'])}"

    def faster(backend: str) -> str:
        found = [spread(group["speedup"].get(f"{backend} {shape}")) for shape in SHAPES]
        return " / ".join(times(v.mean) for v in found if v) or MISSING

    return [
        escape_markdown(group["task"]),
        method,
        escape_markdown(group["metric"]),
        score(spread(teacher["score"])),
        score(spread(student["score"])),
        score(group["floor"]),
        percent(spread(group["retained"])),
        percent(spread(group["ratio"])),
        of("bytes", megabytes),
        of("flops", count),
        faster("torch"),
        faster("onnx"),
        str(group["n"]),
        duration(seconds["mean"]) if seconds else "n/a",
    ]


def quality_table(groups: Sequence[dict[str, Any]]) -> str:
    """The students beside their teachers, one row for the seeds of a chain and task."""
    return markdown_table(COLUMNS, [quality_row(group) for group in groups if group["teacher"]])


def ordered(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks one after the other, as they were first measured; of each the methods, then chains."""
    tasks = list(dict.fromkeys(group["task"] for group in groups))

    def place(group: dict[str, Any]) -> tuple[Any, ...]:
        chain = group["chain"].split(" + ")
        methods = [list(METHODS).index(name) for name in chain if name in METHODS]
        return tasks.index(group["task"]), len(chain), methods

    return sorted(groups, key=place)


def placed(teacher: str, student: str) -> str:
    """The command of a teacher, with the folder where its student's looks for it."""
    named = re.search(r" teacher=(\S+)", student)
    if named is None or " out=" in teacher:
        return teacher
    return f"{teacher} out={named[1].removesuffix('/model')}"


def quality(name: str = "quality") -> str:
    """The table, where its numbers come from, and the commands."""
    result = load(name)
    if result is None:
        named = "" if name == "quality" else f"--name {name} "
        return f"_Not measured yet: `python tests/benchmarks/quality.py {named}RUN...`_"
    groups = ordered([group for group in result["groups"] if group["teacher"]])
    notes, commands = [], []
    for group in groups:
        for hardware in group["hardware"]:
            names = ("torch", "transformers")
            used = {"raybert": group["raybert"][0], **{name: hardware[name] for name in names}}
            notes.append(f"{group['date']}: {machine(hardware)}; {listed(used)}.")
        seeds = ", ".join(str(seed) for seed in group["seeds"])
        commands.append(f"# {group['task']}, {group['label']}, {group['encoder']}; seeds {seeds}")
        if "teacher_command" in group:
            commands.append(placed(group["teacher_command"], group["command"]))
        commands.append(group["command"])
    return "\n\n".join(
        [
            quality_table(groups),
            "Training time is the student's alone, a seed. " + " ".join(dict.fromkeys(notes)),
            "<details><summary>Commands</summary>",
            "\n".join(["```bash", *dict.fromkeys(commands), "```"]),
            "</details>",
        ]
    )


# -- benchmarks ------------------------------------------------------------------------------------


def figure_cells(figure: dict[str, Any]) -> list[str]:
    """What was measured, the number, its target and whether that is met."""
    met = {True: "yes", False: "no", None: ""}[figure["met"]]
    measured = f"{figure['measured']:g} {figure['unit']}"
    return [escape_markdown(figure["what"]), measured, figure["target"], met]


def benchmarks(names: Sequence[str]) -> str:
    """Every figure of the benchmarks beside its target, and where the numbers come from."""
    rows, notes = [], []
    for name in names:
        result = load(name)
        if result is None:
            missing = [name.replace("_", " "), "not measured yet", "", ""]
            rows.append([*missing, f"`python tests/benchmarks/{name}.py`"])
            continue
        rows += [[*figure_cells(figure), f"`{result['command']}`"] for figure in result["figures"]]
        used = f"{machine(result['hardware'])}; {listed(result['versions'])}"
        notes.append(f"{result['date']}: {used}.")
    table = markdown_table(["What", "Measured", "Target", "Met", "Command"], rows)
    return "\n\n".join([table, " ".join(dict.fromkeys(notes))]).rstrip()


# -- latency ---------------------------------------------------------------------------------------


def on_processors(name: str) -> dict[str, dict[str, Any]]:
    """A benchmark's results by the kind of processor."""
    found = {kind: load(f"{name}.{kind}") for kind in PROCESSORS}
    return {kind: result for kind, result in found.items() if result is not None}


def speedup_cell(row: dict[str, Any] | None) -> str:
    """A speed-up, and its aim."""
    if row is None:
        return ""
    aim = "" if row["aim"] is None else f" (aim {row['aim']:g})"
    return f"{times(row['speedup'])}{aim}"


def speedup_table(results: dict[str, dict[str, Any]]) -> str:
    """Models in rows; processors and shapes in columns."""
    cells = {
        (kind, row["model"], row["backend"], row["batch"], row["length"]): row
        for kind, result in results.items()
        for row in result["speedups"]
    }
    models = list(dict.fromkeys((model, backend) for _, model, backend, *_ in cells))
    shapes = list(dict.fromkeys((batch, length) for *_, batch, length in cells))
    counted = any(row["counted"] for row in cells.values())
    heads = [f"{PROCESSORS[kind]}: {b} × {t}" for kind in results for b, t in shapes]
    table = []
    for model, backend in models:
        places = [(kind, model, backend, *shape) for kind in results for shape in shapes]
        found = [cells.get(place) for place in places]
        share = next((row["counted"] for row in found if row and row["counted"]), None)
        names = [escape_markdown(model), BACKENDS[backend]]
        names += [times(share) if share else ""] * counted
        table.append([*names, *map(speedup_cell, found)])
    return markdown_table(["Model", "Runs in", *(["By FLOPs"] if counted else []), *heads], table)


def latency() -> str:
    """Every benchmark's speed-ups, one table each, then what else they measured."""
    parts, rows, notes = [], [], []
    for name in LATENCY:
        results = on_processors(name)
        command = f"`python tests/benchmarks/{name}.py`"
        if not results:
            parts.append(f"_Not measured yet: {command}_")
            continue
        title = next(iter(results.values()))["title"]
        parts += [f"**{escape_markdown(title)}** ({command})", speedup_table(results)]
        for kind, result in results.items():
            for figure in result["figures"]:
                rows.append([PROCESSORS[kind], *figure_cells(figure)])
            used = f"{machine(result['hardware'])}; {listed(result['versions'])}"
            notes.append(f"{result['date']}: {used}.")
    table = markdown_table(["Processor", "What", "Measured", "Target", "Met"], rows)
    return "\n\n".join([*parts, table, " ".join(dict.fromkeys(notes))])


# -- searches --------------------------------------------------------------------------------------


def search_row(search: dict[str, Any], key: str) -> list[str]:
    """One search's winner, or what was set by hand beside it."""
    found = search[key]
    teacher, student = found["teacher"], found["student"]
    states, mine = search["states"], key == "found"
    ended = sum(count for state, count in states.items() if state in ("finished", "stopped"))
    faster = [spread(found["speedup"].get(f"torch {shape}")) for shape in SHAPES]
    settings = "found" if search["within"] else "found (beyond the loss)"
    return [
        search["name"],
        f"{settings if mine else 'by hand'}: {escape_markdown(found['chain'])}",
        escape_markdown(found["metric"]),
        score(spread(teacher["score"])),
        score(spread(student["score"])),
        percent(spread(found["retained"])),
        f"{megabytes(student['bytes']['mean'])} of {megabytes(teacher['bytes']['mean'])}",
        f"{count(student['flops']['mean'])} of {count(teacher['flops']['mean'])}",
        " / ".join(times(v.mean) for v in faster if v) or MISSING,
        str(found["n"]),
        f"{ended} ({states.get('stopped', 0)} stopped early)" if mine else "",
        f"{search['core_hours']:.2g}" if mine else "",
    ]


def searches_table(searches: Sequence[dict[str, Any]]) -> str:
    """What searches found beside what was set by hand, two rows each."""
    head = ["Search", "Settings", "Metric", "Teacher", "Student", "Retained", "Size", "FLOPs"]
    head += ["PyTorch 1 / 8", "Seeds", "Trials", "Core-hours"]
    return markdown_table(
        head, [search_row(search, key) for search in searches for key in ("by_hand", "found")]
    )


def searches() -> str:
    """The table of searches, where its numbers come from, and the commands."""
    result = load("tune_quality")
    if result is None:
        return "_Not measured yet: `python tests/benchmarks/tune_quality.py --data glue/MRPC`_"
    notes, commands = [], []
    for search in result["searches"]:
        for group in (search["by_hand"], search["found"]):
            for hardware in group["hardware"]:
                notes.append(
                    f"{group['date']}: {machine(hardware)}; raybert {group['raybert'][0]}."
                )
        commands += [f"# {search['name']}: by hand, the search, and what it found"]
        commands += [search["by_hand"]["command"], search["command"], search["found"]["command"]]
    return "\n\n".join(
        [
            searches_table(result["searches"]),
            " ".join(dict.fromkeys(notes)),
            "<details><summary>Commands</summary>",
            "\n".join(["```bash", f"# {result['command']}", *commands, "```"]),
            "</details>",
        ]
    )


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "bits": lambda: quality("bits"),
    "modes": lambda: quality("modes"),
    "training": lambda: benchmarks(TRAINING),
    "latency": latency,
    "accuracy": lambda: benchmarks(ACCURACY),
    "searches": searches,
    "searching": lambda: benchmarks(SEARCHING),
}


def rewritten(text: str) -> str:
    """The README with every block written anew.

    Raises:
        ValueError: a block that no table is known for, or one that is not closed.
    """
    if len(re.findall(r"<!-- results:", text)) != len(BLOCK.findall(text)):
        raise ValueError("a <!-- results:NAME --> has no <!-- /results --> after it")

    def block(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table {match[2]!r}; known: {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Rewrite the README, or with ``--check`` tell whether that would change it."""
    parser = argparse.ArgumentParser(description="the README's tables from the result files")
    parser.add_argument("--check", action="store_true", help="exit 1 if they are out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    before = args.readme.read_text(encoding="utf-8")
    after = rewritten(before)
    if after == before:
        return 0
    if args.check:
        changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "README", "results")
        print("\n".join(changes))
        print("README.md is out of date; run: python tests/benchmarks/tables.py", file=sys.stderr)
        return 1
    partial = args.readme.with_name(f".partial-{args.readme.name}")
    partial.write_text(after, encoding="utf-8")
    os.replace(partial, args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
