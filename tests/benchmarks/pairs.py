"""The two sides: minia3, and transformers with peft, on the same random weights in the shapes of real models."""

import contextlib
import warnings

import torch

import minia3

FULL = {
    "t5": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128},  # t5-base
    "llama": {  # SmolLM2-135M
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
QUICK = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
TASK_TYPE = {"t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM"}


class Pair:
    """One architecture: a folder with weights, an adapter folder, and both sides' models made from them."""

    def __init__(self, kind, folder, quick, dtype):
        self.kind, self.is_t5, self.dtype = kind, kind == "t5", dtype
        self.folder, self.adapter = folder / kind, folder / f"{kind}-adapter"
        self.sizes = (QUICK if quick else FULL)[kind]
        self.vocab_size = self.sizes["vocab_size"]
        if not self.folder.exists():
            self.make()

    def make(self):
        import transformers

        torch.manual_seed(0)
        if self.is_t5:
            config = transformers.T5Config(**self.sizes, dropout_rate=0.0, decoder_start_token_id=0)
            model = transformers.T5ForConditionalGeneration(config)
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**self.sizes))
        model.to(self.dtype).save_pretrained(self.folder)
        ours = self.ours()
        with torch.no_grad():
            for vector in minia3.vectors(ours).values():
                vector += 0.1 * torch.randn(vector.shape)
        minia3.save_adapter(ours, self.adapter)

    def ours(self, n_adapters=1):
        """Every row is the adapter."""
        model = minia3.load_model(self.folder, n_adapters=n_adapters)
        for row in range(n_adapters if self.adapter.exists() else 0):
            minia3.load_adapter(model, self.adapter, row)
        minia3.freeze(model)
        return model

    def base(self):
        import transformers

        kind = transformers.AutoModelForSeq2SeqLM if self.is_t5 else transformers.AutoModelForCausalLM
        return kind.from_pretrained(self.folder, dtype=self.dtype)

    def theirs(self):
        import peft

        with quiet():
            return peft.PeftModel.from_pretrained(self.base(), self.adapter, is_trainable=True)

    def lora(self, names=("default",)):
        """PEFT's LoRA at rank 8 on q and v, with random B, as after training."""
        import peft

        targets = ["q", "v"] if self.is_t5 else ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=8, target_modules=targets, task_type=TASK_TYPE[self.kind], init_lora_weights=False)
        with quiet():
            model = peft.get_peft_model(self.base(), config, names[0])
            for name in names[1:]:
                model.add_adapter(name, config)
        return model

    def same(self, found, expected):
        """Both compute this: to rounding in float32, to bfloat16's eight bits otherwise."""
        tolerance = 1e-4 if self.dtype == torch.float32 else 3e-2
        if not torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance):
            raise AssertionError(f"the two sides differ by {(found - expected).abs().max()}")


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
