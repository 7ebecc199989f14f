"""Groups of replies to one prompt, as online RL and pass@k draw them, against prompts repeated."""

from collections.abc import Iterator

import torch

from experiments.bench_measure import Bench, Row
from experiments.bench_step import RECIPE
from experiments.bench_step_worker import objective_of
from sandbox.data.charts import Charts
from sandbox.data.prompt import Prompt


def groups(bench: Bench) -> Iterator[Row]:
    """Replies to questions about charts, sampled in groups, against repeated prompts."""
    torch.manual_seed(0)
    model = objective_of(RECIPE).model.to(bench.device).eval()
    prompts, replies = bench.pick((16, 16), (2, 3))
    samples = [Charts().sample("test", index) for index in range(prompts)]
    asked = [Prompt.ask(sample.questions[0].text, sample.images) for sample in samples]
    repeated = [prompt for prompt in asked for _ in range(replies)]
    seeds = [100 * number + n for number in range(prompts) for n in range(replies)]
    for tokens in bench.pick((24, 4), (3,)):

        def together(tokens: int = tokens) -> list[str]:
            each = [100 * number for number in range(prompts)]
            found = model.generate_groups(
                asked, replies=replies, temperature=1.0, max_tokens=tokens, seed=each
            )
            return [reply for group in found for reply in group]

        def apart(tokens: int = tokens) -> list[str]:
            return model.generate(repeated, temperature=1.0, max_tokens=tokens, seed=seeds)

        if together() != apart():
            raise RuntimeError(f"groups of {tokens} tokens: other replies than of repeated prompts")
        ours, peer = bench.interleave(bench.timer(together), bench.timer(apart))
        what = f"{prompts} prompts x {replies} replies x {tokens} tokens"
        yield Row("groups", what, ours, "ours, prompts repeated", peer)
