"""The two sides: minia3, and transformers with peft, on the same random weights in the shapes of a known model."""

import contextlib
import warnings
from dataclasses import replace

import numpy as np
import torch

import minia3
from minia3.adapters.lora import add_lora
from minia3.checkpoints.config import to_hf
from minia3.checkpoints.known_models import known_models
from minia3.model.t5 import T5Config
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example

IGNORED = -100  # transformers' label of a position without a loss
RTE = (
    40,
    46,
    52,
    58,
    66,
    77,
    95,
    180,
)  # lengths like RTE's: the middles of the eighths of its rows, about
TINY = {"d_model": 32, "d_head": 8, "d_ff": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128}


def config_of(name, quick=False):
    """The config of a known model; `quick`: of the same kind, but tiny."""
    config = replace(known_models()[name].config, dropout=0.0)
    if not quick:
        return config
    return replace(
        config,
        **TINY,
        **({"n_decoder_layers": 2} if isinstance(config, T5Config) else {"n_kv_heads": 2}),
    )


class Pair:
    """One model: a folder with weights, an adapter folder, and both sides' models made from them."""

    def __init__(self, name, folder, quick, dtype, device="cpu"):
        self.name, self.quick, self.dtype, self.device = name, quick, dtype, device
        self.config = config_of(name, quick)
        self.is_t5, self.vocab_size = isinstance(self.config, T5Config), self.config.vocab_size
        self.scratch, self.folder, self.adapter = folder, folder / name, folder / f"{name}-adapter"
        if not self.folder.exists():
            self.make()

    def make(self):
        import transformers

        torch.manual_seed(0)
        kind = (
            transformers.AutoModelForSeq2SeqLM if self.is_t5 else transformers.AutoModelForCausalLM
        )
        spread = {
            "initializer_range": self.config.d_model**-0.5
        }  # LLaMA's: logits as far apart as T5's
        config = transformers.AutoConfig.for_model(**to_hf(self.config, self.dtype) | spread)
        with torch.device(self.device):
            kind.from_config(config, dtype=self.dtype).save_pretrained(self.folder)
        ours = self.ours()
        with torch.no_grad():
            for vector in minia3.vectors(ours).values():
                vector += 0.1 * torch.randn_like(vector)
        minia3.save_adapter(ours, self.adapter)

    def ours(self, n_adapters=1):
        """Every row is the adapter."""
        model = minia3.load_model(self.folder, n_adapters=n_adapters, device=self.device)
        for row in range(n_adapters if self.adapter.exists() else 0):
            minia3.load_adapter(model, self.adapter, row)
        minia3.freeze(model)
        return model

    def full(self):
        """Ours, to be trained whole."""
        return self.ours().requires_grad_(True)

    def base(self):
        import transformers

        kind = (
            transformers.AutoModelForSeq2SeqLM if self.is_t5 else transformers.AutoModelForCausalLM
        )
        return kind.from_pretrained(self.folder, dtype=self.dtype).to(self.device)

    def theirs(self):
        import peft

        with quiet():
            return peft.PeftModel.from_pretrained(self.base(), self.adapter, is_trainable=True)

    def our_lora(self):
        """Ours, with LoRA at rank 8 on q and v in place of the vectors."""
        model = minia3.load_model(self.folder, device=self.device)
        add_lora(model)
        return model

    def lora(self, names=("default",)):
        """PEFT's LoRA at rank 8 on q and v, with random B, as after training."""
        import peft

        targets, task = (
            (["q", "v"], "SEQ_2_SEQ_LM") if self.is_t5 else (["q_proj", "v_proj"], "CAUSAL_LM")
        )
        config = peft.LoraConfig(
            r=8, target_modules=targets, task_type=task, init_lora_weights=False
        )
        with quiet():
            model = peft.get_peft_model(self.base(), config, names[0])
            for name in names[1:]:
                model.add_adapter(name, config)
        return model

    def same(self, found, expected):
        """Both compute this: to rounding, beside how far apart the values are. In bfloat16 this is found to be 0.01 to
        0.03 of log-probabilities, which are off by 0.12 and more where one side leaves the adapter out.
        """
        off = (found.float() - expected.float()).square().mean().sqrt()
        if not off <= (1e-4 if self.dtype == torch.float32 else 0.06) * expected.float().std():
            raise AssertionError(
                f"the two sides differ by {off:.3g}, of values whose spread is {expected.std():.3g}"
            )

    # What they read

    def lengths(self, like_rte=False):
        lengths = RTE if like_rte else (128,) * 8
        return [n // 16 for n in lengths] if self.quick else list(lengths)

    def batch(self, lengths=None, n_choices=1):
        """The examples of these lengths with targets of 8 tokens, as a batch."""
        batch = collate(examples(lengths or self.lengths(), n_choices, 8, self.vocab_size))
        return batch._make(x.to(self.device) for x in batch)

    def their_inputs(self, batch, target_NL, padding_side="right"):
        """What transformers takes: every source with its targets (N = B, or B times the choices), padded."""
        n = len(target_NL) // len(batch.source_BM)
        source_NM, mask_NM = (
            x.repeat_interleave(n, dim=0) for x in (batch.source_BM, batch.mask_BM)
        )
        if self.is_t5:
            return {"input_ids": source_NM, "attention_mask": mask_NM.long(), "labels": target_NL}
        texts = [
            torch.cat((s[keep], t))
            for s, keep, t in zip(source_NM, mask_NM, target_NL, strict=True)
        ]
        labels = [
            torch.cat((torch.full_like(x[: -len(t)], IGNORED), t))
            for x, t in zip(texts, target_NL, strict=True)
        ]

        def pad(rows, value):
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side)

        real = pad([torch.ones_like(x) for x in texts], 0)
        return {"input_ids": pad(texts, 0), "attention_mask": real, "labels": pad(labels, IGNORED)}


def examples(lengths, n_choices, n_target, vocab_size, seed=0):
    """Random rows: sources of these lengths, each with `n_choices` targets of `n_target` tokens, ended by 1."""
    draw = np.random.RandomState(seed).randint
    return [
        Example(
            draw(3, vocab_size, length).tolist(),
            [[*draw(3, vocab_size, n_target - 1).tolist(), 1] for _ in range(n_choices)],
            int(draw(n_choices)),
        )
        for length in lengths
    ]


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
