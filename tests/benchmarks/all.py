"""All benchmarks of speed and memory, one after the other, and then the README's tables.

    python tests/benchmarks/all.py --data glue/MRPC

Run it on a quiet machine. ``--quick`` tries every script out and leaves the results alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import HERE, options

WITH_DATA = ("tokens", "step_time", "distillation_step", "cached_step")
WITHOUT = ("memory", "lobert_factorise", "tune_overhead", "tune_grid")
WITHOUT += ("onnx_latency", "theseus_latency", "lobert_latency", "q8bert_latency")
WITHOUT += ("ebert_latency", "ma_bert_latency")


def main() -> int:
    """Run them; the number of those that failed."""
    args = options("all benchmarks in turn", data=True).parse_args()
    shared = ["--quick"] * args.quick + (["--model", args.model] if args.model else [])
    data = ["--data", str(Path(args.data))] if args.data else []
    failed = []
    for name in (*WITH_DATA, *WITHOUT):
        words = [*shared, *(data if name in WITH_DATA else [])]
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *words]).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    elif not args.quick and (HERE.parents[1] / "README.md").is_file():
        subprocess.run([sys.executable, str(HERE / "tables.py")], check=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
