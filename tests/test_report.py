"""Reports: the retained share by hand, runs grouped by seed, a page that is safe and alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from raybert import views
from raybert.cli import main
from raybert.config import KEPT_SHARE
from raybert.errors import UserError
from raybert.groups import Group, Spread, group_runs, on_front
from raybert.plots import BINS, curve, kept_plot, pareto
from raybert.report import (
    RunReport,
    build,
    model_card,
    read_runs,
    retained,
    summary_table,
    write_report,
    write_run_report,
)
from raybert.results import Run, read_run, with_export

THESEUS = {"name": "theseus", "layers": 3, "replacing_rate": 0.3}
EVIL = '<script>alert("x")</script> $\\frac$ | _a'


def measured(score: float, weights: int) -> dict[str, Any]:
    return {
        "metrics": {"f1": score, "accuracy": score - 0.1},
        "parameters": {"total": weights // 4, "embeddings": 100, "rest": weights // 4 - 100},
        "bytes": {"weights": weights, "embeddings": weights // 5, "total": weights + 500},
        "flops": weights * 30,
    }


def timed(model: str, ms: float, batch: int) -> dict[str, Any]:
    return {
        "model": model,
        "backend": "torch",
        "device": "cpu",
        "batch": batch,
        "length": 128,
        "p50_ms": ms,
        "p95_ms": ms,
        "mean_ms": ms,
        "throughput": 1000 / ms,
        "repeats": 10,
        "threads": 2,
        "peak_memory_mb": 100.0,
    }


def a_report(score: float = 0.83, **changes: Any) -> RunReport:
    student = {"model": "student", "backend": "torch", "length": 128}
    arguments: dict[str, Any] = {
        "name": "mrpc-theseus",
        "task": "mrpc",
        "kind": "classification",
        "metric": "f1",
        "model": "owner/encoder",
        "methods": [THESEUS],
        "seed": 1,
        "workers": 1,
        "student": measured(score, 50_000_000),
        "teacher": measured(0.86, 90_000_000),
        "floors": {"f1": 0.81, "accuracy": 0.68},
        "latency": [
            timed(m, ms, b) for b in (1, 8) for m, ms in (("teacher", 40), ("student", 20))
        ],
        "speedup": [{**student, "batch": b, "speedup": 2.0} for b in (1, 8)],
        "training": {"steps": 6, "seconds": 61.0, "tokens": 1000, "phases": []},
        "hardware": {"cpu": "A CPU", "instructions": ["AVX2"], "gpu": None},
        "notes": ["A note."],
    }
    return build(**{**arguments, **changes})


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    """Write a finished run folder and give its path."""

    def write(place: str, score: float = 0.83, recipe: Any = None, **changes: Any) -> Path:
        folder = tmp_path / place
        folder.mkdir()
        seed = changes.get("seed", 1)
        known = {"name": place, "out": f"runs/{place}", "train": {"epochs": 3, "seed": seed}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**known, **(recipe or {})}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log()))
        report = a_report(score, **{"name": place, **changes})
        (folder / "report.json").write_text(report.model_dump_json())
        return folder

    return write


def log() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"kind": "restart", "time": 1.0}]
    for index, (phase, total) in enumerate((("replace", 4), ("successor", 2))):
        place = {"phase": phase, "phase_index": index, "total": total}
        lines += [
            {**place, "kind": "train", "step": step, "loss": 1 / step}
            for step in range(1, total + 1)
        ]
        lines.append({**place, "kind": "eval", "step": total, "f1": 0.8 + index / 100})
    return lines


def test_retained_by_hand() -> None:
    assert retained(0.824, 0.852, 0.812) == pytest.approx(0.3)
    assert retained(0.80, 0.852, 0.812) == pytest.approx(-0.3)
    assert retained(0.9, 0.812, 0.812) is None
    assert retained(0.9, 0.7, 0.812) is None


def test_build_works_out_scores_ratio_and_retained() -> None:
    report = a_report(0.83)
    assert report.teacher is not None
    assert (report.student.score, report.teacher.score, report.floor) == (0.83, 0.86, 0.81)
    assert report.retained == pytest.approx(0.4)
    assert report.ratio == pytest.approx(0.83 / 0.86)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report.created)


def test_build_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="the floors lack the main metric 'f1'; found: accuracy"):
        a_report(floors={"accuracy": 0.5})
    with pytest.raises(UserError, match=r"`training.steps`"):
        a_report(training={"steps": "many", "seconds": 1, "tokens": 1, "phases": []})


def test_a_teacher_has_nothing_to_retain() -> None:
    report = a_report(methods=[], teacher=None)
    assert (report.retained, report.ratio, report.chain) == (None, None, "fine-tuned teacher")


def test_report_json_round_trips_even_with_nan(finished: Callable[..., Path]) -> None:
    folder = finished("diverged")
    write_run_report(folder, a_report(math.nan))
    report = read_run(folder).report
    assert math.isnan(report.student.score)
    assert "nan" in (folder / "report.md").read_text()
    assert sorted(p.name for p in folder.iterdir()) == [
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_reading_tells_unfinished_from_damaged_from_strange(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        read_runs([tmp_path])
    folder = finished("run")
    (folder / "report.json").write_text('{"raybert": "0.1.0", "surprise": 1}')
    with pytest.raises(UserError, match=r"`surprise`|`name`"):
        read_runs([folder])
    (folder / "report.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_runs([folder])
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        read_runs([folder])


def test_only_a_cut_last_line_of_the_log_is_forgiven(finished: Callable[..., Path]) -> None:
    file = finished("run") / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"kind": "tra')
    assert len(read_run(file.parent).metrics) == len(log())
    file.write_text('{"kind": \n' + whole)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_run(file.parent)


def test_spread_is_mean_and_sample_deviation() -> None:
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3)
    assert Spread.of([1.5]) == Spread(1.5, None, 1)
    assert Spread.of([1.0, None]) is None


def test_what_rows_keep_of_each_layer_is_a_picture(finished: Callable[..., Path]) -> None:
    shares = {f"layer {n} {part}": 0.1 * (n + 3) for n in range(3) for part in ("heads", "neurons")}
    facts = {"gates": {KEPT_SHARE: shares}}
    runs = [read_run(finished(f"s{seed}", seed=seed, facts=facts)) for seed in (1, 2)]
    (group,) = group_runs(runs)
    picture = kept_plot(group, "k")
    assert picture is not None
    assert picture.startswith("<svg")
    for word in ("heads", "neurons", "kept share", "layer"):
        assert f">{word}</text>" in picture
    assert picture == kept_plot(group, "k")
    (without,) = group_runs([read_run(finished("plain"))])
    assert kept_plot(without, "k") is None
    page = write_report(read_runs([finished("one", facts=facts)]), finished("none").parent)[
        1
    ].read_text()
    assert "Share of each layer that a row keeps" in page


def test_keys_that_have_come_since_part_no_seeds(finished: Callable[..., Path]) -> None:
    earlier = finished("one", recipe={"kd": {"alpha": 0.5}})
    now = finished("two", seed=2, recipe={"kd": {"alpha": 0.5, "over_layers": "mean"}})
    other = finished("three", seed=3, recipe={"kd": {"alpha": 0.5, "over_layers": "sum"}})
    groups = group_runs([read_run(folder) for folder in (earlier, now, other)])
    assert [len(group.runs) for group in groups] == [2, 1]


def test_students_of_teachers_of_two_sizes_are_no_seeds(finished: Callable[..., Path]) -> None:
    runs = [finished("one"), finished("two", seed=2, teacher=measured(0.86, 60_000_000))]
    assert [len(g.runs) for g in group_runs([read_run(folder) for folder in runs])] == [1, 1]


def test_seeds_are_grouped_and_anything_else_is_not(finished: Callable[..., Path]) -> None:
    folders = [
        finished("teacher", 0.86, methods=[], teacher=None),
        *(finished(f"s{seed}", score, seed=seed) for seed, score in ((1, 0.82), (2, 0.84))),
        finished("four", 0.83, methods=[{**THESEUS, "layers": 4}]),
        finished("longer", 0.83, recipe={"train": {"epochs": 9, "seed": 1}}),
    ]
    groups = group_runs([read_run(folder) for folder in reversed(folders)])
    assert groups[0].is_teacher
    labels = {group.label: len(group.runs) for group in groups}
    assert labels["fine-tuned teacher"] == 1
    assert labels["theseus (layers=4)"] == 1
    assert labels["theseus (layers=3) [longer]"] == 1
    assert sorted(labels.values()) == [1, 1, 1, 2]
    pair = next(group for group in groups if len(group.runs) == 2)
    spread = pair.spread(lambda r: r.student.score)
    assert spread is not None
    assert spread.mean == pytest.approx(0.83)
    assert spread.sd == pytest.approx(0.02 / math.sqrt(2))


def test_a_group_of_seeds_is_one_row_with_its_deviation(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    folders = [finished(f"s{n}", score, seed=n) for n, score in ((1, 0.82), (2, 0.84))]
    markdown, page = write_report(read_runs([*folders, folders[0]]), tmp_path / "out")
    text = markdown.read_text()
    assert text.count("theseus; mean ± sd, n = 2 seeds (1, 2)") == 1
    assert "0.830 ± 0.014" in text
    assert "40 ± 28 %" in text
    assert "0.830 ± 0.014" in page.read_text()


class Page(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_page_stands_alone_and_holds_every_plot(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    folders = [finished("one"), finished("cola", task="cola")]
    text = write_report(read_runs(folders), tmp_path / "new" / "page.html")[1].read_text()
    page = Page(text)
    assert page.tags.count("svg") == 8
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "script" not in page.tags
    assert "<title>Compression report" in text
    assert "(student - floor) / (teacher - floor)" in text
    assert "successor" in text  # a phase's name, as text in a plot


def test_reports_replace_reports_alone(
    tmp_path: Path, finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = finished("run")
    write_run_report(run, read_run(run).report)
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("--out=~/new", f"--out={tmp_path / 'new'}", f"--out={run / 'page.html'}"):
        assert main(["report", "~/run", out]) == 0
    assert (tmp_path / "new" / "report.html").is_file()
    assert main(["report", str(run), f"--out={run / 'page.html'}"]) == 0
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "report.html").write_text("the page of a search")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    for place in ("README.md", "run", "run/report.html", "search"):
        assert main(["report", str(run), "--out", str(tmp_path / place)]) == 2
        assert "is no report that `raybert report` wrote" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_sizes_that_differ_by_seed_are_means_with_their_spread(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    def sized(weights: int, flops: int) -> dict[str, Any]:
        return {**measured(0.83, weights), "flops": flops}

    sizes = [(40_000_000, 1_600_000_000), (42_000_000, 1_800_000_000)]
    places = [
        finished(f"seed{seed}", seed=seed, student=sized(*size)) for seed, size in enumerate(sizes)
    ]
    runs = read_runs(places)
    assert len(group_runs(runs)) == 1
    markdown, page = (file.read_text() for file in write_report(runs, tmp_path / "out"))
    for text in (markdown, page):
        assert "1.70 ± 0.14 G" in text
        assert "10.2 ± 0.4 M" in text
        assert "41.0 ± 1.4 MB" in text
        assert "32.8 ± 1.1 MB" in text  # without embeddings
    assert "1.59× fewer than 2.70 G" in markdown
    assert "41.0 ± 1.4 MB" in summary_table(runs)
    assert " ± " not in str(views.task_views(runs[:1], charts=False)[0].rows[0].cells[5:8])


def test_the_same_runs_give_the_same_bytes(tmp_path: Path, finished: Callable[..., Path]) -> None:
    folder = finished("one")
    first = write_report(read_runs([folder]), tmp_path / "a")[1].read_bytes()
    assert write_report(read_runs([folder]), tmp_path / "b")[1].read_bytes() == first


def test_speed_is_shown_at_the_batches_that_were_timed(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    student = {"model": "student", "backend": "torch", "length": 128}
    latency = [timed(m, ms, b) for b in (4, 32) for m, ms in (("teacher", 40), ("student", 20))]
    speedup = [{**student, "batch": b, "speedup": 10.0 / b} for b in (4, 32)]
    runs = read_runs([finished("run", latency=latency, speedup=speedup)])
    assert "2.50×" in summary_table(runs)
    markdown, page = (file.read_text() for file in write_report(runs, tmp_path / "out"))
    for text in (markdown, page):
        assert "Speed-up, batch 1<" not in text
        assert "n/a" not in re.sub(r"How retained.*", "", text, flags=re.DOTALL)
        for shown in ("Speed-up, batch 4", "Speed-up, batch 32", "2.50×", "0.31×"):
            assert shown in text
    assert "the teacher's speed at batch 4" in page.replace("&#39;", "'")
    assert "median latency, torch, batch 4 × 128 tokens" in page


def test_names_cannot_break_out_of_page_plot_or_table(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    hostile = {
        "name": EVIL,
        "task": EVIL,
        "model": EVIL,
        "notes": [EVIL],
        "methods": [{"name": EVIL, "x": EVIL}],
        "hardware": {EVIL: EVIL},
        "metric": EVIL,
        "facts": {EVIL: {KEPT_SHARE: {f"layer 0 {EVIL}": 0.5}, EVIL: {EVIL: 1.0}}},
    }
    for key in ("student", "teacher"):
        hostile[key] = {**measured(0.8, 90), "metrics": {EVIL: 0.8}}
    hostile["floors"] = {EVIL: 0.5}
    folder = finished("run", recipe={"note": EVIL}, **hostile)
    markdown, page = write_report(read_runs([folder]), tmp_path / "out")
    assert "script" not in Page(page.read_text()).tags
    assert all(re.fullmatch(r"[\w.-]+", name) for name in Page(page.read_text()).ids)
    assert "\f" not in page.read_text(), "a name is no pattern: its backslashes are its own"
    assert page.read_text().count("&lt;script&gt;") > 8
    table = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
    assert len(set(widths[:-6])) == len(set(widths[-6:])) == 1, "the runs, and a phase's facts"
    outside = [x for x in markdown.read_text().splitlines() if not x.startswith("    ")]
    assert "<script" not in "\n".join(outside)
    card = model_card(read_run(folder).report, "a: 1", plain=True)
    assert "<script" not in card.split("---")[2]


def test_a_backend_is_one_of_two() -> None:
    row = {**timed("student", 20, 1), "backend": EVIL}
    with pytest.raises(UserError, match=r"`latency\.0\.backend` input should be 'torch' or 'onnx'"):
        a_report(latency=[row])
    student = {"model": "student", "batch": 1, "length": 128, "speedup": 2.0}
    with pytest.raises(UserError, match=r"`speedup\.0\.backend` input should be"):
        a_report(speedup=[{**student, "backend": EVIL}])


def test_simulated_compression_is_labelled_everywhere(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    folder = finished("run", simulated=["theseus"])
    for file in write_report(read_runs([folder]), tmp_path / "out"):
        assert "simulated" in file.read_text()
    report = read_run(folder).report
    assert "simulated" in summary_table([Run(report, "")])
    assert "it saves no time" in model_card(report, "", plain=True)
    assert "simulated" not in summary_table([Run(a_report(), "")])


def test_of_a_chain_only_what_is_simulated_is_called_so(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    methods = [THESEUS, {"name": "q8bert"}]
    folder = finished("run", methods=methods, simulated=["q8bert"])
    report = read_run(folder).report
    assert not report.simulated
    (group,) = group_runs([Run(report, "")])
    assert (group.caveat, group.ranked) == ("q8bert simulated", True)
    for file in write_report(read_runs([folder]), tmp_path / "out"):
        assert "q8bert simulated" in file.read_text()
    assert summary_table([Run(report, "")]).endswith("q8bert simulated")
    card = model_card(report, "", plain=True)
    assert "q8bert is simulated: in this form that part of the chain saves no time" in card
    assert read_run(
        finished("all", methods=methods, simulated=["q8bert", "theseus"])
    ).report.simulated


def test_summary_shows_scores_retained_and_speed() -> None:
    slow = [timed(m, ms, b) for b in (1, 8) for m, ms in (("teacher", 40), ("student", 40))]
    teacher = {"methods": [], "student": measured(0.86, 90_000_000), "teacher": None}
    runs = [
        Run(a_report(student=measured(0.83, 90_000_000), latency=slow), ""),
        Run(a_report(**teacher, latency=[], speedup=[]), ""),
    ]
    lines = summary_table(runs).splitlines()
    assert lines[2].split() == [
        "mrpc:",
        "fine-tuned",
        "teacher",
        "f1",
        "0.860",
        "0.810",
        "90.0",
        "MB",
        "*",
    ]
    assert lines[3].split()[:2] == ["mrpc:", "theseus"]
    assert "40 %" in lines[3]
    assert lines[3].endswith("2.00×"), "its teacher is better, no larger and no slower"


def test_front_is_what_nothing_beats_in_everything() -> None:
    def group(name: str, score: float, size: int, ms: float, **keys: Any) -> Group:
        rows = [timed("student", ms, 1), timed("student", 9 * ms, 8), timed("teacher", 1, 1)]
        report = a_report(score, student=measured(score, size), latency=rows, name=name, **keys)
        return Group(name, (Run(report, ""),))

    groups = [
        group("best", 0.86, 90, 40),
        group("smaller", 0.84, 20, 40),
        group("faster", 0.83, 90, 10),
        group("beaten", 0.82, 90, 10),
        group("equal", 0.84, 20, 40),
        group("simulated", 0.90, 10, 5, simulated=["theseus"]),
    ]
    assert on_front(groups) == [True, True, True, False, True, False]


def test_a_teacher_is_as_fast_as_beside_its_students() -> None:
    def student(score: float, ms: float, **keys: Any) -> Group:
        rows = [timed("student", ms, 1), timed("teacher", 40, 1), timed("teacher", 400, 8)]
        report = a_report(student=measured(score, 90), teacher=measured(0.86, 90), latency=rows)
        return Group("student", (Run(report.model_copy(update=keys), ""),))

    alone = {"methods": [], "teacher": None, "latency": [], "speedup": []}
    teacher = Group("teacher", (Run(a_report(student=measured(0.86, 90), **alone), ""),))
    assert on_front([teacher, student(0.85, 41)]) == [True, False]
    assert on_front([teacher, student(0.85, 39)]) == [True, True]
    assert on_front([teacher, student(0.86, 39)]) == [False, True]
    other = student(0.85, 41, model="another/encoder")
    assert on_front([teacher, other]) == [True, True], "of another's students nothing is known"


def session(length: int = 128, teacher: float = 40, **batches: float) -> dict[str, Any]:
    """Rows of a run that was timed: at batch N for ``bN``, by that many milliseconds."""
    latency, speedup = [], []
    for name, ms in batches.items():
        shape = {"batch": int(name[1:]), "length": length}
        latency += [
            {**timed("teacher", teacher, 1), **shape},
            {**timed("student", ms, 1), **shape},
        ]
        faster = {"model": "student", "backend": "torch", "speedup": teacher / ms}
        speedup.append({**faster, **shape})
    return {"latency": latency, "speedup": speedup}


def test_a_front_compares_times_of_one_shape_as_shares_of_the_teachers(
    tmp_path: Path, finished: Callable[..., Path]
) -> None:
    worse = {"methods": [{"name": "lobert"}]}

    def front(*others: Path) -> tuple[bool, str, str, str]:
        runs = read_runs([a, *others])
        page = write_report(runs, tmp_path / "out")[1].read_text()
        markdown = (tmp_path / "out" / "report.md").read_text()
        assert ("share of the teacher's)" in page) == (b in others)
        note = re.search(r"Pareto&#39;s front: ([^<]*)", page)
        assert note is not None
        assert note[1].replace("&#39;", "'") in markdown
        return on_front(group_runs(runs))[1], note[1], summary_table(runs), markdown

    a = finished("a", 0.84, **session(b1=20, b8=160))
    # A faster machine: fewer milliseconds, and less speed-up.
    b = finished("b", 0.83, **session(teacher=20, b1=15), **worse)
    there, note, table, _ = front(b)
    assert not there
    assert "batch 1 × 128 tokens as a share of the teacher&#39;s, in torch" in note
    assert "2.00×" in table
    assert "1.33×" in table
    # Other batches: what both were timed at counts, where the second is the faster one.
    c = finished("c", 0.83, **session(b8=100, b32=300), **worse)
    there, note, table, _ = front(c)
    assert there
    assert "batch 8 × 128" in note
    assert "0.25×" in table
    assert "0.40×" in table
    # Nothing in common: shorter rows, or another kind of teacher.
    d = finished("d", 0.83, **session(32, b1=5), **worse)
    there, note, table, _ = front(d)
    assert not there, "and in time nothing can be said"
    assert "Times are not counted, since no shape was timed for all." in note
    assert "2.00× (1 × 128)" in table
    assert "8.00× (1 × 32)" in table
    assert table.endswith("since no shape was timed for all.")
    e = finished("e", 0.83, **session(b1=5), **worse, teacher=measured(0.86, 300_000_000))
    there, note, table, _ = front(e)
    assert not there
    assert "since teachers are of several sizes" in note


def exported(**changes: Any) -> dict[str, Any]:
    """What an export's report says, as far as a run's takes it over."""
    rows = [{**timed("model", 10, 1), "backend": "onnx"}]
    found = {"latency": rows, "speedup": [], "bytes": 1, "int8": "fused", "metrics": None}
    found |= {"parity": {"largest_difference": 0.0}, "hardware": a_report().hardware}
    return {**found, **changes}


@pytest.mark.parametrize("elsewhere", [True, False])
def test_times_of_another_machine_are_said_to_be(tmp_path: Path, elsewhere: bool) -> None:
    report = a_report()
    changes = {"hardware": {"cpu": "A faster one"}} if elsewhere else {}
    report = with_export(report, exported(**changes))
    (tmp_path / "recipe.yaml").write_text("model: owner/encoder\n")
    write_run_report(tmp_path, report)
    card = model_card(report, "", plain=True)
    assert ("ONNX Runtime was timed on:\n\n- cpu: A faster one" in card) == elsewhere
    assert f"a median on the machine{'s' if elsewhere else ''} above" in card
    for file in ("report.md", "report.html"):
        page = (tmp_path / file).read_text(encoding="utf-8")
        assert page.count("A CPU") == 1
        assert ("A faster one" in page) == elsewhere
        assert ("mrpc-theseus, times of ONNX Runtime" in page) == elsewhere
    untimed = with_export(report, exported(**changes, latency=[]))
    assert untimed.elsewhere is None


def test_simulated_compression_is_on_a_front_once_its_graph_was_timed() -> None:
    rows = [timed("student", 50, 1), timed("teacher", 40, 1)]
    report = a_report(methods=[{"name": "q8bert"}], simulated=["q8bert"], latency=rows)
    for int8, there in ((None, False), ("fused", True)):
        found = with_export(report, exported(int8=int8))
        assert on_front([Group("q8bert", (Run(found, ""),))]) == [there]
    assert on_front([Group("q8bert", (Run(report, ""),))]) == [False]


def test_what_is_simulated_is_ranked_by_the_score_of_its_graph() -> None:
    rows = [timed("student", 50, 1), timed("teacher", 40, 1)]
    method = {"methods": [{"name": "q8bert"}], "latency": rows}
    good, bad = ({"f1": score, "accuracy": score} for score in (0.826, 0.5))
    simulated = a_report(simulated=["q8bert"], **method)
    noted = with_export(simulated, exported(metrics={"onnx": bad}))
    assert (noted.ranked_score, noted.student.score) == (0.5, 0.83)
    (note,) = [note for note in noted.notes if note not in simulated.notes]
    assert "ONNX Runtime scores f1 0.500 on the dev rows, and PyTorch 0.830" in note
    assert note in model_card(noted, "", plain=False)
    again = with_export(noted, exported(metrics={"onnx": good}))
    assert (again.ranked_score, again.notes) == (0.826, simulated.notes)
    real = with_export(a_report(**method), exported(metrics={"onnx": bad}))
    assert real.ranked_score == 0.83


def test_not_measurable_is_said_so() -> None:
    report = a_report(0.83, teacher=measured(0.80, 90), latency=[], speedup=[])
    assert report.retained is None
    assert summary_table([Run(report, "")]).count("n/a") == 2


@pytest.mark.parametrize(("plain", "library"), [(True, "transformers"), (False, "raybert")])
def test_model_card_is_read_by_the_hub(plain: bool, library: str) -> None:
    report = a_report(length=64).model_dump(mode="json")
    card = model_card(report, "model: owner/encoder\n", plain=plain)
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == library
    assert data["base_model"] == "owner/encoder"
    assert data["metrics"] == ["f1", "accuracy"]
    assert {"raybert", "theseus", "mrpc"} <= set(data["tags"])
    assert ("raybert.load(folder)" in body) is not plain
    assert ("AutoModelForSequenceClassification" in body) is plain
    for said in ("40 %", "layers = 3", "A note.", "A CPU", "2.00×", "without embeddings"):
        assert said in body
    assert "FLOPs a row of 64 tokens" in body


def test_a_local_encoder_is_no_base_model(tmp_path: Path) -> None:
    for name in (str(tmp_path), "./here/model", "encoder"):
        assert "base_model" not in model_card(a_report(model=name), "", plain=True)


def test_pareto_front_by_hand() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.7), (3.0, 0.6), (4.0, 0.7), (5.0, 0.9)]
    assert pareto(points) == [(1.0, 0.5), (3.0, 0.7), (5.0, 0.9)]


def test_curves_count_steps_through_and_keep_the_later_of_two() -> None:
    again = {"kind": "train", "phase": "replace", "phase_index": 0, "step": 4, "total": 4}
    run = Run(a_report(), "", (*log(), {**again, "loss": 7.0}))
    first, second = curve(run, "train", "loss")
    assert (first.name, first.start, second.name, second.start) == ("replace", 0, "successor", 4)
    assert first.points[-1] == (4, 7.0)
    assert [x for x, _ in second.points] == [5, 6]
    assert [p.points for p in curve(run, "eval", "f1")] == [((4, 0.8),), ((6, 0.81),)]


def test_long_curves_are_averaged() -> None:
    place = {"kind": "train", "phase": "p", "phase_index": 0, "total": 600}
    lines = tuple({**place, "step": step, "loss": float(step)} for step in range(1, 601))
    (only,) = curve(Run(a_report(), "", lines), "train", "loss")
    assert len(only.points) == BINS
    assert only.points[0] == (5.5, 5.5)
