"""The examples under docs/examples: scripts that parse, flags that exist, and configurations that train."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from fsd_fast.commands.parsing import command_flags
from tests.launch import remove_build_locks, run_deepspeed
from tests.tiny import ROOT, losses, tiny

__all__ = ["tiny"]

EXAMPLES = ROOT / "docs" / "examples"


def check_command(words):
    """Check the command after train_ds.py: its flags exist, are not refused, and take these values."""
    command, *rest = words[words.index("train_ds.py") + 1 :]
    flags = command_flags(command)
    pairs = re.findall(r"--(\w+)[= ](\S+)", " ".join(rest))
    assert len(pairs) == sum(word.startswith("--") for word in rest)
    for name, value in pairs:
        assert flags[name].refusal is None
        flags[name].values.check(flags[name].values.from_text([value]))
    assert dict(pairs)["resume_from_checkpoint"] == "auto"
    for name in ("task_name", "teacher_model_name_or_path", "memory_path", "output_dir"):
        assert name in dict(pairs)


def test_every_example_is_tested_and_on_the_page():
    page = (ROOT / "docs" / "distributed.md").read_text()
    names = {path.name for path in EXAMPLES.iterdir()}
    assert names == {"distill.slurm", "distill-job.yaml", "hostfile", *(path.name for path in CONFIGS)}
    assert all(f"examples/{name}" in page for name in names)


def test_the_slurm_script():
    path = EXAMPLES / "distill.slurm"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1", "torchrun starts the processes of a machine"
    signal, seconds = options["signal"].split("@")
    timeout = re.search(r"--shutdown-timeout=(\d+)", text)
    assert signal == "TERM"
    assert int(timeout[1]) < int(seconds), "torchrun must end before Slurm kills"
    assert f"--nproc_per_node={options['gpus-per-node']}" in text
    check_command(text.replace("\\\n", " ").split("srun ")[1].split())


def test_the_kubernetes_job():
    job = yaml.safe_load((EXAMPLES / "distill-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"
    (container,) = pod["containers"]
    arguments = container["args"]
    timeout = next(int(word.partition("=")[2]) for word in arguments if word.startswith("--shutdown-timeout"))
    assert timeout < pod["terminationGracePeriodSeconds"]
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in arguments
    assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    check_command(arguments)


def test_the_hostfile():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(EXAMPLES / "hostfile")) == {"node-1": 8, "node-2": 8}


CONFIGS = sorted(EXAMPLES.glob("ds_config*.json"))


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++")
def test_the_configurations_train(tiny, tmp_path):
    remove_build_locks()
    listed = []
    for path in CONFIGS:
        flags = tiny.distillation(tmp_path / path.stem, "fsd_ilg", steps=3, batch=4)
        content = json.loads(path.read_text())
        more = ["--bf16", "true"] if content.get("bf16") == {"enabled": True} else []
        listed.append(["distill", [*flags, "--deepspeed", str(path), *more]])
    (tmp_path / "runs.json").write_text(json.dumps(listed))
    run_deepspeed(2, [tmp_path / "runs.json"], script="tests/distributed/several_runs.py")
    for path in CONFIGS:
        assert len(losses(tmp_path / path.stem)) == 3
        assert (tmp_path / path.stem / "model.safetensors").is_file()
