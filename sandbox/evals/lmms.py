r"""Our checkpoints as a model of lmms-eval, with its hundreds of benchmarks.

lmms-eval finds `manifest` by the entry point in pyproject.toml, wherever both are installed. It is
no extra of this package, since it needs av<16 and an older protobuf than the versions that are
tested here. So give it an environment of its own; `--no-config` keeps uv from those versions ::

    uv venv lmms
    uv pip install --no-config --python lmms --editable . lmms-eval
    lmms/bin/python -m lmms_eval --model early_fusion_sandbox --model_args checkpoint=RUN \
        --tasks chartqa --batch_size 16

lmms-eval asks for replies (``generate_until``) or weighs given ones (``loglikelihood``). A request
names a row of the task's data set; pictures come from the task's ``doc_to_visual``. Facts were read
off lmms-eval 0.7.3: ``api/task.py`` (what a request holds), ``evaluator.py`` (what it asks of a
model) and ``models/registry_v2.py`` (how a plug-in is found).
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image as PILImage

from sandbox.checkpoint import load_model
from sandbox.data.batch import IGNORE, collate
from sandbox.data.media import load_image
from sandbox.data.prompt import Image, Prompt, Segment, Turn, Video
from sandbox.data.video import FRAME_SUFFIXES, load_video
from sandbox.devices import AUTO, choose
from sandbox.errors import UserError
from sandbox.evals.progress import Meter
from sandbox.generate import Sampling, inference
from sandbox.runs import find_weights

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ModuleNotFoundError:  # the class is still there to be read; lmms-eval alone runs it
    lmms = object

NAME = "early_fusion_sandbox"
MARK = re.compile(r"\s*(?:<image>|<video>)\s*")  # where tasks want a picture among the words

Thing = TypeVar("Thing")


def manifest() -> Any:
    """What lmms-eval's list of models learns of us: a name, and the path of the class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.{EarlyFusionSandbox.__name__}")


class EarlyFusionSandbox(lmms):
    """A checkpoint that lmms-eval asks.

    Args:
        checkpoint: file or run directory.
        batch_size: requests answered at a time.
        device: see ``devices.choose``; by default this process's GPU, or the CPU without one.
        frames: of each video, at equal distances.
        max_new_tokens: the longest reply where the task says nothing.
        seed: of the draws, for tasks that sample. Requests draw apart, so that a task that repeats
            its questions gets different replies; the same command gets the same ones.
        max_batch_size: lmms-eval passes it on; nothing needs it.
        precision: see ``devices.choose``; by default the dtype of the checkpoint.

    Raises:
        UserError: there is no such checkpoint or device, or the batch size is no number.
    """

    is_simple = True  # takes a text and pictures; "chat" models cannot weigh given replies

    def __init__(
        self,
        checkpoint: str | Path,
        batch_size: int | str = 1,
        device: str | None = None,
        frames: int = 8,
        max_new_tokens: int = 1024,
        seed: int = 0,
        max_batch_size: int | None = None,
        precision: str = AUTO,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"lmms-eval: --batch_size must be a number from 1 on, got {batch_size}")
        if device in (None, AUTO) and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun and accelerate set it
        self.batch_size = int(batch_size)
        self.placement = choose(device or AUTO, precision)
        self.device = self.placement.device
        self.model = self.placement.place(load_model(find_weights(checkpoint)))
        self.prompts = self.model.prompts
        self.frames = frames
        self.max_new_tokens = max_new_tokens
        self.seed = seed

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The replies, in the order of the requests.

        Each has the arguments (text, settings, doc_to_visual, row, task, split).

        Raises:
            UserError: a setting or a picture is of a kind that we do not have.
        """
        replies = [""] * len(requests)
        alike: dict[Sampling, list[int]] = defaultdict(list)  # may share a batch
        for number, request in enumerate(requests):
            alike[sampling(request.args[1], self.max_new_tokens)].append(number)
        with Meter() as meter:
            meter.start("lmms-eval", total=len(requests), done=0)
            for how, numbers in alike.items():
                for batch in _batches(numbers, self.batch_size):
                    prompts = [self._prompt(*_but_second(requests[n].args)) for n in batch]
                    seeds = [self.seed + n for n in batch]
                    with self.placement.context():
                        said = self.model.generate(prompts, **{**vars(how), "seed": seeds})
                    for number, reply in zip(batch, said, strict=True):
                        replies[number] = reply
                    meter.advance(meter.questions + len(batch), len(batch))
        return replies

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """How likely each given reply is: its log-probability, and whether greedy decoding says it.

        The pair is the ``text`` of a result, since lmms-eval makes a string of a bare pair, which
        its tasks cannot read then (``unwrap_generation_output``).

        Each request has the arguments (text, reply, doc_to_visual, row, task, split). The reply is
        a string, a choice of a multiple-choice task, or else a function of the row. For choices
        lmms-eval takes the *smallest* number as the model's (``process_results``, and tasks of its
        own kind), although its base class asks for log-probabilities; so for strings the sign is
        turned. The perplexity of other tasks does read log-probabilities.

        The log-probability is the sum over the reply's tokens, without the end of turn. White space
        around a reply, such as the space that lmms-eval puts before a choice, is left out: here a
        reply begins its own turn.

        Raises:
            NotImplementedError: a choice without its question, for ``acc_mutual_info``.
            UserError: a reply is empty, or a picture is of a kind that we do not have.
        """
        found: list[Any] = []
        with Meter() as meter:
            meter.start("lmms-eval", total=len(requests), done=0)
            for batch in _batches(requests, self.batch_size):
                for request, (log, greedy) in zip(batch, self._weigh(batch), strict=True):
                    weight = -log if isinstance(request.args[1], str) else log
                    found.append(GenerationResult(text=(weight, greedy)))
                meter.advance(len(found), len(batch))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{NAME} answers one question at a time: tasks of several rounds cannot be run"
        )

    def _weigh(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of every reply, and whether each of its tokens is the likeliest."""
        examples = []
        for request in requests:
            if len(request.args) == 2:
                raise NotImplementedError(
                    f"{NAME}: acc_mutual_info asks for a choice without its question, which "
                    "lmms-eval mixes up with the others; remove it from the task's metric_list"
                )
            reply, _, row, task, split = request.args[1:]
            if callable(reply):
                reply = reply(self.task_dict[task][split][row])
            asked = self._prompt(*_but_second(request.args))
            turns = [*asked.turns, Turn("assistant", [str(reply).strip()])]
            examples.append(self.prompts.encode(Prompt(turns)))
        batch = collate(examples, name="lmms-eval").to(self.device)
        spelled = batch.labels != IGNORE  # where the next token is one of a reply, or its end
        with inference(self.model), self.placement.context():
            hidden = self.model(batch).hidden[spelled]
            logs = self.model.backbone.unembed(hidden).float().log_softmax(dim=-1)
        targets = batch.labels[spelled]
        log = logs.gather(-1, targets[:, None]).squeeze(-1).double()
        greedy = logs.argmax(dim=-1) == targets
        lengths = spelled.sum(dim=1).tolist()
        return [
            (float(row[:-1].sum()), bool(hits[:-1].all()))  # all but the end of turn
            for row, hits in zip(log.split(lengths), greedy.split(lengths), strict=True)
        ]

    def _prompt(
        self, text: str, visual: Callable[..., Any], row: int, task: str, split: str
    ) -> Prompt:
        """The question as a turn of the user, with the row's pictures in their places."""
        shown = visual(self.task_dict[task][split][row]) or []
        return Prompt([Turn("user", content(text, [segment(each, self.frames) for each in shown]))])


def content(text: str, shown: Sequence[Segment]) -> list[Segment]:
    """Words and pictures in order.

    Each ``<image>`` or ``<video>`` of the text is a picture's place, if they are as many as the
    pictures; else all pictures come first, as in lmms-eval's own models ::

        "See <image> and <image>: same?", [A, B]    "See", A, "and", B, ": same?"
        "How many bars?", [A]                       A, "How many bars?"
    """
    words = MARK.split(text)
    if len(words) != len(shown) + 1:
        return [*shown, text]
    mixed = [words[0]]
    for picture, after in zip(shown, words[1:], strict=True):
        mixed += [picture, after]
    return [part for part in mixed if part != ""]


def segment(visual: Any, frames: int) -> Segment:
    """What a task shows, as part of a prompt.

    It is an image, or the path of one; or else the path of a video or a list of frames, of which
    ``frames`` are taken.

    Raises:
        UserError: it is something else, such as a sound, or cannot be read.
    """
    if isinstance(visual, PILImage.Image):
        return Image(visual)
    if isinstance(visual, str | Path):
        if Path(visual).suffix.lower() in FRAME_SUFFIXES:
            return Image(load_image(visual))
        return Video(*load_video(visual, frames=frames))
    if isinstance(visual, list | tuple | np.ndarray):
        return Video(*load_video(visual, frames=frames))
    raise UserError(
        f"lmms-eval: the task shows a {type(visual).__name__}; {NAME} takes images, paths of "
        "images or videos, and lists of frames"
    )


def sampling(settings: Mapping[str, Any], max_tokens: int) -> Sampling:
    """How a task's ``generation_kwargs`` want replies; what does not bear on them is ignored.

    ``do_sample: false`` is greedy, whatever the temperature beside it, as in transformers; many
    tasks write ``top_p: 0`` or null where they mean no limit.

    Raises:
        UserError: beam search or a penalty for repetition is asked for, or a value is out of range.
    """
    for name in ("num_beams", "repetition_penalty"):
        if (settings.get(name) or 1) != 1:
            raise UserError(
                f"lmms-eval: the task sets {name}={settings[name]}, which {NAME} does not have: "
                f"pass --gen_kwargs {name}=1 to go without, and say so beside the score"
            )
    sample, temperature = settings.get("do_sample"), settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if sample else 0.0
    until = settings.get("until") or ()
    return Sampling(
        max_tokens=settings.get("max_new_tokens") or max_tokens,
        temperature=0.0 if sample is False else temperature,
        top_k=settings.get("top_k") or 0,
        top_p=settings.get("top_p") or 1.0,
        stop=(until,) if isinstance(until, str) else tuple(filter(None, until)),
    )


def _but_second(arguments: Sequence[Any]) -> Sequence[Any]:
    """A request's arguments without settings or reply."""
    return (arguments[0], *arguments[2:])


def _batches(things: Sequence[Thing], size: int) -> list[Sequence[Thing]]:
    return [things[start : start + size] for start in range(0, len(things), size)]
