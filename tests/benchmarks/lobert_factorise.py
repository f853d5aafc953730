"""How long it takes to factorise BERT-base (12 layers, 768, 3072) by every mode of LoBERT.

    python tests/benchmarks/lobert_factorise.py

Trained weights take as long as random ones. The time is that of `initialise`, with the
reconstruction errors that it reports, at the released ranks and on two threads.
"""

from __future__ import annotations

import time
from typing import Any

from common import Figure, options, publish

CASES: dict[str, dict[str, Any]] = {
    "self_svd": {"ffn": None},
    "self_tucker_layer": {"attention": "self_tucker_layer", "ffn": None},
    "self_falcon_layer": {"attention": "self_falcon_layer", "ffn": None},
    "self_tucker_vertical": {"attention": "self_tucker_vertical", "ffn": None},
    "self_falcon_vertical": {"attention": "self_falcon_vertical", "ffn": None},
    "self_tucker_4d": {"attention": "self_tucker_4d", "ffn": None},
    "self_falcon_4d": {"attention": "self_falcon_4d", "ffn": None},
    "ffn_svd": {"attention": None},
    "ffn_tucker": {"attention": None, "ffn": "ffn_tucker"},
    "self_svd + ffn_svd, data-aware (256 x 64 tokens)": {"data_aware": True},
}


def encoder_of(quick: bool) -> Any:
    """A random BERT-base, or for trials a small one, with a classification head."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
    }
    config = BertConfig(**(small if quick else {}))
    return AutoModelForSequenceClassification.from_config(config).eval()


def calibration(model: Any, rows: int) -> list[dict[str, Any]]:
    """Rows of random tokens, none of them padding."""
    import torch

    batches = []
    for seed in range(rows // 32):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, model.config.vocab_size, (32, 64), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def measure(args: Any) -> dict[str, float]:
    """Seconds of each case."""
    import torch

    from raybert.methods.lobert import LoBERT

    torch.set_num_threads(2)
    model = encoder_of(args.quick)
    seconds = {}
    for name, keys in CASES.items():
        if args.only and args.only not in name:
            continue
        method = LoBERT.model_validate(keys).resolve(model.config)
        (phase,) = method.phases()
        batches = calibration(model, 32 if args.quick else 256) if method.data_aware else []
        began = time.perf_counter()
        phase.initialise(model, batches)
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = options("factorising BERT-base by every mode of LoBERT", model=False)
    parser.add_argument("--only", help="cases whose name holds this")
    args = parser.parse_args()
    seconds = measure(args)
    figures = [
        Figure(f"factorising BERT-base, {name}", value, "s", 120.0)
        for name, value in seconds.items()
    ]
    publish(args, "Factorising BERT-base (two threads)", figures, {"seconds": seconds})


if __name__ == "__main__":
    main()
