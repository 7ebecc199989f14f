"""A checkpoint on ChartQA's test split: `sandbox evaluate` as a function.

uv run python experiments/evaluate_chartqa.py RUN DATA OUT
"""

import sys

from rich.console import Console

from sandbox.evals.benchmark import evaluate_benchmark

if __name__ == "__main__":
    checkpoint, data, out = sys.argv[1:]
    results = evaluate_benchmark(checkpoint, "chartqa", data=data, out=out)
    Console().print(results.table())
