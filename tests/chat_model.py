"""A small random LLaMA of transformers with a chat template, and what transformers and peft answer.

Its tokens are bytes. It is wide enough that its vectors can learn a few answers by heart.
"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save(folder):
    """Write the model and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="makes the model")
    vocabulary = {}
    for token in (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())):
        vocabulary[token] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<pad>"],
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def answer(folder, adapter, question):
    """Return what transformers and peft answer, greedily."""
    transformers = pytest.importorskip("transformers", reason="the peer")
    peft = pytest.importorskip("peft", reason="the peer")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **options)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    n_prompt = inputs["input_ids"].shape[1]
    return tokenizer.decode(ids[0, n_prompt:], skip_special_tokens=True)
