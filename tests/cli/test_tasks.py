"""`python -m lepton eval --tasks`: tasks of local data with known answers, without a network."""

import json
import math
import socket

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra harness)")
import datasets

from lepton.cli.tasks import load_tasks
from lepton.errors import InputError
from tests.cli.tiny import run, run_json, save_tiny

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: data/last_word.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: data/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: data/answers.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: everything
task: [choice, last_word]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""
FILES = {"choice": CHOICE, "last_word": LAST_WORD, "texts": TEXTS, "answers": ANSWERS, "everything": GROUP}
WORDS = [" fox", " dog", " Käse", " lazy", " too", " quick"]
CONTEXTS = ["The quick brown", "over the lazy", "Ein süßer", "jumps over the", "and 東京", "The"]
LONG = ["The quick brown fox jumps over the lazy dog.", "Ein süßer Käse, and 東京 too. " * 20]


def logprob(model, tokenizer, context, text):
    """By one plain pass, in which the last token of the context opens a segment, as in generation."""
    before = tokenizer.encode(context) or [tokenizer.eos_id]
    ids = tokenizer.encode(context + text) if context else [tokenizer.eos_id, *tokenizer.encode(text)]
    opens = (torch.arange(len(ids)) == len(before) - 1)[None] & (len(before) > 1)
    with torch.no_grad():
        logs = model(torch.tensor([ids]), opens=opens).logits[0].double().log_softmax(-1)
    return sum(logs[place, ids[place + 1]].item() for place in range(len(before) - 1, len(ids) - 1))


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer.encode(prompt)
    return tokenizer.decode(model.generate(ids, count, temperature=0)[len(ids) :])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, and a folder of tasks whose answers are partly what the model says."""
    place = tmp_path_factory.mktemp("tasks")
    model, tokenizer = save_tiny(place / "final.pt")
    folder = place / "tasks"
    (folder / "data").mkdir(parents=True)
    scores = {context: [logprob(model, tokenizer, context, word) for word in WORDS] for context in CONTEXTS}
    best = {context: values.index(max(values)) for context, values in scores.items()}
    answers = [best[context] if i % 3 else (best[context] + 1) % len(WORDS) for i, context in enumerate(CONTEXTS)]
    rows = {
        "choice": [
            {"question": context, "choices": [word.strip() for word in WORDS], "answer": answer}
            for context, answer in zip(CONTEXTS, answers, strict=True)
        ],
        "last_word": [{"context": context, "word": word} for context, word in zip(CONTEXTS, WORDS, strict=True)]
        + [{"context": "The quick", "word": greedy(model, tokenizer, "The quick", 2)}],
        "texts": [{"text": text} for text in LONG],
        "answers": [
            {"question": context, "answer": greedy(model, tokenizer, context, 8) if i % 2 else "no"}
            for i, context in enumerate(CONTEXTS)
        ],
    }
    for name, content in FILES.items():
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    for name, docs in rows.items():
        lines = "".join(json.dumps(doc) + "\n" for doc in docs)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return place / "final.pt", folder, model, tokenizer, rows


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    def refused(*_):
        raise AssertionError("a task of local data asks for a network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_figures_are_those_of_lepton(world):
    path, folder, model, tokenizer, rows = world
    names = "choice,last_word,texts,answers"
    command = ("eval", "--checkpoint", path, "--dtype", "fp32", "--tasks", names, "--task_dir", folder)
    found = run_json(*command, "--batch_size", 4)["tasks"]
    assert found["choice"]["metrics"]["acc"]["value"] == pytest.approx(4 / 6)
    assert found["choice"]["samples"] == 6
    logs = [logprob(model, tokenizer, doc["context"], doc["word"]) for doc in rows["last_word"]]
    perplexity = math.exp(-sum(logs) / len(logs))
    assert found["last_word"]["metrics"]["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-6)
    assert found["last_word"]["metrics"]["perplexity"]["stderr"] > 0
    nats = -sum(logprob(model, tokenizer, "", text) for text in LONG)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in LONG)
    assert found["texts"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)
    right = sum(doc["answer"] == greedy(model, tokenizer, doc["question"], 8) for doc in rows["answers"])
    assert found["answers"]["metrics"]["exact_match"]["value"] == pytest.approx(right / 6)
    assert right == 3


def test_a_group_is_measured_as_a_whole_and_may_be_limited(world):
    path, folder, *_ = world
    command = ("eval", "--checkpoint", path, "--dtype", "fp32", "--tasks", "everything", "--task_dir", folder)
    found = run_json(*command)["tasks"]
    assert {*found} == {"everything", "choice", "last_word"}
    parts = [found[name]["metrics"]["acc"]["value"] * found[name]["samples"] for name in ("choice", "last_word")]
    assert found["everything"]["metrics"]["acc"]["value"] == pytest.approx(sum(parts) / 13)
    limited = run_json(*command, "--limit", 3)["tasks"]
    assert limited["choice"]["samples"] == limited["last_word"]["samples"] == 3


def test_people_read_a_table(world):
    path, folder, *_ = world
    code, out, err = run("eval", "--checkpoint", path, "--tasks", "choice", "--task_dir", folder, "--num_fewshot", 0)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(f"{path} (step 7), ")
    assert lines[1].split() == ["value", "error"]
    assert lines[2] == "choice (6 examples)"
    assert lines[3].split()[:2] == ["acc", "0.6667"]
    assert "standard error" in lines[-1]


def test_depth_and_thinking_are_those_of_the_flags(world):
    path, folder, *_ = world
    command = ("eval", "--checkpoint", path, "--dtype", "fp32", "--tasks", "texts", "--task_dir", folder)
    figures = [
        run_json(*command, *flags)["tasks"]["texts"]["metrics"]["bits_per_byte"]["value"]
        for flags in ((), ("--depth", 0.2), ("--think", 0))
    ]
    assert len({*figures}) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "choise"], "no task 'choise'; did you mean 'choice'?"),
        (["--tasks", " , "], "name tasks, separated by commas"),
        (["--tasks", "choice", "--text", "README.md"], "--tasks and --text"),
        (["--tasks", "choice", "--num_fewshot", "-1"], "must lie in 0..1000"),
        (["--tasks", "choice", "--limit", "0"], "must lie in 1.."),
        (["--tasks", "torn"], "cannot load the tasks torn: "),
        ([], "say which of its tasks, --tasks NAME"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, flags, message):
    path, folder, *_ = world
    (tmp_path / "torn.yaml").write_text(CHOICE.replace("choice", "torn"), encoding="utf-8")  # without its data
    (tmp_path / "choice.yaml").write_text(CHOICE, encoding="utf-8")
    place = tmp_path if {"torn", "choise"} & {*flags} else folder
    code, out, err = run("eval", "--checkpoint", path, "--task_dir", place, *flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_folder_that_is_none(world):
    code, _, err = run("eval", "--checkpoint", world[0], "--tasks", "x", "--task_dir", world[1] / "none")
    assert code == 2
    assert "no such folder" in err


def test_a_task_that_runs_what_the_model_writes_is_refused(tmp_path):
    (tmp_path / "code.yaml").write_text(CHOICE.replace("task: choice", "task: code") + "unsafe_code: true\n")
    (tmp_path / "data").mkdir()
    doc = {"question": "1", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "data" / "choice.jsonl").write_text(json.dumps(doc) + "\n")
    with pytest.raises(InputError, match="the task code runs code that the model writes"):
        load_tasks(["code"], tmp_path)
