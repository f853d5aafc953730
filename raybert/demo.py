"""`raybert demo`: all of it, offline, on a generated task with a real pretrained encoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from raybert.config import Recipe, UserError, recipe_from
from raybert.plan import demo_encoder
from raybert.report import summary_table, write_report
from raybert.results import read_run
from raybert.run import compress, finetune

TEACHER_TRAINING = {"epochs": 2, "lr": 1e-4, "batch_size": 32}
TRAINING = {"lr": 1e-4, "batch_size": 32}

THESEUS = {"name": "theseus", "initialise": "spaced", "epochs": 3}
LOBERT = {"name": "lobert", "share": 0.5, "data_aware": True, "epochs": 1}
Q8BERT = {"name": "q8bert", "lr": 2e-5, "epochs": 0.5}
TAUGHT = {"alpha": 0.5, "hidden": 10.0}

CHAINS: dict[str, dict] = {
    "theseus": {"method": [THESEUS], "kd": TAUGHT},
    "lobert": {"method": [LOBERT], "kd": TAUGHT},
    "q8bert": {"method": [Q8BERT], "kd": {"alpha": 0.5, "cls": 10.0}},
    "theseus-lobert-q8bert": {"method": [THESEUS, LOBERT, Q8BERT], "kd": TAUGHT},
}
"""What the demo compresses with: folder name -> recipe keys. Each new method adds its line."""


def demo_recipes(out: Path, workers: int) -> tuple[Recipe, list[Recipe]]:
    """The teacher's recipe, and one for each chain of methods."""
    shared = {"task": "demo", "workers": workers, "data": {"max_length": 64}}
    student = {"train": TRAINING, "export": "onnx", "measure": {"seconds": 0.5}}
    model = demo_encoder()
    teacher = recipe_from(
        {**shared, "model": model, "train": TEACHER_TRAINING, "out": str(out / "teacher")}
    )
    students = [
        recipe_from(
            {**shared, **student, **chain, "teacher": str(out / "teacher"), "out": str(out / name)}
        )
        for name, chain in CHAINS.items()
    ]
    return teacher, students


def run_demo(out: Path, workers: int | None, tell: Callable[[str], None]) -> Path:
    """Fine-tune a teacher, compress it in every way there is, and write one report.

    Args:
        out: folder for the runs and the report; an interrupted demo continues there.
        workers: training processes; nothing: 2, or 1 where there is one core.
        tell: gets progress, the table at the end and where the report is.

    Returns:
        The report's HTML page.

    Raises:
        UserError: the demo extra is not installed, or the folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "teacher" / "recipe.yaml").is_file():
        raise UserError(
            f"{out} exists and is no demo folder; nothing in it is touched. Choose --out."
        )
    workers = workers or min(2, os.cpu_count() or 1)
    teacher, students = demo_recipes(out, workers)
    tell("1. fine-tuning the teacher")
    runs = [finetune(teacher, tell=tell)]
    for number, student in enumerate(students, start=2):
        tell(f"{number}. compressing: {' + '.join(m.name for m in student.method)}")
        runs.append(compress(student, tell=tell))
    write_report(runs, out)
    tell("")
    tell(summary_table([read_run(run) for run in runs]))
    tell(f"report  {out / 'report.html'}")
    return out / "report.html"
