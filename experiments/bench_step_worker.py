"""One side of section ``step``: the quickstart's training step by whatever code is on PYTHONPATH.

``bench_step`` starts this file once for each side and asks it over pipes, one JSON object a line.
It must run with older code too, so it uses only what that has had for long, and nothing of the
``experiments`` beside it.
"""

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sandbox
from sandbox.allocator import keep_freed_memory
from sandbox.data.batch import IGNORE, collate
from sandbox.data.task import Question, Sample
from sandbox.train.optim import build_optimizer

PARTS = ("collate", "forward", "backward", "update")
ROOT = Path(sandbox.__file__).parents[1]
LONG = 16  # a bool tensor whose last two axes are at least so long is taken for a mask


class Side:
    """The quickstart's objective, its optimizer, and batches of the samples that both sides get.

    Args:
        recipe: ``quickstart.yaml``, whose ``model`` is built.
        samples: pickle file: batches as lists of samples in plain values.
        weights: file of weights to load, or to write where it does not exist.
        compile: give the objective ``compile: true``.
    """

    def __init__(self, recipe: str, samples: str, weights: str, *, compile: bool) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        seed_everything(0, verbose=False)
        trainer = yaml.safe_load(Path(recipe).read_text())["trainer"]
        self.clip = trainer["gradient_clip_val"]
        self.objective: Any = objective_of(recipe, compile=compile)
        if Path(weights).exists():
            self.objective.model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            torch.save(self.objective.model.state_dict(), weights)
        if compile:
            from sandbox.train.objective import compile_parts  # older code cannot

            compile_parts(self.objective.model)
        self.optimizer, self.schedule = build_optimizer(
            self.objective, self.objective.optimizer, trainer["max_steps"]
        )
        encoder = self.objective.model.prompts
        self.encoded = [
            [encoder.encode_sample(revived(sample)) for sample in batch]
            for batch in pickle.loads(Path(samples).read_bytes())
        ]

    def facts(self) -> dict[str, Any]:
        """Where the code is from, and what must be equal on both sides."""
        labels = sum(int((batch.labels != IGNORE).sum()) for batch in map(collate, self.encoded))
        return {"root": str(ROOT), "labels": labels}

    def masks(self) -> dict[str, int]:
        """Bytes of masks: the largest of a step, all that backward keeps, and those of segments."""
        batch = collate(self.encoded[0])
        of_segments = 0
        spy, saved = Masks(batch.tokens.shape[1]), dict[int, int]()

        def keep(tensor: Tensor) -> Tensor:
            if spy.is_mask(tensor):
                storage = tensor.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.compiler.set_stance("force_eager"), spy, hooks:
            self.objective.loss(batch)
        if find_spec("sandbox.backbone.backends"):
            from sandbox.backbone.backends import cpu

            plans: dict[int, Any] = {}
            found = cpu.plan_of

            def noted(*arguments: Any) -> Any:
                plan = found(*arguments)
                plans[id(plan)] = plan
                return plan

            cpu.plan_of = noted  # type: ignore[assignment]
            try:
                with torch.compiler.set_stance("force_eager"):
                    self.objective.loss(batch)
            finally:
                cpu.plan_of = found
            of_segments = sum(plan.mask_bytes for plan in plans.values())
        saved_bytes = sum(saved.values())
        return {"largest": spy.largest, "saved": saved_bytes, "segments": of_segments}

    def steps(self) -> dict[str, Any]:
        """CPU seconds a step, by part, over all batches; and the losses.

        Stacking the rows counts too: code may do there what it would else do in the model.
        """
        spent, losses = dict.fromkeys(PARTS, 0.0), []

        def timed(part: str, call: Callable[[], Any]) -> Any:
            start = time.process_time()
            result = call()
            spent[part] += time.process_time() - start
            return result

        for examples in self.encoded:
            batch = timed("collate", partial(collate, examples))
            loss = timed("forward", partial(self.objective.loss, batch))
            timed("backward", loss.backward)
            timed("update", self._update)
            losses.append(float(loss.detach()))
        return {part: seconds / len(losses) for part, seconds in spent.items()} | {"losses": losses}

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


class Masks(TorchDispatchMode):
    """Notes the bytes of the largest attention mask that any operation returns.

    A mask is a bool or float tensor that ends in ``[T, T]``, T being the tokens of a row, or a bool
    tensor of three axes or more that ends in two long ones.
    """

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T, self.largest = T, 0

    def is_mask(self, x: Tensor) -> bool:
        """Whether a tensor looks like one."""
        if x.ndim < 2 or not (x.dtype == torch.bool or x.is_floating_point()):
            return False
        square = x.shape[-2:] == (self.T, self.T)
        return square or (x.dtype == torch.bool and x.ndim > 2 and min(x.shape[-2:]) >= LONG)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation and look at its results."""
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and self.is_mask(x):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def objective_of(recipe: str | Path, *, compile: bool = False) -> Any:
    """The objective that a recipe's ``model`` describes, in training mode."""
    model = yaml.safe_load(Path(recipe).read_text())["model"]
    if compile:
        model["init_args"]["compile"] = True
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    return parser.instantiate(parser.parse_object({"model": model})).model.train()


def revived(sample: dict[str, Any]) -> Sample:
    """A sample of this side's code from plain values."""
    images = tuple(Image.fromarray(pixels) for pixels in sample["images"])
    questions = tuple(Question(*question) for question in sample["questions"])
    return Sample(images, questions, sample["content"])


def main() -> None:
    """Answer requests until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the error stream
    side: Side | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "start":
            side = Side(**request)
            result = side.facts()
        else:
            assert side is not None
            result = {"masks": side.masks, "steps": side.steps}[do]()
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
