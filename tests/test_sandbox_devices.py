"""Where a checkpoint runs and in which precision: what is chosen, refused, and really used."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from sandbox import cli, devices
from sandbox.checkpoint import save_model
from sandbox.data.prompt import Prompt
from sandbox.devices import Placement, choose
from sandbox.errors import UserError
from sandbox.evals.benchmark import evaluate_benchmark
from sandbox.evals.lmms import EarlyFusionSandbox
from sandbox.model import VisionLanguageModel
from tests.asked import Colours, mixture


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fakes a machine: its CUDA devices' compute capability, and whether it has MPS."""

    def fake(*capabilities: tuple[int, int], mps: bool = False, macos: int = 14) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_capability",
            lambda device: capabilities[torch.device(device).index or 0],
        )
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major
        )

    return fake


def test_auto_is_cuda_if_there_is_one_else_the_cpu(machine: Callable[..., None]) -> None:
    """Guards against MPS chosen unasked, which lacks grouped products, and a GPU left idle."""
    machine()
    assert choose() == Placement(torch.device("cpu"), "auto")
    machine(mps=True)
    assert choose().device.type == "cpu"
    assert choose("mps").device.type == "mps"
    machine((9, 0), (9, 0))
    assert choose().device == torch.device("cuda")
    assert choose("cuda:1", "bf16-true").device == torch.device("cuda:1")
    assert choose("cpu", "bf16-mixed") == Placement(torch.device("cpu"), "bf16-mixed")


@pytest.mark.parametrize(
    ("capabilities", "device", "precision", "says"),
    [
        ([], "cuda", "auto", "--device cuda: there is no such device; here are cpu"),
        (
            [(9, 0), (9, 0)],
            "cuda:7",
            "auto",
            "--device cuda:7: there is no such device; here are cpu, cuda:0, cuda:1",
        ),
        ([], "gpu", "auto", "--device gpu: there is no such device; here are cpu"),
        (
            [(9, 0), (7, 5)],
            "cuda:1",
            "bf16-mixed",
            "--precision bf16-mixed: cuda:1 has compute capability 7.5, and bf16 needs 8.0; use "
            "32-true or auto",
        ),
        ([], "cpu", "16-mixed", "--precision 16-mixed: must be one of auto, 32-true, bf16-mixed, "),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    capabilities: list[tuple[int, int]],
    device: str,
    precision: str,
    says: str,
    machine: Callable[..., None],
) -> None:
    """Guards against a CUDA traceback for a mistyped number, and against emulated bf16."""
    machine(*capabilities)
    with pytest.raises(UserError) as caught:
        choose(device, precision)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_an_old_macos_has_no_bf16(machine: Callable[..., None]) -> None:
    """Guards against a dtype error of Metal's in place of a sentence."""
    machine(mps=True, macos=13)
    with pytest.raises(UserError, match="--precision bf16-true: mps needs macOS 14 for bf16"):
        choose("mps", "bf16-true")


@pytest.mark.parametrize(
    ("precision", "stored", "computed"),
    [
        ("auto", torch.float32, torch.float32),
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_precision_is_what_is_computed_in(
    precision: str, stored: torch.dtype, computed: torch.dtype
) -> None:
    """Guards against a flag that is parsed and changes nothing."""
    placement = choose("cpu", precision)
    model = placement.place(mixture())
    assert model.backbone.head.weight.dtype == stored
    found = []
    model.backbone.head.register_forward_hook(lambda *call: found.append(call[-1].dtype))
    with placement.context():
        model.generate([Prompt.ask("colour?", [PILImage.new("RGB", (16, 16))])], max_tokens=2)
    assert set(found) == {computed}


def test_auto_keeps_the_dtype_of_a_checkpoint() -> None:
    """Guards against a bf16 checkpoint that takes twice its memory, or an fp32 one that rounds."""
    for dtype in (torch.float32, torch.bfloat16):
        model = choose("cpu").place(mixture().to(dtype))
        assert model.backbone.head.weight.dtype == dtype


# --- The commands ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(mixture(), path)
    return path


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """What each model was placed with: device, precision, and autocast in its first embedding."""
    found: list[tuple[str, str, bool]] = []
    place = Placement.place

    def spy(self: Placement, model: VisionLanguageModel) -> VisionLanguageModel:
        def look(*_: object) -> None:
            found.append((str(self.device), self.precision, torch.is_autocast_enabled("cpu")))

        model.backbone.embed.register_forward_hook(look)
        return place(self, model)

    monkeypatch.setattr(devices.Placement, "place", spy)
    return found


@pytest.mark.parametrize("precision", ["auto", "bf16-mixed", "bf16-true"])
def test_ask_runs_where_and_how_it_is_told(
    precision: str,
    checkpoint: Path,
    placed: list[tuple[str, str, bool]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards against `ask` on the CPU beside an idle GPU, in no other precision than the file's."""
    argv = ["ask", "--checkpoint", str(checkpoint), "--max-tokens", "3", "colour?"]
    assert cli.main([*argv, "--device", "cpu", "--precision", precision]) == 0
    assert set(placed) == {("cpu", precision, precision == "bf16-mixed")}
    assert cli.main([*argv, "--device", "cuda:7"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda:7: there is no such device; here are cpu")
    assert error.count("\n") == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_benchmark_runs_where_and_how_it_is_told(
    precision: str, checkpoint: Path, placed: list[tuple[str, str, bool]], tmp_path: Path
) -> None:
    """Guards against an evaluation that goes on in another precision than it began in: its
    predictions would be of two models.
    """
    out = tmp_path / "out"
    options = {"out": out, "device": "cpu", "max_tokens": 3}
    results = evaluate_benchmark(checkpoint, Colours(4), precision=precision, **options)
    assert set(placed) == {("cpu", precision, precision == "bf16-mixed")}
    settings = results.summary["settings"]
    assert (settings["device"], settings["precision"]) == ("cpu", precision)
    with pytest.raises(UserError, match="precision"):
        evaluate_benchmark(checkpoint, Colours(4), precision="32-true", resume=True, **options)


def test_a_model_in_memory_keeps_its_own_place() -> None:
    """Guards against a model that an evaluation casts or moves behind its owner's back."""
    with pytest.raises(UserError, match="a model in memory keeps its own"):
        evaluate_benchmark(mixture(), Colours(4), precision="bf16-true")


def test_lmms_runs_where_and_how_it_is_told(
    checkpoint: Path, placed: list[tuple[str, str, bool]]
) -> None:
    """Guards against `--model_args precision=...` that changes nothing."""
    asked = EarlyFusionSandbox(checkpoint, device="cpu", precision="bf16-mixed")
    assert asked.device == torch.device("cpu")

    class Request:
        args = ("colour?", {"max_new_tokens": 2}, lambda row: [], 0, "task", "test")

    asked.task_dict = {"task": {"test": [{}]}}
    asked.generate_until([Request()])
    assert set(placed) == {("cpu", "bf16-mixed", True)}
    with pytest.raises(UserError, match="--device cuda:7: there is no such device"):
        EarlyFusionSandbox(checkpoint, device="cuda:7")
