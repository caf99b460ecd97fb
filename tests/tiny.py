"""What the tests of the commands share: tiny models, tiny data in the official formats, and ways to run a command.

Models have a hidden width of 32 and a vocabulary of a few words, so that a whole run takes about a second. A
sentence is a few numbers in words; its label is whether it holds the word "good", which every model here can learn.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    RobertaConfig,
    set_seed,
)

from fsd_fast.commands import run
from fsd_fast.memory.features import MemoryIdentity

ROOT = Path(__file__).resolve().parents[1]
WORDS = "one two three four five six seven eight nine ten eleven twelve good bad the a is was".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
HIDDEN, TEACHER_LAYERS, SEQUENCE, CENTROIDS = 32, 4, 24, 5
COMMON = ["--max_seq_length", str(SEQUENCE)]
TRAINING = "--use_cpu true --disable_tqdm true --report_to none --save_strategy no --eval_strategy no".split()


def save_tokenizer(folder, words=VOCABULARY):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)


def save_backbone(
    folder, *, layers=TEACHER_LAYERS, hidden=HIDDEN, seed=0, family="bert", dropout=0.1, labels=None
):
    """Save a pre-trained model with its tokenizer: without a head, or with a random one of ``labels`` outputs."""
    sizes = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 66}
    if family == "distilbert":
        config = DistilBertConfig(
            dim=hidden,
            n_layers=layers,
            n_heads=2,
            hidden_dim=64,
            dropout=dropout,
            seq_classif_dropout=dropout,
            attention_dropout=dropout,
            **sizes,
        )
    else:
        config = {"bert": BertConfig, "roberta": RobertaConfig}[family](
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.2,
            **sizes,
        )
    config.pad_token_id = 0
    set_seed(seed)
    if labels is None:
        model = AutoModel.from_config(config)
    else:
        config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _sentences(generator, good):
    words = [WORDS[i] for i in generator.integers(0, 12, size=int(generator.integers(3, 8)))]
    words.insert(int(generator.integers(0, len(words))), "good" if good else "bad")
    return " ".join(words)


def write_rte(folder, train=24, dev=12, seed=0):
    """An RTE folder: premise and hypothesis, 'entailment' where the premise is good."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("train", train), ("dev", dev)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(size):
            label = "entailment" if i % 2 == 0 else "not_entailment"
            rows.append(f"{i}\t{_sentences(generator, i % 2 == 0)}\tthe one was a two\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_stsb(folder, train=24, dev=12, seed=0):
    """An STS-B folder: score 4.5 where the first sentence is good, else 0.5."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("train", train), ("dev", dev)):
        rows = [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ]
        for i in range(size):
            score = "4.500" if i % 2 == 0 else "0.500"
            text = _sentences(generator, i % 2 == 0)
            rows.append(f"{i}\tnews\tfile\t2012\t1\tnone\tnone\t{text}\tthe one was a two\t{score}")
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_mnli(folder, train=24, dev=12, seed=0):
    """An MNLI folder. 'dev_mismatched' holds one row more than 'dev_matched' and is all contradictions."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    first = (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2"
    )
    for name, size in (("train", train), ("dev_matched", dev), ("dev_mismatched", dev + 1)):
        labels = "label1" if name == "train" else "label1\tlabel2\tlabel3\tlabel4\tlabel5"
        rows = [f"{first}\t{labels}\tgold_label"]
        for i in range(size):
            gold = "contradiction" if name == "dev_mismatched" else ("entailment", "neutral")[i % 2]
            votes = "\t".join([gold] * labels.count("label"))
            text = _sentences(generator, i % 2 == 0)
            rows.append(
                f"{i}\t1n\t1n\tslate\t( a )\t( b )\t(S a)\t(S b)\t{text}\tthe one was a two\t{votes}\t{gold}"
            )
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Tiny:
    """Folders of the tiny set-up: data, pre-trained model, fine-tuned teacher, and its two memories."""

    rte: Path
    backbone: Path
    teacher: Path
    memory_exclude: Path
    memory_include: Path

    def memory(self, pad_features):
        return {"exclude": self.memory_exclude, "include": self.memory_include}[pad_features]

    def data(self, pad_features="exclude"):
        """Flags of the RTE task."""
        return [
            *("--task_name", "rte", "--data_dir", str(self.rte), *COMMON),
            *("--pad_features", pad_features),
        ]

    def distillation(self, output, method="fsd_ilg", pad_features="exclude", steps=3, batch=8):
        """Flags of a short distillation into two layers; a flag given again behind them wins."""
        flags = [
            *(*self.data(pad_features), *TRAINING, "--output_dir", str(output), "--method", method),
            *("--teacher_model_name_or_path", str(self.teacher), "--model_name_or_path", str(self.backbone)),
            *("--student_layers", "2", "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(batch)),
            *("--logging_steps", "1", "--learning_rate", "1e-3"),
        ]
        if "g" in method.removeprefix("fsd_"):
            flags += ["--memory_path", str(self.memory(pad_features))]
        return flags


def without_source(flags):
    """The flags of a distillation without the pre-trained model that the student starts from."""
    at = flags.index("--model_name_or_path")
    return flags[:at] + flags[at + 2 :]


@functools.cache
def _build(base):
    torch.set_num_threads(1)
    tiny = Tiny(
        write_rte(base / "RTE"),
        save_backbone(base / "backbone"),
        base / "teacher",
        base / "memory_exclude",
        base / "memory_include",
    )
    run(
        "teacher",
        [
            *(*tiny.data(), *TRAINING, "--model_name_or_path", str(tiny.backbone)),
            *("--output_dir", str(tiny.teacher), "--max_steps", "30", "--learning_rate", "2e-3"),
            *("--per_device_train_batch_size", "12"),
        ],
    )
    for pad_features in ("exclude", "include"):
        run("memory", memory_flags(tiny, tiny.memory(pad_features), pad_features))
    return tiny


def memory_flags(tiny, output, pad_features="exclude"):
    return [
        *(*tiny.data(pad_features), "--teacher_model_name_or_path", str(tiny.teacher)),
        *("--num_centroid", str(CENTROIDS), "--output_dir", str(output), "--use_cpu", "true"),
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny set-up, made once per process whichever test file asks for it first."""
    return _build(tmp_path_factory.getbasetemp() / "tiny")


def history(folder):
    """The log of a run."""
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def losses(folder):
    """The training loss of every logged step."""
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


def in_subprocess(arguments, *, cwd=ROOT, **environment):
    """Run Python in a process of its own; return what it printed. Fails with its errors."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


_LOADS_CLEANLY = """
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = []
for folder in sys.argv[1:]:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    inputs = AutoTokenizer.from_pretrained(folder)("one good two", return_tensors="pt")
    found.append({
        "unclean": sorted(str(key) for group in info.values() for key in group),
        "class": type(model).__name__, "layers": model.config.num_hidden_layers,
        "id2label": model.config.id2label, "logits": model.eval()(**inputs).logits.tolist(),
    })
print(json.dumps({"found": found, "ours": sorted(name for name in sys.modules if name.startswith("fsd"))}))
"""


def load_cleanly(*folders):
    """Load exported students where this package is not imported, and say what came of each."""
    # -P: the working folder is not searched for modules, so the tree is out of reach.
    arguments = ["-P", "-c", _LOADS_CLEANLY, *map(str, folders)]
    out = json.loads(in_subprocess(arguments, cwd=folders[0], PYTHONPATH="").splitlines()[-1])
    assert out["ours"] == []
    for found in out["found"]:
        assert found["unclean"] == [], "missing, unexpected or mismatched keys"
    return out["found"]


def memory_identity(length: int, width: int, centroids: int, **changes: Any) -> MemoryIdentity:
    """What a memory of S, D and K is the memory of, changed field by field."""
    fields = {
        "task_name": "rte",
        "teacher": "runs/teacher",
        "teacher_fingerprint": "ab" * 32,
        "layer": 5,
        "max_seq_length": length,
        "hidden_size": width,
        "num_centroid": centroids,
        "pad_features": "include",
    }
    return MemoryIdentity(**(fields | changes))
