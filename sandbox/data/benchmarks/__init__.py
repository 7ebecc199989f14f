"""Published benchmarks, read from their official files; others from JSON lines or parquet."""

from sandbox.data.benchmarks.chartqa import ChartQA
from sandbox.data.benchmarks.docvqa import DocVQA
from sandbox.data.benchmarks.easy_vqa import EasyVQA
from sandbox.data.benchmarks.jsonl import JsonlQA
from sandbox.data.benchmarks.parquet import ParquetQA
from sandbox.data.benchmarks.vqav2 import VQAv2

__all__ = ["ChartQA", "DocVQA", "EasyVQA", "JsonlQA", "ParquetQA", "VQAv2"]
