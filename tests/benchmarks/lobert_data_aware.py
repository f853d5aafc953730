"""What calibration rows, ranks by energy, and distillation add to plain SVD at equal parameters.

    python tests/benchmarks/lobert_data_aware.py --teacher runs/stsb-teacher --data glue/STS-B

Every student keeps half of the encoder's parameters. Told of each: the relative error of what its
matrices make of held-out activations (the dev rows in the teacher; root of the mean square over
matrices), its dev metric before any training, and after a short distillation. Then the best of
them is trained as long with less to learn from.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, options, publish

CASES: dict[str, dict[str, Any]] = {
    "plain SVD": {},
    "data-aware SVD": {"data_aware": True},
    "plain SVD, ranks by energy": {"allocate": "energy"},
    "data-aware SVD, ranks by energy": {"data_aware": True, "allocate": "energy"},
}

FULL = {"alpha": 0.5, "temperature": 10.0, "cls": 100.0}

LESS: dict[str, dict[str, float]] = {
    "labels alone": {},
    "labels and logits": {"alpha": 0.5, "temperature": 10.0},
}
"""What a student learns from, less than ``FULL``, which has the [CLS] states too."""


def recipe_of(
    args: Any, keys: dict[str, Any], out: Path, kd: dict[str, float] | None = None
) -> Any:
    """A short training from the teacher; its dev metric is noted before the first step."""
    from raybert.recipe_file import recipe_from

    train = {"max_steps": args.steps, "lr": 5e-5, "keep": "last", "precision": "fp32"}
    return recipe_from(
        {
            "task": args.task,
            "data": {"source": args.data},
            "teacher": args.teacher,
            "method": [{"name": "lobert", "share": args.share, **keys}],
            "train": {"epochs": 100, **train},
            "kd": FULL if kd is None else kd,
            "measure": {"batches": []},
            "out": str(out),
        }
    )


def held_out_error(args: Any, keys: dict[str, Any], out: Path) -> float:
    """Factors as the run would have them, weighed by second moments of the dev rows."""
    import numpy as np

    from raybert.data import load_prepared, prepare
    from raybert.factors import dense_matrices, error_of_low_rank
    from raybert.lowrank import PARTS
    from raybert.models import load, load_tokenizer, model_folder
    from raybert.moments import second_moments

    recipe = recipe_of(args, keys, out)
    model = load(args.teacher)
    folder = str(model_folder(args.teacher))
    data = load_prepared(prepare(recipe.task, recipe.data, load_tokenizer(folder)).folder)

    def batches(split: str, rows: int) -> list[dict[str, Any]]:
        chosen = np.random.default_rng(0).permutation(len(data.splits[split]))[:rows]
        batcher = data.batcher(split)
        return [batcher(chosen[at : at + 32]) for at in range(0, len(chosen), 32)]

    method: Any = recipe.method[0].resolve(model.config)
    train = batches("train", method.calibration_rows) if method.data_aware else []
    method = method.settle(model, train)
    (phase,) = method.phases()
    phase.initialise(model, train)
    dense = dense_matrices(model)
    seen = {key: layer for key, layer in dense.items() if key[1] in method.svd}
    moments = second_moments(model, seen, batches("dev", 256))
    ranks = method.svd_ranks(model.config.num_hidden_layers)
    errors = []
    for (layer, name), moment in moments.items():
        if not ranks[layer][name]:
            errors.append(0.0)
            continue
        if name in PARTS:
            values = phase.values[layer, "attention"]
            before = sum(ranks[layer][part] for part in PARTS[: PARTS.index(name)])
            right = values["reduce.weight"][before : before + ranks[layer][name]]
            left = values[f"{name}.weight"]
        else:
            values = phase.values[layer, name]
            left, right = values["expand.weight"], values["reduce.weight"]
        weight = dense[layer, name].weight.detach()
        errors.append(error_of_low_rank(weight, left, right, moment))
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def trained(
    args: Any, keys: dict[str, Any], out: Path, kd: dict[str, float] | None = None
) -> tuple[float, float, float]:
    """The dev metric before and after the training, and the teacher's."""
    from raybert.run import compress

    folder = compress(recipe_of(args, keys, out, kd), tell=lambda text: None)
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "eval" and line["step"] == 0)
    return first[report["metric"]], report["student"]["score"], report["teacher"]["score"]


def main() -> None:
    """Measure, print and write."""
    parser = options("data-aware SVD against plain SVD", data=False, model=False)
    parser.add_argument("--teacher", required=True, help="a fine-tuned run or model folder")
    parser.add_argument("--data", required=True, help="its task's folder")
    parser.add_argument("--task", default="stsb")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=180, help="of distillation, 32 rows each")
    args = parser.parse_args()
    if args.quick:
        args.steps = 5
    figures, details = [], {}
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        for number, (name, keys) in enumerate(CASES.items()):
            missed = held_out_error(args, keys, Path(folder) / "none")
            before, after, teacher = trained(args, keys, Path(folder) / str(number))
            details[name] = {"error": missed, "before": before, "after": after, "teacher": teacher}
            print(f"{name}: {details[name]}", flush=True)
            figures += [
                Figure(f"{name}: error on held-out activations", 100 * missed, "%"),
                Figure(f"{name}: dev metric before training", before, ""),
                Figure(f"{name}: dev metric after {args.steps} steps", after, ""),
            ]
        best = list(CASES)[-1]
        for name, kd in LESS.items():
            place = Path(folder) / name.replace(" ", "-")
            _, after, _ = trained(args, CASES[best], place, kd)
            details[name] = {"after": after}
            print(f"{name}: {after}", flush=True)
            what = f"{best}: dev metric after {args.steps} steps on {name}"
            figures.append(Figure(what, after, ""))
    title = f"Data-aware factors at {args.share:g} of the encoder's parameters, {args.task}"
    publish(args, title, figures, details)


if __name__ == "__main__":
    main()
