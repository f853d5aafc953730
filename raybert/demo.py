"""`raybert demo`: all of it, offline, on a generated task with a real pretrained encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raybert.compare import Comparison, compare
from raybert.plan import demo_encoder
from raybert.recipe_file import recipe_from
from raybert.search import tune
from raybert.search_results import Answer

TEACHER_TRAINING = {"epochs": 1.5, "lr": 1e-4, "batch_size": 32}
TRAINING = {"lr": 1e-4, "batch_size": 32}

THESEUS = {"name": "theseus", "initialise": "spaced", "epochs": 2}
LOBERT = {"name": "lobert", "share": 0.5, "data_aware": True, "epochs": 0.4}
# Of 8 bits, sums of two products are cut off by processors without VNNI instructions.
Q8BERT = {"name": "q8bert", "lr": 2e-5, "epochs": 0.25, "weight_bits": 7, "per_channel": True}
EBERT = {"name": "ebert", "target_flops_ratio": 0.5, "epochs": 0.7}
MA_BERT = {"name": "ma_bert", "epochs": 0.3, "fit_steps": 80, "layer_steps": 30}
TAUGHT = {"alpha": 0.5, "cls": 10.0}  # what can be saved: the teacher runs once for all of them

CHAINS = ([THESEUS], [LOBERT], [EBERT], [MA_BERT], [Q8BERT], [THESEUS, LOBERT, Q8BERT])
"""What the demo compresses with; a run's folder is called after its methods."""

LENGTH = 64
"""Tokens a row has at most, and that models are timed at."""

SEARCH = {"trials": 6, "scheduler": "asha", "loss": "5%", "finalists": 2, "seeds": 2}
"""How `raybert demo --tune` searches: `raybert.search.Settings`."""

SEARCH_STEPS = 20
"""Steps between its trials' evaluations, at which bad ones are stopped."""


def demo_comparison(out: Path, workers: int) -> Comparison:
    """The teacher's recipe, and one for each chain of methods."""
    place = str(out / "teacher")
    shared = {"task": "demo", "workers": workers, "data": {"max_length": LENGTH}}
    shared |= {"measure": {"length": LENGTH, "seconds": 0.5}}
    student = {"teacher": place, "train": TRAINING, "kd": TAUGHT, "export": "onnx"}
    model = demo_encoder()
    teacher = recipe_from({**shared, "model": model, "train": TEACHER_TRAINING, "out": place})
    students = []
    for chain in CHAINS:
        folder = out / "-".join(method["name"] for method in chain)
        keys = {**shared, **student, "method": chain, "out": str(folder)}
        if MA_BERT in chain:
            keys["train"] = {**TRAINING, "dropout": 0}
        students.append(recipe_from(keys))
    return Comparison(out, teacher, tuple(students))


def run_demo(out: Path, workers: int, tell: Callable[[str], None]) -> Path:
    """Fine-tune a teacher, compress it in every way there is, and write one report.

    Args:
        out: folder for the runs and the report; an interrupted demo continues there.
        workers: training processes; with one, on all cores, no time goes into starting Ray.
        tell: gets progress, the table at the end and where the report is.

    Returns:
        The report's HTML page.

    Raises:
        UserError: the demo extra is not installed, or the folder holds something else.
    """
    return compare(demo_comparison(out, workers), tell=tell)


def tune_demo(out: Path, workers: int, tell: Callable[[str], None]) -> Answer:
    """Search LoBERT's parameters on the demo task: a handful of short trials, early stopping, and
    two finalists with two seeds.

    Args:
        out: the search folder; an interrupted search continues there.
        workers: of each trial.
        tell: gets progress.

    Returns:
        The answer; its page is ``report.html`` in the folder.

    Raises:
        UserError: the demo extra is not installed, or the folder holds something else.
    """
    data = {"max_length": LENGTH}
    recipe = recipe_from(
        {
            "task": "demo",
            "workers": workers,
            "model": demo_encoder(),
            "data": data,
            "method": [{"name": "lobert"}],
            "finetune": TEACHER_TRAINING,
            "train": {**TRAINING, "epochs": 1, "eval_every": SEARCH_STEPS},
            "measure": {"seconds": 0.5},
            "out": str(out),
        }
    )
    return tune(recipe, "lobert", tell=tell, **SEARCH)
