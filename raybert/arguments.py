"""The command line's words: commands, their options, and the places that they name. What they do is
in `raybert.cli`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raybert import __version__

EPILOG = """\
examples:
  raybert demo --out demo
  raybert compress method=theseus task=mrpc data=glue/MRPC model=bert-base-uncased out=runs/mrpc
  raybert compress theseus/mrpc model=bert-base-uncased data=glue/MRPC --dry-run
  raybert bench runs/mrpc --against runs/mrpc/teacher
  raybert export runs/mrpc
  raybert tune method=lobert task=mrpc data=glue/MRPC teacher=runs/mrpc/teacher out=runs/search
"""


IN_STORAGE = {
    "model": ("evaluate", "export", "bench"),
    "against": ("export", "bench"),
    "runs": ("report",),
    "out": ("predict-teacher", "export", "report"),
}
"""Arguments that may be URIs, and of which commands; recipes say it themselves."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as arguments; exits with 2 where it is none."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional words in one row only: those behind an option are left over.
    if rest and ("words" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args


def resolve_places(args: argparse.Namespace) -> None:
    """Give URIs of object storage as the paths that mirror them.

    Raises:
        UserError: the URI of what stays on this machine, or a path in the home folder of nobody,
            which the shell leaves as it is.
    """
    for key, value in vars(args).items():
        texts = value if isinstance(value, list) else [value]
        found = [_place(args.command, key, t) if isinstance(t, str) else t for t in texts]
        setattr(args, key, found if isinstance(value, list) else found[0])


def _place(command: str, key: str, text: str) -> str:
    from raybert.errors import UserError
    from raybert.places import is_uri
    from raybert.storage import path_of

    if is_uri(text) and key != "words":
        path = str(path_of(text))
        if command not in IN_STORAGE.get(key, ()):
            raise UserError(
                f"{command} keeps this on the machine it runs on, and {path} is object storage; "
                "give a path."
            )
        return path
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise UserError(
                f"{text} is in the home folder of a user who is not on this machine; write the "
                "whole path."
            ) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raybert",
        description="Turn a fine-tuned BERT into a smaller, faster one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raybert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_training(commands)
    _add_predict_teacher(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_report(commands)
    _add_compare(commands)
    _add_tune(commands)
    _add_import_ma_bert(commands)
    _add_demo(commands)
    commands.add_parser("tasks", help="list the tasks")
    commands.add_parser("schema", help="print the recipe's JSON Schema, for editors")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


_count.__name__, _seconds.__name__ = "count", "number of seconds"  # as argparse's errors say it


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | key=value",
        help="a recipe's file or shipped name, then overrides such as train.lr=3e-5",
    )


def _add_training(commands: Any) -> None:
    for name, text in (
        ("finetune", "fine-tune an encoder on a task: a teacher"),
        ("compress", "compress a teacher, fine-tuning it first when none is given"),
    ):
        command = commands.add_parser(name, help=text)
        _add_recipe(command)
        command.add_argument("--print-recipe", action="store_true", help="show it resolved; stop")
        command.add_argument("--dry-run", action="store_true", help="check all, predict; stop")
        command.add_argument(
            "--overwrite", action="store_true", help="remove the run in `out` first"
        )


def _add_predict_teacher(commands: Any) -> None:
    command = commands.add_parser(
        "predict-teacher", help="save what a teacher says of every row, for kd.predictions"
    )
    _add_recipe(command)
    command.add_argument("--out", help="folder (default: in data.cache, where compress looks)")
    command.add_argument("--split", default="train", help="train (default), dev or test")
    command.add_argument("--no-cls", action="store_true", help="logits alone: no [CLS] states")


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="score a model on a task")
    command.add_argument("model", help="run or model folder")
    _add_recipe(command)
    command.add_argument("--split", default="dev", help="dev (default), train or test")
    command.add_argument("--submission", help="write predictions to this file or folder")


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export", help="write a model for plain ONNX Runtime, checked and timed"
    )
    command.add_argument("model", help="run or model folder")
    _add_recipe(command)
    command.add_argument("--out", help="folder (default: onnx in the run or model folder)")
    command.add_argument("--against", help="the teacher (default: the run's own)")
    command.add_argument("--format", choices=("onnx",), default="onnx")
    command.add_argument(
        "--int8",
        choices=("fused", "qdq"),
        default="fused",
        help="integer products as one operator of ONNX Runtime's (default), or as standard ones",
    )
    command.add_argument("--no-latency", action="store_true", help="leave the timing out")
    command.add_argument("--threads", type=_count, help="CPU threads (default: all cores)")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _add_bench(commands: Any) -> None:
    command = commands.add_parser("bench", help="measure size, FLOPs and latency, side by side")
    command.add_argument("model", help="run or model folder, or an .onnx file")
    command.add_argument("--against", help="the teacher, likewise")
    command.add_argument("--batch", default="1,8", help="batch sizes (default 1,8)")
    command.add_argument("--length", default="128", help="tokens a row (default 128)")
    command.add_argument("--backend", choices=("torch", "onnx"), default="torch")
    command.add_argument("--threads", type=_count, help="CPU threads (default: all cores)")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    command.add_argument("--seconds", type=_seconds, default=3.0, help="time a shape and model")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report", help="compare finished runs: Markdown and one HTML page"
    )
    command.add_argument("runs", nargs="+", help="run folders")
    command.add_argument("--out", default="report", help="folder for report.md and report.html")


def _add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare", help="one teacher, several chains of methods: one table and one page"
    )
    _add_recipe(command)
    command.add_argument(
        "--chain",
        action="append",
        default=[],
        metavar="METHOD[,METHOD...]",
        help="a chain of methods, once for each (default: every method by itself)",
    )
    command.add_argument("--seeds", help="of the students, as in 1,2,3 (default: train.seed)")
    command.add_argument("--dry-run", action="store_true", help="check all, predict; stop")


def _add_tune(commands: Any) -> None:
    command = commands.add_parser(
        "tune", help="search recipes for the smallest model within a loss you can afford"
    )
    _add_recipe(command)
    command.add_argument(
        "--space",
        metavar="NAME|FILE[:SPACE]",
        help="a shipped space, or a .py or .yaml file (default: the method's, or chains)",
    )
    command.add_argument("--trials", type=int, default=16, help="how many (default: 16)")
    command.add_argument(
        "--algorithm",
        choices=("random", "grid", "optuna"),
        help="default: grid for a space of grids, else optuna if it is installed, else random",
    )
    command.add_argument(
        "--scheduler",
        choices=("none", "asha", "median", "pbt"),
        default="none",
        help="stop bad trials early, or change recipes on the way (pbt)",
    )
    command.add_argument(
        "--objectives",
        default="score,bytes",
        help="of score, retained, bytes, parameters, flops, latency, seconds, or max:PLACE and "
        "min:PLACE in report.json (default: score,bytes)",
    )
    command.add_argument(
        "--loss",
        default="0.01",
        help="accuracy you can afford: points of the metric as in 0.01 (default), or 5%% of what "
        "the teacher learned",
    )
    command.add_argument("--finalists", type=int, default=3, help="run again (default: 3)")
    command.add_argument("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    command.add_argument("--concurrent", type=int, help="trials at once (default: what fits)")
    command.add_argument("--gpu", type=float, default=1.0, help="of a trial of one worker, as 0.5")
    command.add_argument("--minutes", type=float, help="train no longer than this")
    command.add_argument(
        "--retries", type=int, default=2, help="of a trial that crashes (default: 2)"
    )
    command.add_argument(
        "--retry-failed", action="store_true", help="let trials that failed before run again"
    )
    command.add_argument(
        "--log", action="append", default=[], choices=("mlflow", "wandb"), help="log there too"
    )
    command.add_argument("--dry-run", action="store_true", help="check all, show samples; stop")


def _add_import_ma_bert(commands: Any) -> None:
    command = commands.add_parser(
        "import-ma-bert", help="make a model folder of a checkpoint by the authors of MA-BERT"
    )
    command.add_argument("file", help="the checkpoint, a PyTorch state dict")
    command.add_argument("--model", required=True, help="the BERT or DistilBERT it was made of")
    command.add_argument("--out", required=True, help="folder to write")


def _add_demo(commands: Any) -> None:
    command = commands.add_parser("demo", help="all of it, offline, in a few minutes")
    command.add_argument("--out", help="folder (default: demo, or demo-tune)")
    command.add_argument(
        "--workers", type=_count, default=1, help="training processes (default: 1)"
    )
    command.add_argument(
        "--tune", action="store_true", help="search one method's parameters instead"
    )
