"""Export a finished model to a folder that plain ONNX Runtime runs, checked before it is there.

    raybert export runs/mrpc-theseus

The folder holds ``model.onnx``, the tokenizer, ``inference.py`` (which needs neither raybert nor
PyTorch) and ``export.json``: how the graph's logits and score compare with the model's, and how
fast it is beside its teacher, exported the same way and timed in the same run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from raybert import __version__
from raybert.bench import hardware, parameters
from raybert.compressed import finished, longest_input
from raybert.config import Recipe
from raybert.data import TaskData, prepare
from raybert.errors import UserError
from raybert.folders import whole
from raybert.grid import may_saturate
from raybert.int8 import Int8Linear
from raybert.integer import products_may_saturate
from raybert.latency import latency, speedups
from raybert.models import (
    PROBE,
    brought_here,
    check_head,
    check_length,
    load,
    load_tokenizer,
    model_folder,
    read_config,
)
from raybert.parity import OnnxModel, logit_parity, metric_parity, probe_batches, real_batches
from raybert.qa import question_room
from raybert.recipe_file import load_recipe
from raybert.storage import check_writable, path_of, pull, push
from raybert.surgery import family
from raybert.tables import escape_markdown, markdown_table, score

Int8 = Literal["fused", "qdq"]

FILE = "model.onnx"
REPORT = "export.json"
SCRIPT = Path(__file__).parent / "templates" / "inference.py"

INTEGER_NODES = {"QuantizeLinear", "MatMulIntegerToFloat"}

LARGEST_FILE = 2**31 - 2**20
"""Bytes that a protobuf file can hold, about; beyond it weights lie in a file beside the graph."""


def export(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    against: str | Path | None = None,
    int8: Int8 = "fused",
    time: bool = True,
    threads: int | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = print,
) -> Path:
    """Export a model to ONNX, check it, time it, and put the folder in its place.

    Args:
        model: run or model folder.
        recipe: of the run, or a task and data; nothing: parity is checked on the inputs stored with
            the model, and no metric.
        out: folder to write; nothing: ``onnx`` in the run or model folder.
        against: the teacher, run or model folder; nothing: the recipe's, or the one fine-tuned in
            the run folder.
        int8: how integer products are written; see `raybert.onnx_int8`.
        time: measure latency, at the recipe's ``measure``.
        threads: CPU threads that latency is measured with; nothing: all cores.
        overwrite: replace an earlier export.
        tell: gets one line for each thing that happens.

    Returns:
        The folder.

    Raises:
        UserError: a package or file is missing, the model cannot be exported, or its graph does not
            compute the same; nothing was written.
    """
    need_packages(int8)
    from raybert.onnx_trace import to_onnx

    folder = model_folder(model)
    place = path_of(model)
    target = path_of(out) if out else place / "onnx"
    check_writable(target)
    pull(target)
    _check_target(target, overwrite)
    network = load(folder)
    tokenizer = load_tokenizer(str(folder))
    if recipe is not None:
        check_length(recipe.data, network.config, str(folder))
    data = _rows(recipe, tokenizer)
    if data is not None:
        check_head(str(folder), network.config, data.task)
    teacher = _teacher(place, recipe, against) if time else None
    tell(f"exporting {folder}")
    graph = to_onnx(network, int8=int8)
    integer = any(node.op_type in INTEGER_NODES for node in graph.graph.node)
    with whole(target) as partial:
        _fill(partial, graph, network, tokenizer, folder)
        found: dict[str, Any] = {
            "raybert": __version__,
            "format": "onnx",
            "int8": int8 if integer else None,
            "model": _settings(network, tokenizer, recipe, data),
            "parameters": parameters(network),
            "bytes": sum(file.stat().st_size for file in partial.glob(f"{FILE}*")),
            **_compared(partial / FILE, network, folder, recipe, data, integer, tell),
        }
        found |= _timed(partial, teacher, recipe, int8, threads, tell) if time else _untimed()
        found["hardware"] = hardware()
        _write_report(partial, found)
    push(target, last=REPORT)
    return target


# -- before ----------------------------------------------------------------------------------------


LEAST = ("1.23", "1.24")
"""The first ONNX Runtime with the operators of exported graphs, and with those of ``qdq``."""


def need_packages(int8: Int8 = "fused") -> None:
    """Refuse to export without the packages that it takes.

    Raises:
        UserError: one is not installed, or is too old.
    """
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'export needs {" and ".join(missing)}; run: pip install "raybert[onnx]"')
    import onnxruntime

    there, least = onnxruntime.__version__, LEAST[int8 == "qdq"]
    if [int(part) for part in there.split(".")[:2]] < [int(part) for part in least.split(".")]:
        raise UserError(
            f"onnxruntime is {there}, and {least} is the first with the operators of such graphs; "
            f'run: pip install "onnxruntime>={least}"'
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    ours = (target / REPORT).is_file() and (target / FILE).is_file()
    if not ours and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(
            f"{target} exists and is not an exported model; nothing in it is touched. Choose "
            "another --out."
        )
    if ours and not overwrite:
        raise UserError(
            f"{target} holds an exported model already. Add --overwrite to replace it, or choose "
            "another --out."
        )


def _rows(recipe: Recipe | None, tokenizer: Any) -> TaskData | None:
    if recipe is None:
        return None
    data = prepare(recipe.task, recipe.data, tokenizer)
    if "dev" not in data.splits:
        raise UserError(f"task {recipe.task} has no dev rows to check on; name a file: data.dev=.")
    return data


def _teacher(model: Path, recipe: Recipe | None, against: str | Path | None) -> Path | None:
    """The model folder of the teacher that latency is compared with."""
    if against is not None:
        return brought_here(against)
    if pull(model / "teacher" / "recipe.yaml"):
        return model_folder(model / "teacher")
    if recipe is None or recipe.teacher is None:
        return None
    try:
        return brought_here(recipe.teacher)
    except UserError as error:
        raise UserError(
            f"{error} Name another teacher with --against, or leave the timing out with "
            "--no-latency."
        ) from None


def is_own(run: Path, recipe: Recipe, against: str | Path | None) -> bool:
    """Whether an export of a run is of the run's own rows and teacher, as its report is.

    Args:
        run: its folder.
        recipe: that it was exported with.
        against: the teacher that it was exported beside, if one was named.
    """
    made = load_recipe(str(run / "recipe.yaml"))
    if (recipe.task, recipe.data) != (made.task, made.data):
        return False
    return against is None or _teacher(run, recipe, against) == _teacher(run, made, None)


def _probe(folder: Path) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    if not (folder / PROBE).is_file():
        raise UserError(
            f"{folder} has no stored inputs ({PROBE}) to compare logits on. Name its task and "
            "data: task=... data=..."
        )
    return probe_batches(load_file(folder / PROBE))


# -- the folder ------------------------------------------------------------------------------------


def _fill(partial: Path, graph: Any, network: Any, tokenizer: Any, folder: Path) -> None:
    """Write all that inference needs: the graph, the config, the tokenizer and the script."""
    _write_graph(graph, partial / FILE)
    network.config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if not (partial / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no fast tokenizer (tokenizer.json), which inference.py reads. Load it "
            "once with transformers' AutoTokenizer and save it again."
        )
    shutil.copyfile(SCRIPT, partial / "inference.py")


def _compared(
    graph: Path,
    network: Any,
    folder: Path,
    recipe: Recipe | None,
    data: TaskData | None,
    integer: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """How the graph's logits and score compare with the model's: ``parity``, ``metrics``, and
    ``notes`` on both."""
    exported = OnnxModel(graph)
    tell("comparing logits")
    batches = real_batches(data, "dev") if data is not None else _probe(folder)
    found: dict[str, Any] = {
        "parity": logit_parity(network, exported, batches, integer=integer),
        "metrics": None,
        "notes": [
            text for method in finished(network.config) for text in method.graph_remarks(network)
        ]
        + saturating(network),
    }
    if data is not None:
        assert recipe is not None
        tell(f"scoring the dev rows of {data.task.name}")
        rows = recipe.train.eval_batch_size
        found["metrics"] = metric_parity(network, exported, data, rows, integer=integer)
    else:
        found["notes"].append(
            "No task was given, so logits were compared on the inputs stored with the model "
            "and no metric was computed. Name it: task=... data=..."
        )
    return found


def saturating(network: Any) -> list[str]:
    """What is to be said of integer products that older processors cut off."""
    layers = [
        module
        for module in network.modules()
        if isinstance(module, Int8Linear) and module.scheme.inputs != "float"
    ]
    number = sum(may_saturate(layer.matrix()[0]) for layer in layers)
    can = (
        "can leave 16 bits, which processors without VNNI instructions (AVX2, first AVX-512) cut "
        "off: compare scores on the processor that the model will run on."
    )
    found = []
    if number:
        found.append(
            f"The products of {number} of {len(layers)} matrices {can} Those of "
            "method.q8bert.weight_bits=7 cannot, anywhere."
        )
    if products_may_saturate(network):
        found.append(
            f"Products of two activations, which q8bert.integer_only does in integers, {can} With "
            "method.q8bert.weight_bits=7 they have 7 bits on one side, and cannot, anywhere."
        )
    return found


def _write_graph(graph: Any, file: Path) -> None:
    import onnx

    large = graph.ByteSize() > LARGEST_FILE
    onnx.save(graph, file, save_as_external_data=large, location=f"{file.name}.data")


def _settings(network: Any, tokenizer: Any, recipe: Recipe | None, data: TaskData | None) -> Any:
    """What `inference.py` needs to know of the model."""
    config = network.config
    kind = data.task.kind if data is not None else _kind(network)
    longest = longest_input(config)
    length = recipe.data.max_length if recipe is not None else min(longest, 384)
    settings: dict[str, Any] = {
        "kind": kind,
        "family": family(config),
        "max_length": length,
        "token_types": "token_type_ids" in tokenizer.model_input_names,
        "pad_id": tokenizer.pad_token_id,
        "mask_id": tokenizer.mask_token_id,
        "mask": tokenizer.mask_token,
        "longest": longest,
        "pairs": data is not None and data.task.text_pair is not None,
    }
    if kind in ("classification", "multilabel"):
        settings["labels"] = [config.id2label[i] for i in range(config.num_labels)]
    if kind == "qa":
        from raybert.config import DataConfig

        whole = DataConfig(max_length=length, stride=min(128, length // 3))
        options = recipe.data if recipe is not None else whole
        settings |= {
            "stride": options.stride,
            "question": question_room(options, tokenizer),
            "max_answer": options.max_answer,
            "no_answer": data.task.no_answer if data is not None else False,
        }
    return settings


def _kind(network: Any) -> str:
    """The kind of task that a head is for."""
    architecture = type(network).__name__
    if architecture.endswith("ForQuestionAnswering"):
        return "qa"
    if architecture.endswith("ForMaskedLM"):
        return "mlm"
    problem = network.config.problem_type
    if problem == "multi_label_classification":
        return "multilabel"
    alone = problem is None and network.config.num_labels == 1
    return "regression" if problem == "regression" or alone else "classification"


# -- time ------------------------------------------------------------------------------------------


def _untimed() -> dict[str, Any]:
    return {"latency": [], "speedup": []}


def _timed(
    partial: Path,
    teacher: Path | None,
    recipe: Recipe | None,
    int8: Int8,
    threads: int | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Latency of the graph, and of its teacher's, exported the same way into a passing folder."""
    from raybert.config import MeasureConfig

    measure = recipe.measure if recipe is not None else MeasureConfig()
    if not measure.batches:
        return _untimed()
    tell("timing" + (" beside the teacher" if teacher else ""))
    with tempfile.TemporaryDirectory(prefix="raybert-export-") as passing:
        models = {"model": partial}
        configs = [read_config(str(partial))]
        if teacher is not None:
            models["teacher"] = export_graph(teacher, Path(passing), int8)
            configs.append(read_config(str(teacher)))
        length = min(measure.length, *map(longest_input, configs))
        shapes = [(batch, length) for batch in measure.batches]
        rows = latency(models, shapes, backend="onnx", threads=threads, seconds=measure.seconds)
    faster = speedups(rows, "teacher") if teacher is not None else []
    return {"latency": rows, "speedup": faster}


def export_graph(model: Path, folder: Path, int8: Int8 = "fused") -> Path:
    """Write a model's graph and its configuration, all that timing it takes, into a folder."""
    from raybert.onnx_trace import to_onnx

    network = load(model)
    _write_graph(to_onnx(network, int8=int8), folder / FILE)
    network.config.save_pretrained(folder)
    return folder


# -- the report ------------------------------------------------------------------------------------


def _write_report(partial: Path, found: Mapping[str, Any]) -> None:
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (partial / REPORT).write_text(text + "\n", encoding="utf-8")
    (partial / "README.md").write_text(_readme(found), encoding="utf-8")


def _readme(found: Mapping[str, Any]) -> str:
    model, least = found["model"], LEAST[found["int8"] == "qdq"]
    asked = f"a text with {model.get('mask')} in it" if model["kind"] == "mlm" else "a text"
    pairs = model.get("pairs")  # which older exports, timed anew, do not tell
    second = ' "a context"' if model["kind"] == "qa" else ' "a second text"' if pairs else ""
    return (
        f"# Exported model\n\n"
        f"Written by raybert {__version__}. `model.onnx` runs in ONNX Runtime {least} or later, on "
        f"any batch size, and rows of up to {model.get('longest', model['max_length'])} tokens.\n\n"
        f'```bash\npip install "onnxruntime>={least}" numpy tokenizers\n'
        f'python inference.py "{asked}"{second}\n```\n\n{format_export(found)}'
    )


def read_export(folder: Path) -> dict[str, Any]:
    """What an exported folder's ``export.json`` says."""
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def add_latency(folder: Path, found: Mapping[str, Any]) -> None:
    """Put ``latency`` and ``speedup`` rows in the place of an exported folder's own."""
    _write_report(folder, {**read_export(folder), **found, "hardware": hardware()})
    push(folder, last=REPORT)


def format_export(found: Mapping[str, Any]) -> str:
    """An ``export.json`` as Markdown that is also readable as plain text."""
    parity, model = found["parity"], found["model"]
    form = f"int8 ({found['int8']})" if found["int8"] else "float32"
    lines = [
        f"{model['kind']}, {form}, {found['bytes'] / 1e6:.2f} MB (10^6 bytes). Logits differ from "
        f"PyTorch's by {parity['largest_difference']:.2g} at most, on {len(parity['shapes'])} "
        f"batches; they reach {parity['scale']:.2g}.",
        *found["notes"],
    ]
    parts = ["\n".join(lines)]
    if found["metrics"]:
        metrics = found["metrics"]
        rows = [
            [escape_markdown(name), score(value), score(metrics["onnx"][name])]
            for name, value in metrics["torch"].items()
        ]
        head = [f"dev ({metrics['rows']} rows)", "PyTorch", "ONNX Runtime"]
        parts.append(markdown_table(head, rows))
    if found["latency"]:
        ratio = {(r["batch"], r["length"]): f"{r['speedup']:.2f}x" for r in found["speedup"]}
        rows = [
            [
                row["model"],
                f"{row['batch']} x {row['length']}",
                f"{row['p50_ms']:.2f}",
                f"{row['p95_ms']:.2f}",
                f"{row['throughput']:.1f}",
                ratio.get((row["batch"], row["length"]), "") if row["model"] == "model" else "",
            ]
            for row in found["latency"]
        ]
        head = ["ONNX Runtime", "batch x length", "p50 (ms)", "p95 (ms)", "rows/s", "speed-up"]
        parts.append(markdown_table(head, rows))
        machine, threads = found["hardware"], found["latency"][0]["threads"]
        sets = ", ".join(machine["instructions"])
        parts.append(
            f"{machine['cpu']} ({sets}), {threads} threads, onnxruntime {machine['onnxruntime']}."
        )
    return "\n\n".join(parts) + "\n"
