"""README, CONTRIBUTING and docs/: links, sizes, names of things that exist, and the code as printed there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import fastpeft

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BY_NAME = {page.name: page for page in PAGES}
MODEL = '"path/or/name"'

each_page = pytest.mark.parametrize("name", BY_NAME)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)


# ---- links -------------------------------------------------------------------------------------


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link and picture of a page that leads to a file here."""
    targets = re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", prose(page))
    found = []
    for target in filter(None, (a or b for a, b in targets)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*?)\s*$", prose(page), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{again}" if again else slug)
    return set(found)


@each_page
def test_links(name):
    for file, anchor in links(BY_NAME[name]):
        assert file.exists(), f"{name} links to {file.relative_to(ROOT)}, which is not there"
        assert not anchor or anchor in anchors(file), f"{name} links to {file.name}#{anchor}: no such heading"


def test_every_page_is_reached_from_the_readme():
    reached, left = {README}, [README]
    while left:
        new = {file for file, _ in links(left.pop())} & set(PAGES) - reached
        reached |= new
        left += new
    assert reached == set(PAGES)


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 12_288


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `fastpeft doctor`\n## A, b & c_d\n```\n# no heading\n```\n## [More](x.md)\n## More\n")
    assert anchors(page) == {"fastpeft-doctor", "a-b--c_d", "more", "more-1"}


# ---- what they name ----------------------------------------------------------------------------


@each_page
def test_commands_exist(name):
    """`python -m MODULE`, `python FILE`, `bash FILE`, `pytest FILE`, and fastpeft's own."""
    text = BY_NAME[name].read_text("utf-8")
    for module in set(re.findall(r"python -m ((?:benches|fastpeft)[\w.]*)", text)):
        assert importlib.util.find_spec(module), f"{name}: no module {module}"
    for file in set(re.findall(r"\b(?:python|bash|pytest) ((?:tests|benches|\.ci)/[\w./]+)", text)):
        assert (ROOT / file).exists(), f"{name}: no file {file}"
    for command in set(re.findall(r"fastpeft (doctor|bench|tune|[a-z]+ --[a-z]+)\b", text)):
        ran = subprocess.run(
            [sys.executable, "-m", "fastpeft", *command.split()[:1], "--help"], capture_output=True, text=True
        )
        assert ran.returncode == 0 and all(f"{option} " in ran.stdout for option in command.split()[1:]), command


@each_page
def test_python_names_what_fastpeft_has(name):
    for block in blocks(BY_NAME[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fp":
                assert hasattr(fastpeft, node.attr), f"{name}: fp.{node.attr}"


def test_every_variable_is_documented():
    sources = [
        ROOT / "setup.py",
        *(path for folder in ("fastpeft", "benches") for path in (ROOT / folder).rglob("*.py")),
    ]
    sources += (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    read = {v for path in sources for v in re.findall(r"(?:environ\S*|getenv)[(\[]\"(\w+)\"", path.read_text("utf-8"))}
    ours = {v for v in read if v.startswith("FASTPEFT_")} | {"CXX", "MAX_JOBS"} & read
    assert len(ours) > 4
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert not [variable for variable in ours if variable not in text]


def test_ci_runs_the_readmes_command():
    """.ci/run takes the line that ends in `&& pytest` under "Run the tests"."""
    found = re.search(r"^\*\*Run the tests\*\*.*?^```bash\n(.*?)\n```$", README.read_text("utf-8"), re.S | re.M)
    assert found and found[1].endswith("&& pytest") and "\n" not in found[1]


# ---- the code ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme") / "train.py"
    path.write_text(next(block for block in blocks(README, "python") if block.startswith("# train.py")), "utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def losses(command, script):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=env, cwd=README.parent, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on PEFT's code" in done.stdout, "the report was not printed"
    return [float(found) for found in re.findall(r"step \d+ loss ([\d.]+)", done.stdout)]


@pytest.mark.parametrize("processes", [1, 2])
def test_training_script(script, model_folder, processes):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29611"]
    found = losses([*launch, str(script)], model_folder)
    assert len(found) == 5 and found[-1] < found[0]


def test_training_and_qlora_snippets(model_folder, one_thread):
    """One after the other, as a reader runs them; every layer is on the fast path."""
    snippets = [block for block in blocks(README, "python") if MODEL in block]
    names = {}
    for snippet, base in zip(snippets, (nn.Linear, fastpeft.nn.Linear4bit), strict=True):
        exec(snippet.replace(MODEL, repr(str(model_folder))), names)
        layers = [module for module in names["model"].modules() if hasattr(module, "base_layer")]
        assert layers and all(isinstance(layer.base_layer, base) for layer in layers)
        assert {row.path for row in fastpeft.apply(names["model"]).layers} == {"fast"}
