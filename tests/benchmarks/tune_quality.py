"""What searches find beside settings made by hand: one for every method, and one over chains.

    python tests/benchmarks/tune_quality.py --data glue/MRPC --teacher runs/teacher

For each, the method is trained as set by hand, and then searched for so many minutes, from the same
teacher and with the same epochs and number of seeds; both are measured alike. What is finished in
``--out`` is not done again: the same command goes on, also with another ``--only``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import QUICK_RESULTS, RESULTS, encoder, options, shown_command, today, write_json
from quality import entry, read_all, speedups, words_of

from raybert.config import Recipe
from raybert.groups import Group
from raybert.recipe_file import recipe_from
from raybert.search_results import Answer

TAUGHT = {"alpha": 0.5, "cls": 10.0}
KNOWLEDGE = {"alpha": 0.5, "hidden": 1.0, "attention": 100.0}
THESEUS = {"name": "theseus", "initialise": "spaced"}
LOBERT = {"name": "lobert", "share": 0.5, "allocate": "energy", "data_aware": True}
Q8BERT = {"name": "q8bert"}


SEED = 1


@dataclass(frozen=True)
class Entry:
    """A search, and what is beside it.

    Attributes:
        objectives: what is searched for.
        method: the methods as set by hand; their names alone are what is searched.
        lr: the rate set by hand.
        kd: the distillation set by hand.
        train: what training shares, by hand and in the search.
    """

    objectives: str
    method: tuple[dict[str, Any], ...]
    lr: float = 1e-4
    kd: dict[str, Any] = field(default_factory=lambda: TAUGHT)
    train: dict[str, Any] = field(default_factory=dict)


SEARCHES = {
    "theseus": Entry("score,bytes", (THESEUS,)),
    "lobert": Entry("score,bytes", (LOBERT,)),
    "q8bert": Entry("score,bytes", (Q8BERT,), lr=2e-5),
    # Its model computes less, and is no smaller; set as released.
    "ebert": Entry("score,flops", ({"name": "ebert"},), lr=3e-5, kd={}),
    # It changes what is computed, not how much.
    "ma_bert": Entry(
        "score",
        ({"name": "ma_bert"},),
        lr=5e-5,
        kd={**KNOWLEDGE, "embeddings": True, "over_layers": "sum"},
        train={"dropout": 0},
    ),
    "chains": Entry("score,bytes,flops", (THESEUS, LOBERT, {**Q8BERT, "lr": 2e-5})),
}
"""By name; settings by hand are those of the README's tables for the same encoder, or as
released."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = options("what searches find beside settings made by hand", data=True)
    parser.add_argument("--teacher", help="a fine-tuned run folder (default: fine-tuned first)")
    parser.add_argument("--out", type=Path, default=Path("runs/searches"), help="folder for all")
    parser.add_argument("--only", help=f"of {','.join(SEARCHES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each search (default: 20)")
    parser.add_argument("--trials", type=int, default=64, help="at most (default: 64)")
    parser.add_argument("--epochs", type=float, default=2.0, help="a phase (default: 2)")
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, default=3, help="of finalists and by hand")
    parser.add_argument("--finalists", type=int, default=2, help="(default: 2)")
    parser.add_argument("--loss", default="10%", help="that one can afford (default: 10%%)")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.epochs, args.every, args.seeds = 2, 1.0, 2, 1
        args.minutes = min(args.minutes, 5.0)
    args.names = args.only.split(",") if args.only else list(SEARCHES)
    if unknown := [name for name in args.names if name not in SEARCHES]:
        parser.error(f"no search {unknown[0]}; there are {', '.join(SEARCHES)}")
    return args


def base(args: argparse.Namespace) -> dict[str, Any]:
    """What the teacher, the defaults and all trials share."""
    data: dict[str, Any] = {"limit": 64} if args.quick else {}
    data |= {"source": str(Path(args.data).absolute())} if args.data else {"max_length": 64}
    return {"task": "mrpc" if args.data else "demo", "data": data}


def teacher_of(args: argparse.Namespace) -> str:
    """The teacher's folder, fine-tuned first where none was given."""
    from raybert.run import finetune

    if args.teacher:
        return args.teacher
    training = {"lr": 5e-5, "epochs": 1 if args.quick else 4}
    keys = {**base(args), "model": encoder(args), "train": training}
    keys["out"] = str(args.out / "teacher")
    return str(finetune(recipe_from(keys), tell=print))


def recipe_of(args: argparse.Namespace, teacher: str, out: Path, **keys: Any) -> Recipe:
    """A recipe with what is shared."""
    training = {"epochs": args.epochs, "eval_every": args.every, **keys.pop("train", {})}
    measure = {"seconds": 0.2} if args.quick else {}
    shared = {**base(args), "teacher": teacher, "train": training, "measure": measure}
    return recipe_from({**shared, **keys, "out": str(out)})


def by_hand(args: argparse.Namespace, teacher: str, name: str) -> list[Path]:
    """Runs as set by hand, one for each seed; the first is timed."""
    from raybert.run import compress

    hand, runs = SEARCHES[name], []
    for number in range(args.seeds):
        keys: dict[str, Any] = {"method": list(hand.method), "kd": hand.kd}
        keys["train"] = {**hand.train, "lr": hand.lr, "seed": SEED + number}
        place = args.out / "by-hand" / f"{name}-{SEED + number}"
        recipe = recipe_of(args, teacher, place, **keys)
        if number:
            untimed = recipe.measure.model_copy(update={"batches": ()})
            recipe = recipe.model_copy(update={"measure": untimed})
        runs.append(compress(recipe, tell=print))
    return runs


def search(args: argparse.Namespace, teacher: str, name: str) -> tuple[Answer, str]:
    """A search's answer, and the command that it is."""
    from raybert.search import run_search
    from raybert.search_plan import Settings, make_search

    wanted = SEARCHES[name]
    methods = [] if name == "chains" else [method["name"] for method in wanted.method]
    keys: dict[str, Any] = {"method": methods, "train": {**wanted.train, "seed": SEED}}
    recipe = recipe_of(args, teacher, args.out / name, **keys)
    settings = Settings(
        trials=args.trials,
        scheduler="asha",
        objectives=wanted.objectives,
        loss=args.loss,
        finalists=args.finalists if args.seeds > 1 else 0,
        seeds=args.seeds,
        minutes=args.minutes,
    )
    answer = run_search(make_search(recipe, name, settings), tell=print)
    return answer, tune_command(recipe, name, settings)


def tune_command(recipe: Recipe, name: str, settings: Any) -> str:
    """A search as others would type it."""
    words = words_of(recipe.model_dump(mode="json"))
    said = ["--space", name] if name == "chains" else []
    for key in ("trials", "scheduler", "objectives", "loss", "finalists", "seeds", "minutes"):
        value = vars(settings)[key]
        said += [f"--{key}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(["raybert", "tune", *words, f"out=runs/{name}", *said])


def row(label: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Runs that differ by seed, as the other tables of students have them; the first was timed."""
    runs, commands = read_all(list(folders))
    found = entry(Group(label, tuple(runs)), commands)
    return {**found, "speedup": speedups(Group(label, tuple(runs[:1])))}


def both(args: argparse.Namespace, teacher: str, name: str) -> dict[str, Any]:
    """What was set by hand, and what a search found."""
    held = args.out / f"{name}.json"
    if held.is_file():
        return json.loads(held.read_text(encoding="utf-8"))
    hand = row("by hand", by_hand(args, teacher, name))
    answer, command = search(args, teacher, name)
    winner = answer.winner.trial
    places = [answer.folder / "trials" / winner.name]
    places += sorted((answer.folder / "finalists").glob(f"{winner.name}-seed*"))
    finished = [place for place in places if (place / "report.json").is_file()]
    states = [trial.state for trial in answer.trials]
    found = {
        "name": name,
        "objectives": [o.name for o in answer.objectives],
        "by_hand": hand,
        "found": row("found", finished),
        "values": winner.values,
        "within": answer.within,
        "least": answer.least,
        "rule": answer.rule,
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "front": len(answer.front),
        "minutes": args.minutes,
        "core_hours": round(answer.core_seconds / 3600, 3),
        "command": command,
    }
    write_json(held, found)
    return found


def main() -> None:
    """Train, search, print and write."""
    args = parse()
    args.out = args.out.absolute()
    teacher = teacher_of(args)
    searches = [both(args, teacher, name) for name in args.names]
    result = {
        "name": "tune_quality",
        "quick": args.quick,
        "command": shown_command(sys.argv),
        "date": today(),
        "searches": searches,
    }
    write_json((QUICK_RESULTS if args.quick else RESULTS) / "tune_quality.json", result)
    from tables import searches_table

    print(searches_table(searches))


if __name__ == "__main__":
    main()
