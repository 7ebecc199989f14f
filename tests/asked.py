"""A small benchmark, and models to be asked: for the tests of `sandbox evaluate`."""

import torch
from PIL import Image as PILImage

from encoders.patches import Patches
from fusion.cross_attention import CrossAttention
from fusion.early import EarlyFusion
from sandbox.backbone.config import BackboneConfig
from sandbox.data.task import Question, Sample, Split, Task
from sandbox.model import VisionLanguageModel
from sandbox.tokenizer import Tokenizer

COLOURS = ("red", "green", "blue", "yellow")


class Colours(Task):
    """Squares of one colour, each with one to five questions about it; images have marks."""

    def __init__(self, samples: int = 30, answers: bool = True) -> None:
        self.samples = samples
        self.answers = answers

    def size(self, split: Split) -> int:
        return {"train": 30, "val": 0, "test": self.samples, "heldout": 0}[split]

    def sample(self, split: Split, index: int) -> Sample:
        colour = COLOURS[index * index % 3]
        image = PILImage.new("RGB", (16, 16), colour)
        image.putpixel((index % 16, index // 16), (255, 255, 255))
        wordings = ("colour?", "What is the colour of this?", "Tell the colour, please, of all.")
        questions = tuple(
            Question(
                wordings[(index + number) % 3],
                colour if self.answers else "",
                ("plain", "long")[number % 2],
                id=f"{split}-{index}-{number}",
            )
            for number in range(1 + index % 5)
        )
        return Sample((image,), questions, f"{split}{index}")

    def identity(self) -> str:
        return f"colours {self.samples} {self.answers}"


def mixture(fusion: type = EarlyFusion, seed: int = 0) -> VisionLanguageModel:
    """A mixture of experts with random weights, whose prompts cross several local chunks."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.load()
    config = BackboneConfig(
        vocab_size=tokenizer.vocab_size,
        width=32,
        layers=5,
        heads=2,
        head_dim=16,
        moe_every=2,
        experts=4,
        chunk=8,
        temperature_floor=4,
    )
    encoder = Patches(tile_size=16, patch_size=4, width=24)
    model = VisionLanguageModel(encoder, fusion, config, tokenizer)
    if fusion is CrossAttention:  # shut gates would hide every mistake
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                torch.nn.init.constant_(parameter, 0.7)
    return model.eval()
