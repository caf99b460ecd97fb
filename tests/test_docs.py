"""The README names every flag, and its figures are those of the files it cites."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import TrainingArguments

from benchmarks.__main__ import COMMANDS as COMMANDS_OF_BENCHMARKS
from benchmarks.speed import report, results
from benchmarks.tables import markdown
from fsd_fast.cli import COMMANDS
from fsd_fast.commands import load_command
from fsd_fast.commands.demo import results_table
from fsd_fast.commands.flags import RunArguments
from fsd_fast.losses import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def own_flags(command: str) -> set[str]:
    """The command's flags that are not simply TrainingArguments'."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    changed = set(RunArguments.__annotations__)
    names = {
        field.name
        for cls in load_command(command).ARGUMENTS
        for field in dataclasses.fields(cls)
        if field.init
    }
    return (names - inherited) | (names & changed)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_readme_names_every_flag(command: str) -> None:
    missing = {name for name in own_flags(command) if f"`--{name}`" not in README}
    assert not missing, f"README does not explain {sorted(missing)} of {command}"


def test_readme_names_every_command_and_method() -> None:
    for name in (*COMMANDS, *METHODS):
        assert re.search(rf"\b{name}\b", README), name


def test_readme_names_no_flag_that_does_not_exist() -> None:
    known = {
        field.name
        for name in COMMANDS
        for cls in load_command(name).ARGUMENTS
        for field in dataclasses.fields(cls)
    }
    launcher = {"help", "num_gpus", "num_accelerators", "check", "device", "json", "batch"}
    named = set(re.findall(r"(?<![\w-])--([a-z_0-9]+)", README))
    assert named <= known | launcher, sorted(named - known - launcher)


def test_demo_table_is_the_one_of_its_file() -> None:
    demo = json.loads((ROOT / "docs" / "results" / "demo.json").read_text(encoding="utf-8"))
    assert results_table(demo["rows"]) in README


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
    docs = ROOT / "docs"
    found = json.loads((docs / "results" / "memory_quality.json").read_text(encoding="utf-8"))["quality"]
    text = (docs / "MEMORY.md").read_text(encoding="utf-8")
    for task, name in {"rte": "RTE", "cola": "CoLA", "reviews": "reviews"}.items():
        of = found[task]
        mean = sum(of["scikit-learn"]) / len(of["scikit-learn"])
        ratios = [inertia / mean for inertia in of["ours"]]
        cells = f"{of['samples']:,}", of["longest"], f"{sum(ratios) / len(ratios):.4f}", f"{max(ratios):.4f}"
        assert f"| {name} | " + " | ".join(map(str, cells)) + " |" in text


def test_texts_stay_within_the_project() -> None:
    """No path of a build machine and no address of a package host in any text file of the project."""
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if (
            parts[0].startswith(".venv")
            or parts[0] in (".git", ".cache", "runs", "build")
            or path.suffix
            not in (
                ".py",
                ".md",
                ".json",
                ".sh",
            )
        ):
            continue
        if path == Path(__file__).resolve() or "egg-info" in path.as_posix():
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("/work/", "/root/", "pypi.org", "pythonhosted"):
            assert word not in text, f"{path} holds {word}"


# The documents of the benchmarks and of the kernels, which link to each other and to stored results.
@pytest.mark.parametrize(
    "name",
    [
        "benchmarks.md",
        "gpu.md",
        "kernels.md",
        "results/kernels_summary.md",
        "results/tuning_log.md",
    ],
)
def test_links_lead_to_files(name: str) -> None:
    path = ROOT / "docs" / name
    links = re.findall(r"\]\(([^)#:\s]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_benchmark_command_is_described() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS_OF_BENCHMARKS if f"| `python -m benchmarks {name}" not in text] == []
