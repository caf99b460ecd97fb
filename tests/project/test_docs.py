"""The pages of the docs: generated tables are those of their sources, code runs, and names and links exist."""

import dataclasses
import json
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from benchmarks.__main__ import COMMANDS as COMMANDS_OF_BENCHMARKS
from benchmarks.speed import report, results
from benchmarks.tables import markdown
from fsd_fast.commands import COMMANDS, load_command
from fsd_fast.commands.parsing import command_flags
from fsd_fast.losses import METHODS
from tools import faults_page, flags_page, readme_tables

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *DOCS.rglob("*.md"),
    ],
    key=str,
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def python_blocks(path: Path) -> list[str]:
    return [
        code for language, code in _FENCE.findall(path.read_text(encoding="utf-8")) if language == "python"
    ]


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


# ------------------------------------------------------------------------------------------- generated


def test_the_table_of_faults_is_generated() -> None:
    page = faults_page.PAGE.read_text(encoding="utf-8")
    assert page == faults_page.page(page), "docs/faults.md: run python -m tools.faults_page"
    assert len(list(faults_page.faults())) >= 30


def test_flags_page_is_generated() -> None:
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page(), (
        "docs/flags.md: run python -m tools.flags_page"
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_flags_page_lists_every_flag_of_our_own(command: str) -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    page = flags_page.page()
    own = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    shared = "".join(
        page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        for section in ("Data", "Teacher cache", "Training")
    )
    for name in command_flags(command):
        if name not in inherited:
            assert f"| `--{name}` |" in own + shared, name


@pytest.mark.parametrize("name", ["demo", "CPU", "GPU"])
def test_readme_tables_are_those_of_their_files(name: str) -> None:
    assert readme_tables.tables()[name] in README, "python -m tools.readme_tables prints the tables"


def test_readme_names_the_files_of_its_speed_tables() -> None:
    for path in (readme_tables.CPU, readme_tables.GPU):
        assert f"({name_of(path.with_suffix('.md'))})" in README


def test_the_time_of_another_is_shortened_and_keeps_its_name() -> None:
    assert readme_tables._short("1.97 (1.96 to 2.03) pytorch-cka") == "2.0x (pytorch-cka)"
    assert readme_tables._short("7.23 (7.09 to 8.54)") == "7.2x"
    assert readme_tables._short("-") == "-"


def test_speed_table_is_the_one_of_its_file() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = text.partition("\n## Speed on a CPU\n")[2].partition("\n## ")[0]
    files = re.findall(r"\]\(\.\./(benchmarks/results/\S+\.json)\)", section)
    assert len(files) == 1
    result = results.load(ROOT / files[0])
    assert markdown(report.summary(result)) in section
    assert f"(../{files[0].removesuffix('.json')}.md)" in section
    # Every missed target is there with its figure, as often as it was measured.
    prose = re.sub(r"^\|.*$", "", section, flags=re.MULTILINE)
    missed = [check.measured.split()[0].rstrip("x") for check in result.checks if check.passed is False]
    assert missed
    for figure, count in Counter(missed).items():
        assert len(re.findall(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", prose)) >= count, figure


def test_memory_table_is_that_of_its_file() -> None:
    found = json.loads((DOCS / "results" / "memory_quality.json").read_text(encoding="utf-8"))["quality"]
    text = (DOCS / "memory.md").read_text(encoding="utf-8")
    for task, name in {"rte": "RTE", "cola": "CoLA", "reviews": "reviews"}.items():
        of = found[task]
        mean = sum(of["scikit-learn"]) / len(of["scikit-learn"])
        ratios = [inertia / mean for inertia in of["ours"]]
        cells = f"{of['samples']:,}", of["longest"], f"{sum(ratios) / len(ratios):.4f}", f"{max(ratios):.4f}"
        assert f"| {name} | " + " | ".join(map(str, cells)) + " |" in text


def test_every_benchmark_command_is_described() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS_OF_BENCHMARKS if f"| `python -m benchmarks {name}" not in text] == []


def test_citation_is_that_of_its_file() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    (entry,) = [code for language, code in _FENCE.findall(README) if language == "bibtex"]
    fields = dict(re.findall(r"^\s+(\w+)\s+= \{(.*)\},?$", entry, re.MULTILINE))
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert fields == {
        "title": paper["title"],
        "author": authors,
        "journal": paper["journal"],
        "volume": str(paper["volume"]),
        "pages": str(paper["start"]),
        "year": str(paper["year"]),
        "doi": paper["doi"],
    }


# ------------------------------------------------------------------------------------- code, names, links


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md"])
def test_a_page_s_loop_runs_and_trains_student_and_memory(page: str) -> None:
    (code,) = python_blocks(ROOT / page)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, page, "exec"), names)
    for name in ("student", "student_memory"):
        tensor = names[name]
        assert isinstance(tensor, torch.Tensor)
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0
    assert isinstance(names["teacher"], torch.Tensor)
    assert names["teacher"].grad is None


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/method.md"])
def test_other_code_on_pages_runs(page: str) -> None:
    for code in python_blocks(ROOT / page):
        exec(compile(code, page, "exec"), {})


def test_the_guide_s_loss_runs_as_an_objective() -> None:
    from fsd_fast.losses import Signals

    (code,) = python_blocks(DOCS / "contributing.md")
    names: dict[str, object] = {}
    exec(compile(code, "contributing.md", "exec"), names)
    objective = names["LastLayerMSE"](3, 6)
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    other = hidden.detach() + torch.where(mask.bool(), 1.0, 9.0)[..., None]
    assert (objective.requires.student_layers, objective.requires.teacher_layers) == ((3,), (6,))
    loss, components = objective(Signals(logits, {3: hidden}), Signals(logits, {6: other}), labels, mask)
    assert components["loss_mse"].item() == pytest.approx(1.0, rel=1e-6)
    assert loss.item() == pytest.approx(1.0 + torch.tensor(3.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_our_code_exist(page: Path) -> None:
    for name in re.findall(r"`(fsd_(?:fast|kernels)(?:\.\w+)+)`", prose(page)):
        pkgutil.resolve_name(name)


def test_method_names_the_code_of_every_equation() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    covered: set[int] = set()
    for section in text.split("\n## ")[1:]:
        numbers = re.search(r"eq\. (\d+)(?: (?:to|and) (\d+))?$", section.partition("\n")[0])
        if numbers:
            assert re.search(r"`fsd_(?:fast|kernels)\.\w", section), section.partition("\n")[0]
            covered |= set(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
    assert covered == set(range(1, 12))
    for method in METHODS:
        assert f"| `{method}` |" in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(found), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_of_commands_on_pages_exist(page: Path) -> None:
    of_the_launcher = {"num_gpus", "num_accelerators"}
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:\w+=\S+ )*(?:fsd-fast|deepspeed) .*", text, re.MULTILINE):
        command = re.search(r"(?:fsd-fast|train_ds\.py) (\w+)", line)
        assert command is not None, line
        named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+)", line)) - of_the_launcher
        assert named <= set(command_flags(command[1])), f"{name_of(page)}: {line}"


def test_files_page_has_a_section_for_every_command_that_writes() -> None:
    text = (DOCS / "files.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    for command in COMMANDS:
        writes = any(
            field.metadata.get("writes")
            for group in load_command(command).ARGUMENTS
            for field in dataclasses.fields(group)
        )
        assert re.search(rf"\b{command}\b", headings) or not writes, command


# ------------------------------------------------------------------------------------------ all texts


def test_texts_stay_within_the_project() -> None:
    """No path of a build machine and no address of a package host in any text file of the project."""
    suffixes = (".cff", ".css", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if (
            parts[0].startswith(".venv")
            or parts[0] in (".git", ".cache", ".mypy_cache", ".ruff_cache", "runs", "build")
            or path.suffix not in suffixes
        ):
            continue
        if path == Path(__file__).resolve() or "egg-info" in path.as_posix():
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("/work/", "/root/", "pypi.org", "pythonhosted"):
            assert word not in text, f"{path} holds {word}"
