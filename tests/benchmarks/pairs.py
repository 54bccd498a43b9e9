"""The two sides: minia3, and transformers with PEFT.

Both load the same folder: random weights in the shapes of a known model, and a random adapter.

Shapes: B batch, M source length, C choices, L target length, N = B * C.
"""

import contextlib
import warnings
from dataclasses import replace

import numpy as np
import torch

import minia3
from minia3.adapters.lora import add_lora
from minia3.checkpoints.config import to_hf
from minia3.checkpoints.known_models import KNOWN_MODELS
from minia3.model.t5 import T5Config
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example

IGNORED = -100  # transformers' label of a position that has no loss
N_TARGET = 8  # tokens of a target in training
# Lengths like RTE's: roughly the middles of the eighths of its rows.
RTE_LENGTHS = (40, 46, 52, 58, 66, 77, 95, 180)
TINY = {"d_model": 32, "d_head": 8, "d_ff": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128}

# The ratio of root mean squares up to which two sides are the same, see `Pair.check_same`.
TOLERANCE = 1e-4
TOLERANCE_OF_16_BITS = 0.06


def config_of(name, quick=False):
    """Return the config of a known model without dropout. quick: tiny, but of the same kind."""
    config = replace(KNOWN_MODELS[name].config, dropout=0.0)
    if not quick:
        return config
    if isinstance(config, T5Config):
        return replace(config, **TINY, n_decoder_layers=2)
    return replace(config, **TINY, n_kv_heads=2)


class Pair:
    """One model, as a folder of weights and a folder of an adapter, from which both sides load."""

    def __init__(self, name, scratch, quick, dtype, device="cpu"):
        self.name = name
        self.quick = quick
        self.dtype = dtype
        self.device = device
        self.config = config_of(name, quick)
        self.is_t5 = isinstance(self.config, T5Config)
        self.vocab_size = self.config.vocab_size
        self.scratch = scratch
        self.folder = scratch / name
        self.adapter = scratch / f"{name}-adapter"
        if not self.folder.exists():
            self.make_folders()

    def make_folders(self):
        import transformers

        torch.manual_seed(0)
        raw = to_hf(self.config, self.dtype)
        # For LLaMA: with it, its logits are as far apart as T5's.
        raw["initializer_range"] = self.config.d_model**-0.5
        config = transformers.AutoConfig.for_model(**raw)
        with torch.device(self.device):
            model = self.their_class().from_config(config, dtype=self.dtype)
        model.save_pretrained(self.folder)

        ours = minia3.load_model(self.folder, device=self.device)
        with torch.no_grad():
            for vector in minia3.vectors(ours).values():
                vector += 0.1 * torch.randn_like(vector)
        minia3.save_adapter(ours, self.adapter)

    def their_class(self):
        import transformers

        if self.is_t5:
            return transformers.AutoModelForSeq2SeqLM
        return transformers.AutoModelForCausalLM

    # Our models

    def ours(self, n_adapters=1):
        """Return our model. The adapter is in every row, and only vectors train."""
        model = minia3.load_model(self.folder, n_adapters=n_adapters, device=self.device)
        for row in range(n_adapters):
            minia3.load_adapter(model, self.adapter, row)
        minia3.freeze(model)
        return model

    def our_lora(self):
        """Return our model with LoRA of rank 8 on q and v. Only LoRA trains."""
        model = minia3.load_model(self.folder, device=self.device)
        add_lora(model)
        return model

    def our_full(self):
        """Return our model. All of it trains."""
        return self.ours().requires_grad_(True)

    # Their models

    def their_base(self):
        return self.their_class().from_pretrained(self.folder, dtype=self.dtype).to(self.device)

    def theirs(self):
        """Return PEFT's model with the adapter. Only vectors train."""
        import peft

        with no_warnings():
            return peft.PeftModel.from_pretrained(
                self.their_base(), self.adapter, is_trainable=True
            )

    def their_lora(self, names=("default",)):
        """Return PEFT's model with a LoRA of rank 8 on q and v for each name.

        B is random, as after training.
        """
        import peft

        if self.is_t5:
            targets = ["q", "v"]
            task_type = "SEQ_2_SEQ_LM"
        else:
            targets = ["q_proj", "v_proj"]
            task_type = "CAUSAL_LM"
        config = peft.LoraConfig(
            r=8, target_modules=targets, task_type=task_type, init_lora_weights=False
        )
        with no_warnings():
            model = peft.get_peft_model(self.their_base(), config, names[0])
            for name in names[1:]:
                model.add_adapter(name, config)
        return model

    # What both sides compute

    def check_same(self, found, expected):
        """Raise AssertionError unless both sides computed the same, up to rounding.

        The difference is measured beside the spread of the values. Of log-probabilities in
        bfloat16 it is 0.01 to 0.03, and 0.12 or more if one side leaves the adapter out.
        """
        difference = (found.float() - expected.float()).square().mean().sqrt()
        spread = expected.float().std()
        tolerance = TOLERANCE if self.dtype == torch.float32 else TOLERANCE_OF_16_BITS
        if not difference <= tolerance * spread:  # also if it is NaN
            raise AssertionError(
                f"the two sides differ by {difference:.3g} in values whose spread is {spread:.3g}"
            )

    # What both sides read

    def lengths(self, like_rte=False):
        """Return the lengths of eight sources. quick: a sixteenth of them."""
        lengths = RTE_LENGTHS if like_rte else (128,) * 8
        if self.quick:
            return [length // 16 for length in lengths]
        return list(lengths)

    def batch(self, lengths=None, n_choices=1, n_target=N_TARGET):
        """Return a Batch of random sources, by default `self.lengths()` long.

        n_target: tokens of each target.
        """
        if lengths is None:
            lengths = self.lengths()
        examples = random_examples(lengths, n_choices, n_target, self.vocab_size)
        return batch_on(self.device, examples)

    def their_inputs(self, batch, target_NL, padding_side="right"):
        """Return the arguments of transformers' models, as a dict.

        Every source is repeated for its targets. LLaMA reads both as one text, and padding is on
        the given side of it.
        """
        n_choices = len(target_NL) // len(batch.source_BM)
        source_NM = batch.source_BM.repeat_interleave(n_choices, dim=0)
        mask_NM = batch.mask_BM.repeat_interleave(n_choices, dim=0)
        if self.is_t5:
            return {"input_ids": source_NM, "attention_mask": mask_NM.long(), "labels": target_NL}

        texts = []
        labels = []
        for source, mask, target in zip(source_NM, mask_NM, target_NL, strict=True):
            source = source[mask]
            texts.append(torch.cat((source, target)))
            labels.append(torch.cat((torch.full_like(source, IGNORED), target)))

        def pad(rows, value):
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side)

        mask = pad([torch.ones_like(text) for text in texts], 0)
        return {"input_ids": pad(texts, 0), "attention_mask": mask, "labels": pad(labels, IGNORED)}


def random_examples(lengths, n_choices, n_target, vocab_size, seed=0):
    """Return an Example for each length: its source has as many random tokens.

    Each has `n_choices` targets of `n_target` tokens, the last of which is the end token 1.
    """
    draw = np.random.RandomState(seed).randint
    examples = []
    for length in lengths:
        source = draw(3, vocab_size, length).tolist()
        targets = []
        for _ in range(n_choices):
            targets.append([*draw(3, vocab_size, n_target - 1).tolist(), 1])
        examples.append(Example(source, targets, label=int(draw(n_choices))))
    return examples


def batch_on(device, examples):
    """Return the Batch of examples, on a device."""
    batch = collate(examples)
    return batch._make(x.to(device) for x in batch)


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
