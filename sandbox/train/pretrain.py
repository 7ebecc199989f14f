"""Joint training from token 0, or onward from checkpoints; of a language model alone, too."""

from collections.abc import Sequence

from encoders.base import VisionEncoder
from sandbox.backbone.config import BackboneConfig, preset
from sandbox.model import FusionBuilder, VisionLanguageModel
from sandbox.tokenizer import Tokenizer
from sandbox.train.next_token import NextToken
from sandbox.train.optim import OptimizerConfig
from sandbox.train.start import start_from


class Pretrain(NextToken):
    """Trains encoder, fusion and backbone together, or a language model alone.

    Args:
        encoder: pixels to patch features; None for a language model.
        fusion: class path and arguments of the fusion; the model supplies the widths. It comes
            with the encoder.
        backbone: its configuration, or the name of a preset, made for the tokenizer's vocabulary.
        tokenizer: ``small``, or the path of a vocabulary.
        max_tiles: tiles that an image is cut into at most, the global one not counted.
        optimizer: how parameters move.
        init_from: checkpoint or run whose weights to start from: of the same architecture, or by
            part (``{encoder: RUN, backbone: OTHER}``) of whatever holds that part.
        freeze: dotted names of model parts that stay as they are (``encoder``, ``backbone``,
            ``backbone.embed``, ...).
        compile: see ``Objective``.

    Raises:
        UserError: a frozen part does not exist, nothing is left to train, or the checkpoint is of
            another configuration.
    """

    def __init__(
        self,
        encoder: VisionEncoder | None = None,
        fusion: FusionBuilder | None = None,
        backbone: BackboneConfig | str = "tiny",
        tokenizer: str = "small",
        max_tiles: int = 1,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen, so safe to share)
        init_from: str | dict[str, str] | None = None,
        freeze: Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        vocabulary = Tokenizer.load(tokenizer)
        if isinstance(backbone, str):
            backbone = preset(backbone, vocabulary.vocab_size)
        model = VisionLanguageModel(encoder, fusion, backbone, vocabulary, max_tiles=max_tiles)
        start_from(model, init_from)
        super().__init__(model, optimizer, freeze, compile)
