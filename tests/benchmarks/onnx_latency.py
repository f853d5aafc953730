"""Compressed models in ONNX Runtime against their teacher in its best stock form, by the clock.

    python tests/benchmarks/onnx_latency.py [MODEL ...]

The teacher's best stock form is ONNX Runtime on the float32 graph that raybert exports, or PyTorch
with fused attention, whichever is faster at a shape. A forward pass takes as long whatever the
weights are, so students are the encoder after each method's surgery, without training; Q8BERT's
ranges are calibrated on random rows. ONNX Runtime's own dynamic quantisation gets raybert's graph
of the teacher, which it runs faster than the one that PyTorch's exporter writes. MODEL names
further runs, model folders or exported folders to be timed beside.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, Speedup, against_teacher, encoder, latencies, options, publish

SHAPES = [(1, 128), (8, 128)]

HALF = {"name": "theseus"}
LOW_RANK = {"name": "lobert", "share": 0.5}
INTEGER = {"name": "q8bert"}

CHAINS: dict[str, list[dict[str, Any]]] = {
    "theseus": [HALF],
    "lobert": [LOW_RANK],
    "q8bert": [INTEGER],
    "theseus + lobert + q8bert": [HALF, LOW_RANK, INTEGER],
}

FASTER = {
    **{("theseus", *shape): 1.9 for shape in SHAPES},
    **{("lobert", *shape): 1.6 for shape in SHAPES},
    ("q8bert", 1, 128): 1.8,
    **{("theseus + lobert + q8bert", *shape): 4.0 for shape in SHAPES},
}
"""Student, batch size and length -> how many times as fast as the teacher it has to be."""

SMALLER = {"q8bert": 3.5, "theseus + lobert + q8bert": 6.0}
"""Student -> how many times smaller: q8bert the file, the chain the weights without embeddings."""

STOCK = "ONNX Runtime's dynamic quantisation"


def compressed(name: str, chain: list[dict[str, Any]]) -> Any:
    """The encoder with a classification head after a chain's surgery."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from raybert.compressed import mark_compressed
    from raybert.methods import METHODS

    config = AutoConfig.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config).eval()
    ids = torch.randint(5, config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    for entry in chain:
        method = METHODS[entry["name"]].model_validate(entry).resolve(model.config)
        method = method.settle(model, batches)
        for phase in method.phases():
            phase.initialise(model, batches)
            phase.prepare(model)
            phase.finish(model)
        if method.leaves_trace:
            mark_compressed(model, method)
    return model.eval()


def write(model: Any, folder: Path, **how: Any) -> Path:
    """A model's graph and config."""
    import onnx

    from raybert.onnx_trace import to_onnx

    folder.mkdir()
    onnx.save(to_onnx(model, **how), folder / "model.onnx")
    model.config.save_pretrained(folder)
    return folder


def stock_int8(teacher: Path, folder: Path) -> Path:
    """The teacher's graph as ONNX Runtime's own tool quantises it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir()
    shutil.copyfile(teacher / "config.json", folder / "config.json")
    quantize_dynamic(
        teacher / "model.onnx",
        folder / "model.onnx",
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # it takes Attention for another one
    )
    return folder


def encoder_bytes(folder: Path) -> int:
    """Bytes of a graph's weights but for the embedding tables."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return sum(array.nbytes for name, array in arrays.items() if "embeddings" not in name)


def folders(args: Any, root: Path) -> dict[str, Path]:
    """Every graph that is timed, by what it is called in the table."""
    from raybert.models import load, model_folder

    name = encoder(args)
    teacher = compressed(name, [])
    teacher.save_pretrained(root / "torch")
    found = {"teacher": write(teacher, root / "teacher")}
    found[STOCK] = stock_int8(found["teacher"], root / "stock")
    for number, (label, chain) in enumerate(CHAINS.items()):
        model = compressed(name, chain)
        found[label] = write(model, root / f"student{number}")
        if label == "q8bert":
            found["q8bert (qdq)"] = write(model, root / "qdq", int8="qdq")
    for number, given in enumerate(args.models):
        path = Path(given).expanduser()
        label = "/".join(path.parts[-2:])
        done = (path / "model.onnx").is_file()
        found[label] = path if done else write(load(model_folder(path)), root / f"given{number}")
    return found


def measure(args: Any) -> dict[str, Any]:
    """Latency rows of all graphs and of the teacher in PyTorch, and bytes."""
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        root = Path(folder)
        paths = folders(args, root)
        rows = latencies(args, "onnx", paths, SHAPES)
        rows += latencies(args, "torch", {"teacher": root / "torch"}, SHAPES)
        file = {label: (path / "model.onnx").stat().st_size for label, path in paths.items()}
        encoders = {label: encoder_bytes(path) for label, path in paths.items()}
    return {"latency": rows, "file_bytes": file, "encoder_bytes": encoders}


def figures(found: dict[str, Any], faster: list[Speedup]) -> list[Figure]:
    """Speed-ups over the stock tool, and sizes."""
    times = {(one.model, one.batch): one.speedup for one in faster}
    made = [
        Figure(
            f"q8bert, batch {batch}, against {STOCK}",
            times["q8bert", batch] / times[STOCK, batch],
            "x",
            1.0,
            at_most=False,
        )
        for batch, _ in SHAPES
    ]
    for name, limit in SMALLER.items():
        kind = "file_bytes" if name == "q8bert" else "encoder_bytes"
        what = "file" if name == "q8bert" else "weights without embeddings"
        ratio = found[kind]["teacher"] / found[kind][name]
        made.append(Figure(f"{name}: {what}, smaller by", ratio, "x", limit, at_most=False))
    return made


def main() -> None:
    """Measure, print and write."""
    parser = options("compressed models in ONNX Runtime against their teacher", timed=True)
    parser.add_argument("models", nargs="*", help="further runs, model or exported folders")
    args = parser.parse_args()
    found = measure(args)
    faster = against_teacher(found["latency"], FASTER, best_form=True)
    publish(args, "Graphs of all methods", figures(found, faster), found, faster)


if __name__ == "__main__":
    main()
