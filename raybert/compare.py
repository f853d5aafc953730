"""`raybert compare`: one teacher, many chains of methods, one table and one page.

    raybert compare task=mrpc data=glue/MRPC model=bert-base-uncased --chain theseus \\
        --chain theseus,lobert,q8bert --seeds 1,2,3 out=runs/compare

Every run is a run folder of its own under ``out``, so what was interrupted continues, and what is
finished is not run again. Latency is measured at the end, all students in turns with the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raybert import side_by_side
from raybert.checks import check_folder
from raybert.config import Recipe
from raybert.errors import UserError
from raybert.explain import nearest
from raybert.method import MethodConfig
from raybert.methods import METHODS
from raybert.plan import Plan, make_plan, resolve_paths, shared_teacher
from raybert.recipe_file import load_recipe, recipe_from
from raybert.report import summary_table, write_report
from raybert.results import read_runs
from raybert.run import compress, finetune
from raybert.storage import entries, pull

REPORTS = {"report.md", "report.html"}


@dataclass(frozen=True)
class Comparison:
    """What is run: the teacher first, unless it is there already."""

    out: Path
    teacher: Recipe | None
    students: tuple[Recipe, ...]

    def plans(self) -> list[Plan]:
        """The students' plans, as if each fine-tuned its own teacher where there is none yet.

        Looks at every file that the runs will read, and at every folder that they will write.

        Raises:
            UserError: a chain cannot be run, or its folder holds another run.
        """
        plans = []
        if self.teacher is not None:
            check_folder(resolve_paths(self.teacher))
        for student in self.students:
            asked = student
            if self.teacher is not None:
                asked = student.model_copy(update={"teacher": None, "model": self.teacher.model})
            try:
                plan = make_plan(resolve_paths(asked))
                check_folder(self._with_teacher(plan.recipe))
            except UserError as error:
                raise UserError(f"{student.folder.name}: {error}") from None
            plans.append(plan)
        return plans

    def _with_teacher(self, student: Recipe) -> Recipe:
        """A student's recipe as its run will have it, once the teacher is there."""
        if self.teacher is None:
            return student
        taught = {"model": None, "teacher": str(self.teacher.folder / "model")}
        return student.model_copy(update=taught)


def make_comparison(
    recipe: Recipe, chains: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Comparison:
    """The runs of a comparison.

    Args:
        recipe: what all share. Its ``method`` list holds the methods' parameters; its ``out`` is
            the comparison's folder.
        chains: names of methods with commas between them; none: every method that the recipe lists
            (or that there is, where it lists none) by itself, and the recipe's own chain.
        seeds: of the students; none: the recipe's.

    Raises:
        UserError: a method that is not known, or listed in no chain; a chain twice.
    """
    seeds = list(dict.fromkeys(seeds))  # one twice would be counted twice
    own = {method.name: method for method in recipe.method}
    named = [[part.strip() for part in chain.split(",") if part.strip()] for chain in chains]
    if not named:
        named = [[name] for name in own or METHODS] + ([list(own)] if len(own) > 1 else [])
    _check(named, own)
    teacher = None
    if recipe.teacher is None:
        teacher = shared_teacher(recipe)
    students = []
    for chain in named:
        for seed in seeds or [recipe.train.seed]:
            folder = _place(recipe.folder / "-".join(chain), seed, len(seeds) > 1)
            students.append(_student(recipe, chain, own, seed, folder, teacher))
    return Comparison(recipe.folder, teacher, tuple(students))


def _place(chain: Path, seed: int, several: bool) -> Path:
    """The folder of a chain's run: called after the chain, and after the seed where there are
    several; or the one of the two that has the seed's run already."""
    named = chain.with_name(f"{chain.name}-seed{seed}")
    there = [folder for folder in (chain, named) if _seed_of(folder) == seed]
    return there[0] if there else named if several else chain


def _seed_of(folder: Path) -> int | None:
    """The seed of the run in a folder, if it is one that can be read."""
    held = folder / "recipe.yaml"
    with suppress(UserError):
        return load_recipe(str(held)).train.seed if pull(held) else None
    return None


def _check(chains: list[list[str]], own: dict[str, MethodConfig]) -> None:
    used = {name for chain in chains for name in chain}
    for name in used:
        if name not in METHODS:
            raise UserError(
                f"unknown method {name!r}{nearest(name, METHODS)}; known: {', '.join(METHODS)}."
            )
    if idle := [name for name in own if name not in used]:
        raise UserError(
            f"the recipe has parameters for {' and '.join(idle)}, and no chain uses it; add "
            f"--chain {idle[0]}, or remove them."
        )
    texts = [",".join(chain) for chain in chains]
    if twice := next((text for text in texts if texts.count(text) > 1 or not text), None):
        raise UserError(f"the chain {twice!r} is there twice; name each chain once.")


def _student(
    recipe: Recipe,
    chain: list[str],
    own: dict[str, MethodConfig],
    seed: int,
    folder: Path,
    teacher: Recipe | None,
) -> Recipe:
    data = recipe.model_dump(mode="json")
    data["method"] = [own[name].model_dump() if name in own else name for name in chain]
    data["train"]["seed"] = seed
    data |= {"name": folder.name, "out": str(folder)}
    if teacher is not None:
        data |= {"model": None, "teacher": teacher.out}
    return recipe_from(data, f"chain {','.join(chain)}")


def check_place(out: Path) -> None:
    """Refuse a folder that holds anything but runs and their report.

    Raises:
        UserError: it does; nothing in it is touched.
    """
    for name in entries(out):
        if not (name in REPORTS or name[0] == "." or pull(out / name / "recipe.yaml")):
            raise UserError(
                f"{out} holds something that is no run, {name}; nothing in it is touched. "
                "Choose another out."
            )


def compare(comparison: Comparison, *, tell: Callable[[str], None] = print) -> Path:
    """Carry out a comparison and write its report.

    Args:
        comparison: see `make_comparison`.
        tell: gets progress, the table at the end and where the report is.

    Returns:
        The report's HTML page.

    Raises:
        UserError: before anything is trained, the folder holds something else or a chain cannot be
            run; after the report is written, a model could not be exported or timed; or as
            `raybert.run.compress` does, and runs that were finished are kept.
    """
    check_place(comparison.out)
    comparison.plans()
    runs = []
    if comparison.teacher is not None:
        tell("1. fine-tuning the teacher")
        runs.append(finetune(comparison.teacher, tell=tell))
    for number, student in enumerate(comparison.students, start=len(runs) + 1):
        chain = " + ".join(method.name for method in student.method)
        tell(f"{number}. compressing: {chain}, seed {student.train.seed}")
        runs.append(compress(student, tell=tell, timed=False))
    failed = side_by_side.measure(runs, comparison.students[0], tell)
    found = read_runs(runs)
    _, page = write_report(found, comparison.out)
    tell("")
    tell(summary_table(found))
    tell(f"report  {page}")
    if failed:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in failed.items())
        raise UserError(f"all is trained, and the report written; not measured: {reasons}")
    return page
