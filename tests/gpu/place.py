"""Where the checks run, and random models there."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minia3.checkpoints.load import build_model
from minia3.checkpoints.place import place_parameter
from minia3.inference.scoring import choice_logprobs
from minia3.model.ia3 import freeze, vectors
from minia3.tasks.batches import collate
from minia3.tasks.examples import Example
from minia3.training.device import device_module
from minia3.training.losses import total_loss
from tests.benchmarks.pairs import config_of

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """A device, and whether this is only a dry run, with tiny models, to see that checks work."""

    device: torch.device
    is_dry: bool = False

    @property
    def module(self):
        """torch.cuda, or the like; None for a CPU."""
        return device_module(self.device)

    @property
    def n_devices(self):
        """How many devices of this kind there are. A dry run acts as if it had two."""
        return 2 if self.module is None else self.module.device_count()

    @property
    def name(self):
        return "CPU" if self.module is None else self.module.get_device_name(self.device)

    def finish(self):
        """Wait until the device has done all its work."""
        if self.module is not None:
            self.module.synchronize(self.device)

    def model(self, name, dtype, seed=0):
        """Return a random model in the shapes of a known one. Only its vectors train."""
        config = config_of(name, quick=self.is_dry)
        model = build_model(config)
        generator = torch.Generator(self.device).manual_seed(seed)
        for key, parameter in list(model.named_parameters()):
            values = torch.empty(parameter.shape, device=self.device).normal_(generator=generator)
            if key.endswith(".scale"):
                place_parameter(model, key, 1 + 0.1 * values)  # a vector is float32
                continue
            if parameter.dim() == 1:
                values = torch.ones_like(values)  # of a norm
            else:
                values *= 0.7 * parameter.shape[1] ** -0.5
            place_parameter(model, key, values.to(dtype))
        freeze(model)
        return model.to(self.device).eval()

    def batch(self, model, lengths, n_choices=2, n_target=8):
        """Return a Batch of random examples with sources of these lengths."""
        if self.is_dry:
            lengths = [length // 8 for length in lengths]
        generator = torch.Generator().manual_seed(1)

        def text(length):
            ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
            return ids.tolist()

        examples = []
        for i, length in enumerate(lengths):
            targets = [text(n_target - k) for k in range(n_choices)]
            examples.append(Example(text(length), targets, i % n_choices))
        return collate(examples)

    def gradients(self, model, batch, seed=0):
        """Return the loss (float), and the gradients of all vectors as one tensor on the CPU."""
        model.zero_grad()
        torch.manual_seed(seed)
        loss = total_loss(choice_logprobs(model, batch), batch.target_mask_BCL, batch.label_B)
        loss.backward()
        flat = [vector.grad.flatten() for vector in vectors(model).values()]
        return loss.item(), torch.cat(flat).cpu()


def off(found, expected):
    """Return the length of the difference, relative to that of `expected`."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def expect_at_most(found, most, what):
    """Raise AssertionError if a number is larger than it may be, or NaN."""
    if not found <= most:
        raise AssertionError(f"{what}: {found:.3g}, expected at most {most:g}")


def run_python(*words, timeout=120):
    """Return a finished process of this Python, in the folder of the repository."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
