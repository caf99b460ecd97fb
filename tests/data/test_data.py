"""Tasks, official TSV files, the review split, tokenization and padding."""

import hashlib
import logging
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ByT5Tokenizer,
    Trainer,
    TrainingArguments,
)

from fsd_fast.commands._common import tokenize_split
from fsd_fast.data import (
    TASKS,
    PadCollator,
    get_task,
    load_reviews,
    load_task_dataset,
    read_glue_folder,
    reviews,
    reviews_path,
    tokenize,
)
from fsd_fast.data.reviews import is_validation

GLUE = Path(__file__).resolve().parents[3] / "shared" / "glue"

# The official formats, rows of our own. Per task: the text of train.tsv, the text of every evaluation file,
# and the rows expected from train as (first text, second text or None, label).
RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
MRPC_HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
_MNLI_FIRST = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
)
MNLI_TRAIN_HEADER = _MNLI_FIRST + "label1\tgold_label\n"
MNLI_DEV_HEADER = _MNLI_FIRST + "label1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
_PARSES = "( a b )\t( c d )\t(ROOT (S a b))\t(ROOT (S c d))"


def _mnli_dev(premise, label):
    # The annotators disagree with the gold label, so that reading the wrong column shows.
    return (
        f"{MNLI_DEV_HEADER}0\t63735n\t63735n\tslate\t{_PARSES}\t{premise}\tIt rains.\t"
        f"neutral\tneutral\tneutral\tneutral\tneutral\t{label}\n"
    )


OFFICIAL = {
    "cola": (
        "gj04\t1\t\tThe kettle sang on the stove.\nks08\t0\t*\tKettle the stove the on sang.",
        {"dev": "gj04\t0\t*\tStove on.\ngj04\t1\t\tWe left."},
        [("The kettle sang on the stove.", None, 1), ("Kettle the stove the on sang.", None, 0)],
    ),
    "sst2": (
        "sentence\tlabel\na warm and funny evening \t1\ndull from start to end \t0\n",
        {"dev": "sentence\tlabel\nnot bad at all \t1\n"},
        [("a warm and funny evening ", None, 1), ("dull from start to end ", None, 0)],
    ),
    "mrpc": (
        f'{MRPC_HEADER}1\t11\t12\tHe said "no.\tHe refused.\n0\t13\t14\tShares rose.\tShares "fell" today.\n',
        {"dev": f"{MRPC_HEADER}1\t15\t16\tIt opened.\tIt was opened.\n"},
        [('He said "no.', "He refused.", 1), ("Shares rose.", 'Shares "fell" today.', 0)],
    ),
    "stsb": (
        f"{STSB_HEADER}0\tmain-captions\tMSRvid\t2012\t01\tnone\tnone\tA cat sits.\tA cat is sitting.\t4.750\n"
        '1\tmain-news\tx\t2013\t0002\tnone\tnone\tA "dog runs.\tIt snows.\t0.000\n',
        {"dev": f"{STSB_HEADER}0\tmain-news\tx\t2014\t0003\tnone\tnone\tOne.\tTwo.\t2.500\n"},
        [("A cat sits.", "A cat is sitting.", 4.75), ('A "dog runs.', "It snows.", 0.0)],
    ),
    "qqp": (
        f"{QQP_HEADER}1\t2\t3\tHow do I swim?\tHow can I swim?\t1\n4\t5\t6\tWhat is tin?\tWho is Tim?\t0\n",
        {"dev": f"{QQP_HEADER}7\t8\t9\tWhy?\tHow?\t0\n"},
        [("How do I swim?", "How can I swim?", 1), ("What is tin?", "Who is Tim?", 0)],
    ),
    "mnli": (
        f"{MNLI_TRAIN_HEADER}0\t31193n\t31193n\ttravel\t{_PARSES}\tIt pours.\tIt rains.\tneutral\tentailment\n"
        f"1\t31194n\t31194n\tfiction\t{_PARSES}\tIt is dry.\tIt rains.\tneutral\tcontradiction\n",
        {
            "dev_matched": _mnli_dev("Matched.", "contradiction"),
            "dev_mismatched": _mnli_dev("Mismatched.", "entailment"),
        },
        [("It pours.", "It rains.", 0), ("It is dry.", "It rains.", 2)],
    ),
    "qnli": (
        'index\tquestion\tsentence\tlabel\n0\tWho "wrote it?\tIt rains in May.\tnot_entailment\n'
        "1\tWhen does it rain?\tIt rains in May.\tentailment\n",
        {"dev": "index\tquestion\tsentence\tlabel\n0\tWhere?\tHere.\tentailment\n"},
        [('Who "wrote it?', "It rains in May.", 1), ("When does it rain?", "It rains in May.", 0)],
    ),
    "rte": (
        f"{RTE_HEADER}0\tIt rains.\tIt is wet.\tentailment\n1\tIt rains.\tIt is dry.\tnot_entailment\n",
        {"dev": f"{RTE_HEADER}0\tA.\tB.\tnot_entailment\n"},
        [("It rains.", "It is wet.", 0), ("It rains.", "It is dry.", 1)],
    ),
    "wnli": (
        f"{RTE_HEADER}0\tThe cup fell because it slid.\tThe cup slid.\t1\n1\tSo.\tThe tray slid.\t0\n",
        {"dev": f"{RTE_HEADER}0\tA.\tB.\t0\n"},
        [("The cup fell because it slid.", "The cup slid.", 1), ("So.", "The tray slid.", 0)],
    ),
}


def write_task(root, name, *, newline="\n", train=None):
    """Write the files of a task below `root`; `train` replaces the text of train.tsv."""
    folder = root / TASKS[name].folder
    folder.mkdir()
    own_train, evaluation, _ = OFFICIAL[name]
    for stem, text in {"train": own_train if train is None else train, **evaluation}.items():
        (folder / f"{stem}.tsv").write_bytes(text.replace("\n", newline).encode())
    return folder


def rows(task, dataset):
    second = task.text_keys[1]
    return [(r[task.text_keys[0]], r[second] if second else None, r["label"]) for r in dataset]


# Tasks


def test_every_spelling_of_a_task_finds_it():
    for spelling, name in {
        "SST-2": "sst2",
        "sts-b": "stsb",
        "STSB": "stsb",
        "CoLA": "cola",
        "MNLI": "mnli",
        "reviews_score": "reviews-score",
    }.items():
        assert get_task(spelling) is TASKS[name]


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'imdb'.*cola, sst2, mrpc.*reviews-score"):
        get_task("imdb")


def test_what_the_tasks_say():
    assert {name for name, task in TASKS.items() if task.default_num_centroid == 300} == {"mnli", "qqp"}
    assert {name for name, task in TASKS.items() if task.is_regression} == {"stsb", "reviews-score"}
    assert {task.default_num_centroid for task in TASKS.values()} == {100, 300}
    assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {
        "stsb": 1,
        "mnli": 3,
        "reviews-score": 1,
    }
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["qnli"].text_columns == ("question", "sentence")
    assert TASKS["sst2"].text_columns == ("sentence",)


# Official files


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_format(tmp_path, name, newline):
    task = TASKS[name]
    folder = write_task(tmp_path, name, newline=newline)
    for data_dir in (tmp_path, str(folder)):
        splits = load_task_dataset(task, data_dir)
        assert tuple(splits) == ("train", *task.eval_splits)
        assert rows(task, splits["train"]) == OFFICIAL[name][2]
        assert splits["train"]["idx"][:] == [0, 1]
        assert splits["train"].column_names == [*task.text_columns, "label", "idx"]
    label = splits["train"].features["label"]
    assert label.dtype == "float32" if task.is_regression else tuple(label.names) == task.labels


def test_mnli_matched_and_mismatched_stay_apart(tmp_path):
    write_task(tmp_path, "mnli")
    splits = read_glue_folder(TASKS["mnli"], tmp_path)
    assert rows(TASKS["mnli"], splits["validation_matched"]) == [("Matched.", "It rains.", 2)]
    assert rows(TASKS["mnli"], splits["validation_mismatched"]) == [("Mismatched.", "It rains.", 0)]


def test_stray_quotes_and_line_separators_eat_no_rows(tmp_path):
    texts = [
        '"an open quote',
        'a "quoted" word',
        '"',
        "next\u2028line\x0b\x85 and\rreturn",
        'ends with one"',
        "last",
    ]
    train = RTE_HEADER + "".join(f"{i}\t{text}\tB.\tentailment\n" for i, text in enumerate(texts))
    write_task(tmp_path, "rte", train=train)
    assert read_glue_folder(TASKS["rte"], tmp_path)["train"]["sentence1"][:] == texts


def test_qqp_skips_and_counts_broken_rows(tmp_path, caplog):
    broken = QQP_HEADER + "1\t2\t3\tA?\tB?\t1\n4\t5\t6\tWhat is\n this?\tC?\t0\n7\t8\t9\tD?\tE?\t0\n"
    write_task(tmp_path, "qqp", train=broken)
    with caplog.at_level(logging.WARNING):
        train = read_glue_folder(TASKS["qqp"], tmp_path)["train"]
    assert rows(TASKS["qqp"], train) == [("A?", "B?", 1), ("D?", "E?", 0)]
    assert "train.tsv: skipped 2 rows" in caplog.text


def test_another_row_count_than_the_official_one_is_reported(tmp_path, caplog):
    write_task(tmp_path, "rte")
    with caplog.at_level(logging.WARNING):
        read_glue_folder(TASKS["rte"], tmp_path)
    assert "train.tsv: 2 rows, where the official file has 2490" in caplog.text


@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        (
            "rte",
            RTE_HEADER + "0\tA.\tB.\tentailment\n1\tA.\tB",
            r"train\.tsv, line 3: found 3 columns, expected 4",
        ),
        ("rte", RTE_HEADER + "0\tA.\tB.\textra\tentailment\n", r"line 2: found 5 columns, expected 4"),
        ("rte", RTE_HEADER + "0\tA.\tB.\tnot_entai", r"line 2: unknown label 'not_entai'; .* not_entailment"),
        ("rte", RTE_HEADER + "0\tA.\tB.\t1\n", r"unknown label '1'; expected one of entailment"),
        ("wnli", RTE_HEADER + "0\tA.\tB.\tentailment\n", r"unknown label 'entailment'; expected one of 0, 1"),
        ("rte", "", r"train\.tsv, line 1: .*sentence1, sentence2, label; found an empty file"),
        ("rte", RTE_HEADER, r"train\.tsv: no rows"),
        (
            "rte",
            "sentence\tlabel\ngood\t1\n",
            r"line 1: expected a header .* found the header sentence, label",
        ),
        ("rte", "<html>\n", r"expected a header with sentence1, sentence2, label"),
        ("cola", "", r"train\.tsv: no rows"),
        (
            "cola",
            "gj04\t1\t\tA.\ngj04\t1\n",
            r"line 2: found 2 columns, expected 4 \(source, label, note, sentence",
        ),
        (
            "stsb",
            STSB_HEADER + "0\t\t\t\t\t\t\tA.\tB.\t5.2\n",
            r"line 2: score '5\.2'; expected a number from 0 to 5",
        ),
        ("stsb", STSB_HEADER + "0\t\t\t\t\t\t\tA.\tB.\tnan\n", r"line 2: score 'nan'"),
        ("stsb", STSB_HEADER + "0\t\t\t\t\t\t\tA.\tB.\t\n", r"line 2: score ''"),
        ("qqp", QQP_HEADER + "1\t2\t3\tA?\n", r"train\.tsv: no rows"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, train, message):
    write_task(tmp_path, name, train=train)
    with pytest.raises(ValueError, match=message):
        read_glue_folder(TASKS[name], tmp_path)


def test_text_that_is_not_utf8_names_the_file(tmp_path):
    folder = write_task(tmp_path, "sst2")
    (folder / "dev.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: not UTF-8"):
        read_glue_folder(TASKS["sst2"], tmp_path)


def test_missing_files_are_named(tmp_path):
    folder = write_task(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"MNLI/dev_mismatched\.tsv not found.*train\.tsv, dev_matched\.tsv"
    ):
        read_glue_folder(TASKS["mnli"], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder; expected the RTE folder"):
        read_glue_folder(TASKS["rte"], tmp_path / "absent")


@pytest.mark.skipif(not GLUE.is_dir(), reason="the official GLUE files are not here")
@pytest.mark.parametrize(
    ("name", "train", "dev"),
    [("rte", 2490, 277), ("wnli", 635, 71), ("cola", 8551, 1043), ("sst2", 67349, 872)],
)
def test_real_files(name, train, dev, caplog):
    with caplog.at_level(logging.WARNING):
        splits = load_task_dataset(TASKS[name], GLUE)
    assert {split: len(data) for split, data in splits.items()} == {"train": train, "validation": dev}
    assert "official" not in caplog.text
    assert set(splits["train"]["label"]) == {0, 1}


# The Hub


def test_hub_drops_the_unlabelled_splits(monkeypatch):
    asked = []

    def load(*args):
        asked.append(args)
        return {split: Dataset.from_dict({"n": [1]}) for split in ("train", "validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert set(load_task_dataset(TASKS["rte"])) == {"train", "validation"}
    assert asked == [("nyu-mll/glue", "rte")]


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def load(*args):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConnectionError, match=r"'rte'.*no route.*--data_dir"):
        load_task_dataset(TASKS["rte"])


def test_built_in_tasks_take_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'reviews' is built in"):
        load_task_dataset(TASKS["reviews"], tmp_path)
    with pytest.raises(ValueError, match=r"'reviews' is built in"):
        read_glue_folder(TASKS["reviews"], tmp_path)


# The built-in reviews


@pytest.fixture
def small_reviews(tmp_path, monkeypatch):
    lines = [f"{i}\t{(i % 5) - 2}.25\tSentence number {i}." for i in range(1, 400)]
    lines += ["400\t0\tNeither good nor bad.", "401\t0.0\tSo so."]
    lines += ["402\t1.5\tSENTENCE  number 7. ", '403\t-0.5\t"An open quote']
    path = tmp_path / "reviews.txt"
    path.write_bytes("\r\n".join(lines).encode())
    monkeypatch.setattr(reviews, "reviews_path", lambda: path)
    return lines


def test_split_is_the_documented_hash():
    text = "  A  fine\tFILM "
    digest = hashlib.sha256(b"a fine film").digest()
    assert is_validation(text) == (int.from_bytes(digest[:8], "big") % 10 == 0)
    held_out = [i for i in range(100) if is_validation(f"sentence {i}")]
    # Golden: the split must never move, or reported figures stop being comparable.
    assert held_out == [0, 10, 26, 53, 61, 76, 82, 83, 86, 88, 90, 93]


def test_reviews_drop_zero_ratings_and_keep_copies_together(small_reviews):
    classes, scores = load_reviews(score=False), load_reviews(score=True)
    assert sum(len(split) for split in classes.values()) == len(small_reviews) - 2
    assert sum(len(split) for split in scores.values()) == len(small_reviews)
    assert 0.05 < len(scores["validation"]) / len(small_reviews) < 0.15
    by_text = {}
    for line in small_reviews:
        _, rating, text = line.split("\t")
        by_text[text] = float(rating)
    sides = {}
    for split, data in scores.items():
        for row in data:
            assert row["label"] == by_text[row["sentence"]]
            sides.setdefault(" ".join(row["sentence"].lower().split()), set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    for data in classes.values():
        assert all(row["label"] == int(by_text[row["sentence"]] > 0) for row in data)
    # One sentence, one side: whichever of the two tasks asks.
    assert set(classes["validation"]["sentence"]) <= set(scores["validation"]["sentence"])
    assert classes["train"].features["label"].names == ["negative", "positive"]


def _have_reviews():
    try:
        return reviews_path().is_file()
    except (FileNotFoundError, ValueError):
        return False


@pytest.mark.skipif(not _have_reviews(), reason="the built-in data has not been fetched")
def test_real_reviews():
    classes = load_task_dataset(TASKS["reviews"])
    scores = load_task_dataset(TASKS["reviews-score"])
    assert (len(classes["train"]), len(classes["validation"])) == (9469, 1099)
    assert (len(scores["train"]), len(scores["validation"])) == (9505, 1100)
    assert sum(classes["train"]["label"]) == 4696
    assert sum(classes["validation"]["label"]) == 546
    text = [{" ".join(t.lower().split()) for t in scores[split]["sentence"]} for split in scores]
    assert not text[0] & text[1]
    assert min(scores["train"]["label"]) >= -4
    assert max(scores["train"]["label"]) <= 4


# Tokenization and padding


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)


def pair_dataset(labels, length=(3, 2)):
    text = {"sentence1": ["a b c d e f g h"[: 2 * length[0] - 1], "a"], "sentence2": ["b " * length[1], "c"]}
    return Dataset.from_dict({**text, "label": labels, "idx": [0, 1]})


def test_tokenize_pairs(tokenizer):
    encoded, _ = tokenize(pair_dataset([1, 0]), tokenizer, TASKS["rte"], 16)
    assert set(encoded.column_names) == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "labels",
        "length",
        "sample_index",
    }
    assert encoded[0]["input_ids"] == [2, 5, 6, 7, 3, 6, 6, 3]
    assert encoded[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert encoded["length"][:] == [8, 5]
    assert encoded["labels"][:] == [1, 0]


def test_tokenize_truncates_and_does_not_pad(tokenizer):
    encoded, cut = tokenize(pair_dataset([1, 0], length=(8, 6)), tokenizer, TASKS["rte"], 9)
    assert cut == 1
    assert encoded["length"][:] == [9, 5]
    assert len(encoded[0]["input_ids"]) == 9


@pytest.mark.parametrize("max_seq_length", [0, 3, 33])
def test_tokenize_refuses_an_impossible_length(tokenizer, max_seq_length):
    with pytest.raises(
        ValueError, match=rf"max_seq_length is {max_seq_length}; .* 3 special tokens .* at most 32"
    ):
        tokenize(pair_dataset([1, 0]), tokenizer, TASKS["rte"], max_seq_length)


def test_tokenize_names_missing_columns(tokenizer):
    with pytest.raises(ValueError, match=r"'qnli' also expects \['question', 'sentence'\]"):
        tokenize(pair_dataset([1, 0]), tokenizer, TASKS["qnli"], 16)


@pytest.mark.parametrize(
    ("pad_features", "multiple", "positions"),
    [("include", None, 16), ("exclude", None, 8), ("include", 4, 16), ("exclude", 16, 16)],
)
def test_padding_policy(tokenizer, pad_features, multiple, positions):
    encoded, _ = tokenize(pair_dataset([1, 0]), tokenizer, TASKS["rte"], 16)
    batch = PadCollator(tokenizer, pad_features, 16, multiple)(list(encoded))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "sample_index"}
    assert batch["sample_index"].tolist() == [0, 1]
    assert batch["input_ids"].shape == (2, positions)
    assert batch["input_ids"][0, :8].tolist() == encoded[0]["input_ids"]
    assert not batch["input_ids"][1, 5:].any()
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 5]


@pytest.mark.parametrize(
    ("task", "labels", "dtype"), [("rte", [1, 0], torch.long), ("stsb", [2, 5], torch.float32)]
)
def test_label_dtype(tokenizer, task, labels, dtype):
    dataset = pair_dataset(labels)
    if task == "stsb":
        dataset = dataset.cast_column("label", datasets.Value("float32"))
    batch = PadCollator(tokenizer, "exclude", 16)(list(tokenize(dataset, tokenizer, TASKS[task], 16)[0]))
    assert batch["labels"].dtype == dtype
    assert batch["labels"].tolist() == labels


def test_collator_refuses(tokenizer):
    with pytest.raises(ValueError, match=r"pad_features is 'drop'"):
        PadCollator(tokenizer, "drop", 16)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of is 8; expected a divisor of max_seq_length"):
        PadCollator(tokenizer, "exclude", 20, 8)
    with pytest.raises(ValueError, match=r"max_seq_length is 0"):
        PadCollator(tokenizer, "exclude", 0)
    encoded, _ = tokenize(pair_dataset([1, 0]), tokenizer, TASKS["rte"], 16)
    with pytest.raises(ValueError, match=r"8 tokens; expected at most max_seq_length = 6"):
        PadCollator(tokenizer, "include", 6)(list(encoded))


def test_trainer_groups_by_the_length_column(tokenizer, tmp_path):
    encoded, _ = tokenize(pair_dataset([1, 0]), tokenizer, TASKS["rte"], 16)
    # Lengths that no one could count from the tokens: the sampler can only have read the column.
    encoded = encoded.remove_columns("length").add_column("length", [100, 200])
    config = BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        arguments,
        data_collator=PadCollator(tokenizer, "exclude", 16),
        train_dataset=encoded,
    )
    loader = trainer.get_train_dataloader()
    assert list(loader.batch_sampler.sampler.lengths) == [100, 200]
    (batch,) = loader
    assert trainer.model(**batch).logits.shape == (2, 2)


def test_cut_samples_are_counted_without_a_fast_tokenizer():
    """A tokenizer in Python says nothing of what it cut off."""
    slow = ByT5Tokenizer(model_max_length=32)
    assert not slow.is_fast
    rows = Dataset.from_dict(
        {"sentence1": ["abcdef", "a", "ab"], "sentence2": ["abc", "b", "abcd"], "label": [0, 1, 0]}
    )
    lengths = tokenize(rows, slow, TASKS["rte"], 32)[0]["length"][:]
    for limit in (4, 8, max(lengths)):
        assert tokenize(rows, slow, TASKS["rte"], limit)[1] == sum(length > limit for length in lengths)


def test_cut_samples_are_said_once_for_each_split(tokenizer, caplog):
    rows = pair_dataset([1, 0], length=(8, 6))
    with caplog.at_level("WARNING"):
        tokenize_split("train", rows, tokenizer, TASKS["rte"], 9)
        tokenize_split("validation", rows, tokenizer, TASKS["rte"], 32)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["max_seq_length: 1 of the 2 samples of split 'train' have more than 9 tokens and are cut"]
