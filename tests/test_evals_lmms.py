"""The plug-in of lmms-eval: on its base class where it is installed, else on a stand-in."""

import abc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sandbox.checkpoint import save_model
from sandbox.data.batch import Batch, Example, collate
from sandbox.data.prompt import Image, Prompt, Segment, Turn, Video
from sandbox.errors import UserError
from sandbox.evals import lmms
from sandbox.evals.lmms import content, sampling, segment
from sandbox.generate import Sampling
from sandbox.model import VisionLanguageModel
from tests.asked import mixture

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
WORDINGS = ("colour?", "What is the colour of this?", "Tell the colour, please, of all.")
PLACE = (lambda row: row["images"], "squares", "test")


class StandIn(abc.ABC):
    """What lmms-eval's base class asks for and gives."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass
class Result:
    """A ``GenerationResult`` of lmms-eval."""

    text: Any


@dataclass
class Request:
    """An ``Instance`` of lmms-eval, of which a model reads ``args``."""

    args: tuple[Any, ...]


def squares() -> list[dict[str, Any]]:
    """Rows with a picture each, so different that they change the reply."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    return [
        {"images": [PILImage.fromarray(pixels)], "question": WORDINGS[number % 3]}
        for number, pixels in enumerate(noise)
    ]


@pytest.fixture
def model() -> VisionLanguageModel:
    return mixture()


@pytest.fixture
def load(
    tmp_path: Path, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Saves the model and loads it as lmms-eval does; the rows are the task `squares`."""
    found: Any = lmms
    if not INSTALLED:
        parts: dict[str, Any] = {"": {}, ".api": {}, ".api.model": {"lmms": StandIn}}
        parts[".api.instance"] = {"GenerationResult": Result}
        for name, things in parts.items():
            module = ModuleType(f"lmms_eval{name}")
            vars(module).update(things)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        spec = importlib.util.spec_from_file_location("lmms_over_stand_in", lmms.__file__)
        assert spec and spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)

    def make(**arguments: Any) -> Any:
        save_model(model, tmp_path / "model.safetensors")
        asked = found.EarlyFusionSandbox(checkpoint=tmp_path, device="cpu", **arguments)
        asked.task_dict["squares"] = {"test": squares()}
        return asked

    return make


def request(second: Any, row: int = 0, text: str | None = None) -> Request:
    """A request about a row, with settings or a reply."""
    visual, task, split = PLACE
    return Request((text or WORDINGS[row % 3], second, visual, row, task, split))


# --- Replies --------------------------------------------------------------------------------------


def test_replies_are_those_of_generate_in_the_order_of_the_requests(
    load: Callable[..., Any], model: VisionLanguageModel
) -> None:
    """Guards against replies that come back sorted by their settings, rows with the picture of
    another row, and a batch that takes the settings of its first request for all.
    """
    settings = [
        {"max_new_tokens": 6, "until": ["\n\n"]},
        {"max_new_tokens": 2, "until": ["\n\n"], "temperature": 0, "do_sample": False},
        {"max_new_tokens": 6, "until": []},
    ]
    asked = [request(settings[row % 3], row) for row in (3, 0, 6, 1, 5, 2, 4)]
    expected = []
    for each in asked:
        text, wanted, _, row, *_ = each.args
        prompt = Prompt.ask(text, squares()[row]["images"])
        length, stop = wanted["max_new_tokens"], wanted["until"]
        expected += model.generate([prompt], max_tokens=length, stop=stop)
    assert load(batch_size=2).generate_until(asked) == expected
    assert len(set(expected)) > 3, "a model that always says the same would hide a mix-up"


@pytest.mark.parametrize("shape", [str, lambda stop: [stop, "never said"]])
def test_until_cuts_the_reply(
    load: Callable[..., Any], model: VisionLanguageModel, shape: Callable[[str], Any]
) -> None:
    """lmms-eval allows a string for a list: its letters must not become stop strings."""
    prompt = Prompt.ask(WORDINGS[0], squares()[0]["images"])
    [whole] = model.generate([prompt], max_tokens=12)
    stop = whole[4:7]
    settings = {"max_new_tokens": 12, "until": shape(stop)}
    assert load().generate_until([request(settings)]) == [whole[: whole.find(stop)].strip()]


def test_repeated_questions_are_sampled_apart(load: Callable[..., Any]) -> None:
    """With one seed for all, the 64 samples of a pass@64 task would be one sample."""
    asked = [request({"max_new_tokens": 4, "temperature": 1.0})] * 6
    replies = load(batch_size=4).generate_until(asked)
    assert len(set(replies)) > 3
    assert load(batch_size=1).generate_until(asked) == replies
    assert load(seed=6).generate_until(asked) != replies


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Sampling(max_tokens=9)),
        ({"max_new_tokens": 3, "num_beams": 1, "top_p": 0}, Sampling(max_tokens=3)),
        ({"do_sample": False, "temperature": 0.2, "top_p": None}, Sampling(max_tokens=9)),
        ({"do_sample": True, "temperature": None}, Sampling(max_tokens=9, temperature=1.0)),
        ({"do_sample": True, "temperature": 0}, Sampling(max_tokens=9)),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(9, temperature=0.7, top_p=0.9)),
        ({"until": ["", "Q:"], "image_aspect_ratio": "pad"}, Sampling(9, stop=("Q:",))),
    ],
)
def test_settings_mean_what_they_mean_in_transformers(
    settings: dict[str, Any], expected: Sampling
) -> None:
    """Tasks write 0 and null for "off": taken literally, they stopped the run, or drew samples."""
    assert sampling(settings, max_tokens=9) == expected


@pytest.mark.parametrize("settings", [{"num_beams": 5}, {"repetition_penalty": 1.2}])
def test_settings_that_we_lack_are_refused(settings: dict[str, Any]) -> None:
    """A score without the beams that the task asks for would look like one with them."""
    with pytest.raises(UserError, match=rf"--gen_kwargs {next(iter(settings))}=1"):
        sampling(settings, max_tokens=9)


# --- Weighing given replies -----------------------------------------------------------------------


def ask(model: VisionLanguageModel, asked: list[Segment]) -> Example:
    """A turn of the user, and the header of the reply."""
    return model.prompts.encode(Prompt([Turn("user", asked)]), reply=True)


def weigh(model: VisionLanguageModel, asked: list[Segment], reply: str) -> tuple[float, bool]:
    """Log-probability of a reply and whether it is greedy, read token by token off the logits."""
    prompts = model.prompts
    example = ask(model, asked)
    spelled = prompts.tokenizer.encode(reply)
    tokens = torch.tensor([[*example.tokens, *spelled]])
    patches = tokens == prompts.tokenizer.special("<|patch|>")
    batch = Batch.of(tokens, patches=patches, tiles=torch.from_numpy(example.tiles))
    with torch.no_grad():
        logits = model(batch).logits[0]
    total, greedy = 0.0, True
    for place, token in enumerate(spelled, start=len(example) - 1):
        total += float(logits[place, token] - logits[place].logsumexp(0))
        greedy &= int(logits[place].argmax()) == token
    return total, greedy


def about(row: int) -> list[Segment]:
    """The question about a row."""
    return [*map(Image, squares()[row]["images"]), WORDINGS[row % 3]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_choice_weighs_what_the_logits_say(
    load: Callable[..., Any], model: VisionLanguageModel, batch_size: int
) -> None:
    """Guards against logits that are off by one place, a sum with the end of turn or a
    neighbour's padding in it, the space before a choice, and the sign: lmms-eval's multiple choice
    takes the smallest number as the answer.
    """
    [likely] = model.prompts.tokenizer.encode("7")
    [said] = model.generate_ids(collate([ask(model, about(0))]), max_tokens=1)
    with torch.no_grad():  # "7" shall be what greedy decoding says to the first row
        model.backbone.head.weight[likely] = 2 * model.backbone.head.weight[said[0]]
    rows = [(0, "7"), (1, "red"), (2, "a very long description of a colour"), (0, "blue"), (3, "7")]
    asked = [request(f" {reply}", row) for row, reply in rows]
    results = [each.text for each in load(batch_size=batch_size).loglikelihood(asked)]
    expected = [weigh(model, about(row), reply) for row, reply in rows]
    assert [-lost for lost, _ in results] == pytest.approx([log for log, _ in expected], abs=2e-5)
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    assert results[0][1]
    assert not results[1][1]


def test_a_target_made_of_the_row_keeps_its_sign(
    load: Callable[..., Any], model: VisionLanguageModel
) -> None:
    """Perplexity, unlike multiple choice, takes a log-probability as such."""
    [result] = load().loglikelihood([request(lambda row: row["question"], 2)])
    assert result.text[0] == pytest.approx(weigh(model, about(2), WORDINGS[2])[0], abs=2e-5)


def test_what_lmms_eval_mixes_up_is_refused(load: Callable[..., Any]) -> None:
    """acc_mutual_info takes every other number, but the choices do not alternate."""
    with pytest.raises(NotImplementedError, match="acc_mutual_info"):
        load().loglikelihood([Request(("", "red"))])
    with pytest.raises(NotImplementedError, match="several rounds"):
        load().generate_until_multi_round([])


def test_a_batch_size_is_a_number(load: Callable[..., Any]) -> None:
    """`--batch_size auto`, which lmms-eval's help offers, ended in a traceback of int()."""
    with pytest.raises(UserError, match="got auto"):
        load(batch_size="auto")


# --- Pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pictures", "expected"),
    [
        ("How many?", "A", ["A", "How many?"]),
        ("See <image>\nand <image>: same?", "AB", ["See", "A", "and", "B", ": same?"]),
        ("<image>\nWhat?", "A", ["A", "What?"]),
        ("<video> <image>", "AB", ["A", "B"]),
        ("Only <image>?", "AB", ["A", "B", "Only <image>?"]),
        ("The tag <image> of HTML?", "", ["The tag <image> of HTML?"]),
        ("See <image 1>.", "A", ["A", "See <image 1>."]),
    ],
)
def test_pictures_stand_where_the_text_wants_them(
    text: str, pictures: str, expected: list[str]
) -> None:
    """A text that speaks of "the second picture" is about another one where two are swapped."""
    images = {name: Image(PILImage.new("RGB", (2, 2))) for name in pictures}
    names = {id(image): name for name, image in images.items()}
    mixed = content(text, list(images.values()))
    assert [part if isinstance(part, str) else names[id(part)] for part in mixed] == expected


def test_what_tasks_show_becomes_images_and_videos(tmp_path: Path) -> None:
    """Tasks give pictures, paths of pictures and of videos, and lists of frames."""
    image = squares()[0]["images"][0]
    image.save(tmp_path / "a.png")
    frames = [np.full((4, 4, 3), shade, np.uint8) for shade in range(20)]
    assert segment(image, 5) == Image(image)
    still = segment(str(tmp_path / "a.png"), 5)
    assert isinstance(still, Image)
    assert still.pixels.tobytes() == image.tobytes()
    for shown, count in ((frames, 5), (tmp_path, 1)):
        video = segment(shown, 5)
        assert isinstance(video, Video)
        assert len(video.frames) == count
    with pytest.raises(UserError, match="shows a dict"):
        segment({"array": frames[0], "sampling_rate": 16_000}, 5)


def test_all_pictures_of_a_row_are_seen_in_order(
    load: Callable[..., Any], model: VisionLanguageModel
) -> None:
    """A prompt with the last picture alone, or in another order, would still be answered."""
    first, second = (squares()[row]["images"][0] for row in (0, 1))
    asked = load()
    asked.task_dict["squares"]["test"][0]["images"] = [first, second]
    [result] = asked.loglikelihood([request("red", text="<image> or <image>?")])
    right, swapped = (
        weigh(model, [Image(one), "or", Image(other), "?"], "red")[0]
        for one, other in ((first, second), (second, first))
    )
    assert -result.text[0] == pytest.approx(right, abs=2e-5)
    assert abs(right - swapped) > 1e-3


# --- Under lmms-eval itself -----------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: question
doc_to_target: {target}
doc_to_visual: !function pictures.of
output_type: {output}
{rest}
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: see sandbox/evals/lmms.py")
def test_lmms_eval_runs_it(tmp_path: Path, model: VisionLanguageModel) -> None:
    """A plug-in that lmms-eval does not find, and the sign of a choice: half of the replies are
    right, and all choices, by what the model itself says.
    """
    import datasets

    rows = squares()
    asked = [Prompt.ask(row["question"], row["images"]) for row in rows]
    replies = [model.generate([prompt], max_tokens=6)[0] for prompt in asked]
    choices = ["red", "green", "blue", "a yellow one"]
    table: dict[str, list[Any]] = {"image": [], "question": [], "answer": [], "choice": []}
    for number, row in enumerate(rows):
        weights = [weigh(model, about(number), choice)[0] for choice in choices]
        table["image"].append(row["images"][0])
        table["question"].append(row["question"])
        table["answer"].append(replies[number] if number % 2 else "something else")
        table["choice"].append(int(np.argmax(weights)))
    data = tmp_path / "rows.parquet"
    features = {"image": datasets.Image(), "question": datasets.Value("string")}
    features |= {"answer": datasets.Value("string"), "choice": datasets.Value("int64")}
    datasets.Dataset.from_dict(table, datasets.Features(features)).to_parquet(str(data))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "pictures.py").write_text("def of(row):\n    return [row['image'].convert('RGB')]\n")
    replied = (
        "generation_kwargs: {max_new_tokens: 6, until: []}\nmetric_list: [{metric: exact_match}]"
    )
    chosen = f"doc_to_choice: {json.dumps(choices)}\nmetric_list: [{{metric: acc}}]"
    for name, target, output, rest in (
        ("squares_said", "answer", "generate_until", replied),
        ("squares_chosen", "choice", "multiple_choice", chosen),
    ):
        text = TASK.format(name=name, data=data, target=target, output=output, rest=rest)
        (tasks / f"{name}.yaml").write_text(text)
    save_model(model, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lmms_eval", "--model", lmms.NAME, "--batch_size", "3"]
    command += ["--model_args", f"checkpoint={tmp_path}", "--device", "cpu"]
    command += ["--tasks", "squares_said,squares_chosen", "--include_path", str(tasks)]
    command += ["--output_path", str(out)]
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | offline
    )
    found = list(out.rglob("*_results.json"))
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(found[0].read_text())["results"]
    assert results["squares_said"]["exact_match,none"] == pytest.approx(3 / 7)
    assert results["squares_chosen"]["acc,none"] == 1.0
