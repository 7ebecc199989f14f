"""A checkpoint on VQAv2's validation split: `sandbox evaluate` as a function.

uv run python experiments/evaluate_vqa.py RUN DATA OUT
"""

import sys

from rich.console import Console

from sandbox.evals.benchmark import evaluate_benchmark

if __name__ == "__main__":
    checkpoint, data, out = sys.argv[1:]
    results = evaluate_benchmark(checkpoint, "vqav2", data=data, split="val", out=out)
    Console().print(results.table())
