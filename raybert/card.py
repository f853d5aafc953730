"""The model card: README.md beside the weights, as the Hugging Face Hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raybert import tables
from raybert.results import RETAINED, Measured, RunReport, validated

CLASSES = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "multilabel": ("AutoModelForSequenceClassification", "text-classification"),
    "regression": ("AutoModelForSequenceClassification", "text-classification"),
    "qa": ("AutoModelForQuestionAnswering", "question-answering"),
    "mlm": ("AutoModelForMaskedLM", "fill-mask"),
}
"""A task's kind -> the auto class of its head, and the Hub's word for it."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|(distil)?(bert|roberta)-[\w.-]+")
"""owner/name, or one of the few names without an owner."""


def model_card(report: RunReport | Mapping[str, Any], recipe_yaml: str, *, plain: bool) -> str:
    """The card of a run's model.

    Args:
        report: the run's report.
        recipe_yaml: the resolved recipe, shown at the end.
        plain: whether stock transformers loads the model, without raybert.

    Raises:
        UserError: the report is not valid.
    """
    if not isinstance(report, RunReport):
        report = validated(report, "the report for the model card")
    parts = [
        _front_matter(report, plain),
        f"# {_safe(report.name)}",
        _summary(report),
        "## Results",
        _results(report),
        *([RETAINED] if report.teacher else []),
        *_speed(report),
        "## What was done",
        _methods(report),
        "## Use",
        _usage(report, plain),
        "## Measured on",
        _machine(report.hardware),
        *(["ONNX Runtime was timed on:", _machine(report.elsewhere)] if report.elsewhere else []),
        "## Notes",
        _notes(report),
        "## Recipe",
        "\n".join(f"    {line}" for line in recipe_yaml.splitlines()),
    ]
    return "\n\n".join(parts) + "\n"


def _safe(text: Any) -> str:
    return tables.escape_markdown(str(text))


def _front_matter(report: RunReport, plain: bool) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers" if plain else "raybert",
        "tags": list(dict.fromkeys(["raybert", *(m["name"] for m in report.methods), report.task])),
        "metrics": list(report.student.metrics),
    }
    if report.kind in CLASSES:
        data["pipeline_tag"] = CLASSES[report.kind][1]
    # A local folder's name would be a dead link on the Hub.
    if HUB_NAME.fullmatch(report.model) and not Path(report.model).exists():
        data["base_model"] = report.model
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _summary(report: RunReport) -> str:
    if not report.methods:
        done = "distilled" if report.teacher else "fine-tuned"
        return f"{_safe(report.model)}, {done} on {_safe(report.task)} with raybert."
    text = (
        f"{_safe(report.model)}, fine-tuned on {_safe(report.task)} and compressed with raybert: "
        f"{_safe(report.chain)}."
    )
    if report.simulated:
        text += " **The compression is simulated: in this form it saves no time.**"
    elif report.simulated_methods:
        names = _safe(" and ".join(report.simulated_methods))
        text += f" **{names} is simulated: in this form that part of the chain saves no time.**"
    return text


def _results(report: RunReport) -> str:
    student, teacher = report.student, report.teacher
    rows = [
        [
            _safe(metric) + (" (main)" if metric == report.metric else ""),
            tables.score(teacher.metrics.get(metric)) if teacher else "",
            tables.score(value),
            tables.score(report.floors.get(metric)),
        ]
        for metric, value in student.metrics.items()
    ]
    if teacher:
        rows.append(["retained", "", tables.percent(report.retained), ""])
        rows.append(["ratio", "", tables.percent(report.ratio), ""])
    rows += [
        _size("parameters", student, teacher, lambda m: tables.count(m.parameters.total)),
        _size("weights on disk", student, teacher, lambda m: tables.megabytes(m.bytes.weights)),
        _size("without embeddings", student, teacher, _rest),
        _size(
            f"FLOPs a row of {report.length} tokens" if report.length else "FLOPs a row",
            student,
            teacher,
            lambda m: tables.count(m.flops) if m.flops else "n/a",
        ),
    ]
    if teacher:
        return tables.markdown_table(["", "teacher", "student", "floor"], rows)
    return tables.markdown_table(["", "model", "floor"], [[r[0], r[2], r[3]] for r in rows])


def _rest(measured: Measured) -> str:
    rest = measured.bytes.rest
    return tables.MISSING if rest is None else tables.megabytes(rest)


def _size(name: str, student: Measured, teacher: Measured | None, shown: Any) -> list[str]:
    return [name, shown(teacher) if teacher else "", shown(student), ""]


def _speed(report: RunReport) -> list[str]:
    """The table of latencies, when any were measured."""
    if not report.latency:
        return []
    ratio = {(r.model, r.backend, r.batch, r.length): r.speedup for r in report.speedup}
    rows = [
        [
            _safe(row.model),
            _safe(row.backend),
            f"{row.batch} × {row.length}",
            f"{row.p50_ms:.2f}",
            f"{row.throughput:.1f}",
            tables.times(ratio[place])
            if (place := (row.model, row.backend, row.batch, row.length)) in ratio
            else "",
        ]
        for row in report.latency
    ]
    head = ["model", "backend", "batch × tokens", "median (ms)", "rows/s", "speed-up"]
    return [tables.markdown_table(head, rows)]


def _methods(report: RunReport) -> str:
    lines = []
    for number, method in enumerate(report.methods, 1):
        parameters = ", ".join(f"{k} = {v}" for k, v in method.items() if k != "name")
        lines.append(
            f"{number}. **{_safe(method['name'])}**: {_safe(parameters or 'no parameters')}"
        )
    training = report.training
    lines.append(
        ("\n" if lines else "")
        + f"Trained for {training.steps} steps, {tables.count(training.tokens)} tokens and "
        f"{tables.duration(training.seconds)}, on {report.workers} worker(s), seed {report.seed}."
    )
    return "\n".join(lines)


def _usage(report: RunReport, plain: bool) -> str:
    name = CLASSES[report.kind][0] if report.kind in CLASSES else "AutoModel"
    load = (
        [
            f"from transformers import AutoTokenizer, {name}",
            "",
            f"model = {name}.from_pretrained(folder)",
        ]
        if plain
        else [
            "import raybert",
            "from transformers import AutoTokenizer",
            "",
            "model = raybert.load(folder)",
        ]
    )
    code = [
        *load,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'output = model(**tokenizer("A sentence.", return_tensors="pt"))',
    ]
    return "`folder` is where this file lies.\n\n```python\n" + "\n".join(code) + "\n```"


def _machine(hardware: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in hardware.items() if v not in (None, [], "")}
    return "\n".join(
        f"- {_safe(key)}: {_safe(', '.join(map(str, v)) if isinstance(v, list) else v)}"
        for key, v in shown.items()
    )


def _notes(report: RunReport) -> str:
    machine = "machines" if report.elsewhere else "machine"
    timed = (
        f"Latency is a median on the {machine} above, of forward passes on full rows; on another "
        "machine it differs."
    )
    notes = [
        *report.notes,
        *([timed] if report.latency else []),
        f"One run, seed {report.seed}: another seed gives another score, by a point or more on "
        "small tasks.",
    ]
    return "\n".join(f"- {_safe(note)}" for note in notes)
