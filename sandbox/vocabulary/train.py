"""Train the shipped vocabulary on the project's own text.

    python -m sandbox.vocabulary.train sandbox/vocabulary/small.json

It takes seconds and gives the same bytes every time, as long as the tasks ask the same. A new
vocabulary breaks no checkpoint (each carries its tokenizer), but ids and losses of new runs cannot
be compared with those of old ones.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fusion.layout import frame_mark
from sandbox.data import charts, shapes
from sandbox.tokenizer import Tokenizer

VOCAB_SIZE = 1024
# How often each listed word counts, against once for each word of the prose: so much that every
# listed word becomes one token.
WEIGHT = 1000

# What generic questions about images use, beyond what the generated tasks ask.
WORDS = """
what is the color of the shape? does the image not contain a circle? is no rectangle present?
is there a gray object in the picture? how many are there? which one is it? where is it? are they?
red orange yellow green cyan blue purple pink black white gray brown teal magenta
circle square triangle rectangle diamond star cross ring
left right top bottom middle center above below between beside inside outside row column
first second third last yes no none zero one two three four five six seven eight nine ten
bar bars line lines pie slice slices chart value values highest lowest more less greater than
difference sum total average year moving moves move up down still faster slower before after frame
video
"""

PROSE = """
Early fusion puts image patches and text tokens into one sequence, and one model reads both. The
encoder turns each patch into a feature, the projector maps the feature to the width of the model,
and the features replace the patch tokens. Attention then sees words and pixels alike. A mixture of
experts sends every token through one shared expert and through the expert that its router picks.
This sandbox trains small models in minutes, compares early fusion with cross-attention on the same
data, and reports how sure the difference is. Describe the image. Answer the question with one word
or number. What is shown here? Please explain your answer. I don't know, it isn't in the picture.
The quick way to learn is to look at many examples, to guess, and to be told what was wrong. When
would a reader who cannot see the page still be right? Because some answers are more common, they
should be counted first; only what lies above that line was read from the image itself.
"""


def generated_texts(samples: int = 200) -> Iterator[str]:
    """Questions and answers of so many images of each generated task, of every question type."""
    many = 32  # more than any image has, so that no type is crowded out
    tasks = (
        charts.Charts(
            charts=list(charts.CHARTS), questions=list(charts.QUESTIONS), questions_per_image=many
        ),
        shapes.Shapes(questions=list(shapes.QUESTIONS), questions_per_image=many),
    )
    for task in tasks:
        for index in range(samples):
            for question in task.sample("train", index).questions:
                yield from (question.text, question.answer)


def corpus() -> Iterator[str]:
    """Everything the vocabulary is trained on, in a fixed order."""
    text = " ".join([WORDS, *generated_texts()])
    for word in dict.fromkeys(re.findall(r"[A-Za-z]+", text)):
        yield from [word, " " + word] * WEIGHT
    numbers = [str(number) for number in range(101)]
    yield from [*numbers, "system", "user", "assistant", "\n\n"] * WEIGHT
    yield from (frame_mark(tenth / 10) for tenth in range(100))
    yield PROSE


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write the vocabulary."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.vocabulary.train")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    out: Path = parser.parse_args(arguments).out
    tokenizer = Tokenizer.train(corpus(), VOCAB_SIZE)
    out.write_text(tokenizer.to_json() + "\n", encoding="utf-8")
    print(f"{out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    main()
