"""`sandbox curate`: shards in and out, the same choice however they lie, errors in one line."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sandbox import cli
from sandbox.curate.shards import Faults, read, written

ENTRIES = ["photo", "dog", "cat", "golden gate", "tram", "St. Louis"]
Call = tuple[int, str, str]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards of 600 records, one of them gzipped, and metadata as lines and as JSON."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        lines = [json.dumps(record(rng, name, n), ensure_ascii=False) for n in range(600)]
        content = "\n".join(lines).encode()
        Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    Path("entries.txt").write_text("\n".join(ENTRIES) + "\n\ndog \n", encoding="utf-8")
    Path("entries.json").write_text(json.dumps(ENTRIES), encoding="utf-8")
    return tmp_path


def record(rng: random.Random, shard: str, n: int) -> dict[str, object]:
    """A caption in which photos abound and trams are rare; every tenth matches nothing."""
    words = rng.choices(["photo", "dog", "cat", "golden gate", "tram"], [60, 20, 15, 4, 1], k=2)
    text = "Ünmatched" if n % 10 == 0 else f"A {words[0]}, and a {words[1]}."
    return {"url": f"{shard}/{n}", "caption": text, "size": [n, 1.50]}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command; its exit code, output and errors."""

    def call(*argv: str) -> Call:
        try:
            code = cli.main(["curate", *argv])
        except SystemExit as end:
            code = int(end.code or 0)
        out, errors = capsys.readouterr()
        return code, out, errors

    return call


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the picture, which takes longer than all the rest."""
    monkeypatch.setattr("sandbox.curate.page.draw", lambda found: b"")


def lines_of(path: str | Path) -> list[bytes]:
    content = Path(path).read_bytes()
    return (gzip.decompress(content) if str(path).endswith(".gz") else content).splitlines()


def chosen(out: str) -> dict[str, bytes]:
    """Every file of a run."""
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


CALL = ("a.jsonl", "--out", "out")
SHARDS = ("a.jsonl", "b.jsonl.gz", "c.jsonl")
GIVEN = ("--metadata", "entries.txt", "--threshold", "60")


def test_a_curation_from_files_to_files(run: Any) -> None:
    """Records rewritten on the way, or counts that do not belong to the files beside them."""
    code, out, errors = run(*SHARDS, "--out", "out", *GIVEN)
    assert (code, errors) == (0, "")
    report = json.loads(Path("out/counts.json").read_text(encoding="utf-8"))
    kept = [line for name in SHARDS for line in lines_of(f"out/{name}")]
    for name in SHARDS:
        after = lines_of(f"out/{name}")
        assert [line for line in lines_of(name) if line in set(after)] == after
    assert report["records"] == 1800 and report["unmatched"] == 180
    assert report["kept"] == len(kept) and f"kept {len(kept)} of 1,800" in out
    assert report["threshold"] == 60 and report["seed"] == 0
    assert report["malformed"] == {"lines": 0, "first": []}
    assert report["metadata"]["entries"] == 6 and report["metadata"]["can_never_match"] == 1
    texts = [line for name in SHARDS for line in lines_of(name)]
    for entry, (before, after) in report["counts"].items():
        assert before == sum(entry.encode() in line for line in texts)
        assert after == sum(entry.encode() in line for line in kept)
        assert after == before if before <= 60 else after < before
    assert list(report["counts"]) == ["photo", "dog", "cat", "golden gate", "tram"]
    assert not any(b"\xc3\x9cnmatched" in line for line in kept)
    assert not list(Path("out").glob("*.partial"))


def test_the_page_stands_alone(run: Any) -> None:
    """A page with a link to its picture shows none once it is sent to somebody."""
    Path("odd.jsonl").write_text('{"caption": "a <b>dog</b> &"}\n{"caption": "x <i> y"}\n<oops>\n')
    Path("odd.txt").write_text("<i>\nx\n")
    assert run("odd.jsonl", "--out", "out", "--metadata", "odd.txt")[0] == 0
    assert Path("out/distribution.png").read_bytes().startswith(b"\x89PNG")
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in page
    assert "&lt;i&gt;" in page and "<i>" not in page
    assert "odd.jsonl:3" in page
    assert not [link for link in ("http://", "https://", "url(") if link in page]


@pytest.mark.usefixtures("undrawn")
def test_the_choice_is_the_same_however_the_shards_lie(run: Any) -> None:
    """Draws from a running generator change with the order of files and the number of processes."""
    run(*SHARDS, "--out", "one", *GIVEN)
    run(*SHARDS, "--out", "again", *GIVEN, "--jobs", "2")
    assert chosen("one") == chosen("again")
    run(*reversed(SHARDS), "--out", "turned", *GIVEN)
    assert {name: chosen("one")[name] for name in SHARDS} == {
        name: chosen("turned")[name] for name in SHARDS
    }
    merged = [line for name in SHARDS for line in lines_of(name)]
    random.Random(1).shuffle(merged)
    Path("all.jsonl").write_bytes(b"\n".join(merged))
    run("all.jsonl", "--out", "merged", "--metadata", "entries.json", "--threshold", "60")
    assert sorted(lines_of("merged/all.jsonl")) == sorted(
        line for name in SHARDS for line in lines_of(f"one/{name}")
    )
    run(*SHARDS, "--out", "other", *GIVEN, "--seed", "1")
    assert chosen("one")["a.jsonl"] != chosen("other")["a.jsonl"]


@pytest.mark.usefixtures("undrawn")
def test_matches_are_added_and_nothing_else(run: Any) -> None:
    """Records written anew lose the spelling of their numbers and escapes."""
    Path("x.jsonl").write_bytes(b'{"caption":"dog, \\u0063at", "n": 1.50 }\r\n{"caption":"tram"}')
    assert run("x.jsonl", "--out", "out", *GIVEN, "--keep-matches")[0] == 0
    first, second = lines_of("out/x.jsonl")
    assert first == b'{"caption":"dog, \\u0063at", "n": 1.50, "metadata": ["dog", "cat"]}'
    assert json.loads(second)["metadata"] == ["tram"]
    code, _, errors = run("out/x.jsonl", "--out", "twice", *GIVEN, "--keep-matches")
    assert code == 1 and "a record has 'metadata'" in errors


@pytest.mark.usefixtures("undrawn")
def test_metadata_is_built_from_the_captions(run: Any) -> None:
    """Entries built and not written could not be used again."""
    assert run(*SHARDS, "--out", "out", "--build-metadata", "40", "--tail", "0.1")[0] == 0
    built = json.loads(Path("out/metadata.json").read_text(encoding="utf-8"))
    assert {"photo", "dog", "golden", "A", "Ünmatched"} <= set(built)
    threshold = json.loads(Path("out/counts.json").read_text())["threshold"]
    again = ("--metadata", "out/metadata.json", "--threshold", str(threshold))
    assert run(*SHARDS, "--out", "again", *again)[0] == 0
    assert chosen("out")["a.jsonl"] == chosen("again")["a.jsonl"]


@pytest.mark.usefixtures("undrawn")
def test_malformed_lines_are_counted_and_left_out(run: Any) -> None:
    """One bad line in millions ended the run, or vanished without a word."""
    bad = [
        b"{broken",
        b"[1, 2]",
        b'{"text": "no caption"}',
        b'{"caption": null}',
        b'{"caption": "\xff"}',
        b'{"\\ud83d": 1}',
        b"[" * 100_000,
        b'{"caption": "a dog", "n": ' + b"1" * 5000 + b"}",
    ]
    good = [b'\xef\xbb\xbf{"caption": "a dog"}', b'{"caption": "a cat \\ud83d"}']
    Path("x.jsonl").write_bytes(b"\n".join([good[0], b"", *bad, b"  ", good[1]]))
    code, out, _ = run("x.jsonl", "--out", "out", *GIVEN)
    report = json.loads(Path("out/counts.json").read_text(encoding="utf-8"))
    assert code == 0 and lines_of("out/x.jsonl") == good
    assert report["records"] == 2 and report["malformed"]["lines"] == len(bad)
    places = [place.split(": ")[0] for place in report["malformed"]["first"]]
    assert places == [f"x.jsonl:{n}" for n in range(3, 8)]
    assert "no 'caption' (it has 'text')" in report["malformed"]["first"][2]
    assert "left out 8 malformed lines: x.jsonl:3" in out


@pytest.mark.usefixtures("undrawn")
def test_a_gzipped_file_that_breaks_off_keeps_what_it_has(run: Any) -> None:
    """A download that was cut short ended the run with a traceback."""
    noise = random.Random(0)
    lines = [json.dumps({"caption": "dog", "id": noise.getrandbits(64)}) for _ in range(500)]
    whole = gzip.compress("\n".join(lines).encode())
    Path("x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    Path("y.jsonl.gz").write_bytes(b"not gzipped")
    assert run("x.jsonl.gz", "y.jsonl.gz", "--out", "out", *GIVEN)[0] == 0
    report = json.loads(Path("out/counts.json").read_text())
    assert 0 < report["records"] < 500 and report["malformed"]["lines"] == 2
    assert all("damaged" in place for place in report["malformed"]["first"])


@pytest.mark.parametrize(
    ("argv", "code", "what"),
    [
        (["--out", "out", *GIVEN], 2, "required: IN.jsonl"),
        (["a.jsonl", *GIVEN], 2, "required: --out"),
        (CALL, 2, "--metadata --build-metadata is required"),
        ([*CALL, *GIVEN, "--build-metadata", "3"], 2, "not allowed with"),
        ([*CALL, *GIVEN, "--tail", "0.1"], 2, "not allowed with"),
        (
            [*CALL, "--metadata", "m", "--threshold", "0"],
            2,
            "at least 1, got '0'",
        ),
        (
            [*CALL, "--metadata", "m", "--tail", "6"],
            2,
            "between 0 and 1, got '6'",
        ),
        ([*CALL, "--metadata", "m", "--tail", "nan"], 2, "between 0 and 1"),
        (["entries.txt", "--out", "out", *GIVEN], 2, "must end in .jsonl or .jsonl.gz"),
        (["a.jsonl", "./a.jsonl", "--out", "out", *GIVEN], 2, "two inputs are called a.jsonl"),
        (["none.jsonl", "--out", "out", *GIVEN], 1, "none.jsonl: No such file"),
        ([*CALL, "--metadata", "none.txt"], 1, "none.txt: No such file"),
        ([*CALL, "--metadata", "dict.json"], 1, "must be a JSON list"),
        ([*CALL, "--metadata", "empty.jsonl"], 1, "has no entries"),
        (["a.jsonl", "--out", "full", *GIVEN], 1, "full is not an empty directory"),
        (["a.jsonl", "--out", "a.jsonl", *GIVEN], 1, "a.jsonl is not an empty directory"),
        (["empty.jsonl", "--out", "out", *GIVEN], 1, "empty.jsonl: no records"),
        (["empty.jsonl", "--out", "out", "--build-metadata", "2"], 1, "empty.jsonl: no records"),
        (
            [*CALL, *GIVEN, "--text-key", "txt"],
            1,
            "a.jsonl:1: no 'txt' (it has",
        ),
        ([*CALL, "--build-metadata", "2", "--text-key", "t"], 1, "no 't' (it"),
        ([*CALL, "--build-metadata", "9999"], 1, "no word occurs 9999 times"),
        (
            [*CALL, "--metadata", "zebra.txt"],
            1,
            "none of 600 texts matches any",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(run: Any, argv: Sequence[str], code: int, what: str) -> None:
    """A traceback, or files of a run that came to nothing."""
    Path("empty.jsonl").write_text("\n\n")
    Path("dict.json").write_text('{"dog": 1}')
    Path("zebra.txt").write_text("zebra\n")
    Path("full").mkdir()
    Path("full/kept.txt").write_text("mine")
    found, out, errors = run(*argv)
    assert (found, out) == (code, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and what in errors
    assert not Path("out").exists() or not list(Path("out").iterdir())
    assert Path("full/kept.txt").read_text() == "mine"


def test_files_have_their_name_only_when_whole(tmp_path: Path) -> None:
    """Half a shard under its final name looks like a shard."""
    path = tmp_path / "x.jsonl"

    def interrupted() -> None:
        with written(path) as write:
            write(b"half")
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not path.exists() and not path.with_name("x.jsonl.partial").exists()
    with written(path) as write:
        write(b"whole")
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz"])
def test_progress_adds_up_to_the_file(name: str) -> None:
    """A bar that ends at 40%, as bytes of text against bytes of a gzipped file would."""
    steps: list[int] = []
    rows = list(read(Path(name), "caption", Faults(), steps.append))
    assert len(rows) == 600
    assert sum(steps) == Path(name).stat().st_size


def test_neither_help_nor_curation_waits_for_torch(workplace: Path) -> None:
    """torch takes seconds to import, and the help is shown on machines without the matcher."""
    script = (
        "import sys\nfrom sandbox.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ahocorasick_rs', 'numpy'} & set(sys.modules)\n"
        f"assert main(['curate', 'a.jsonl', '--out', 'out', *{GIVEN}]) == 0\n"
        "assert not {'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{script}"],
        capture_output=True,
        text=True,
        cwd=workplace,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_memory_stays_with_the_metadata(workplace: Path) -> None:
    """A list of captions somewhere between two passes is felt at a billion of them.

    50 MB of captions, 20,000 entries; the peak must not grow by 10 MB over that of 1 MB of captions
    (each in a process of its own).
    """
    rng = np.random.default_rng(0)
    words = [f"w{n:x}" for n in range(20_000)]
    Path("words.txt").write_text("\n".join(words))
    peaks = []
    for name, megabytes in (("small", 1), ("large", 50)):
        with Path(f"{name}.jsonl").open("w") as file:
            while file.tell() < megabytes * 2**20:
                ranks = np.minimum(rng.zipf(1.3, (2000, 12)), len(words)) - 1
                for row in ranks:
                    file.write(json.dumps({"caption": " ".join(words[n] for n in row)}) + "\n")
        script = (
            "import resource, sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from sandbox.cli import main\n"
            f"main(['curate', '{name}.jsonl', '--out', '{name}', '--metadata', 'words.txt'])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 10 * 1024
