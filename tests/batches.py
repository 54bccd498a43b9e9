"""Random padded batches, and the loss and gradients of a model on them."""

import torch
from conftest import tokens

import minia3
from minia3.inference.scoring import choice_logprobs
from minia3.tasks.batches import Batch
from minia3.training.losses import total_loss


def batch_of(lengths, n_choices=2, n_target=4, seed=0):
    """Return a Batch of sources of these lengths; targets have 1 to n_target tokens, in turn."""
    n_rows = len(lengths)
    target_BCL = tokens(n_rows, n_choices, n_target, seed=seed + 1)
    n_real_BC1 = torch.arange(n_rows * n_choices).view(n_rows, n_choices, 1) % n_target + 1
    return Batch(
        source_BM=tokens(n_rows, max(lengths), seed=seed),
        mask_BM=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        target_BCL=target_BCL,
        target_mask_BCL=torch.arange(n_target) < n_real_BC1,
        label_B=torch.arange(n_rows) % n_choices,
    )


def loss_of(model, batch):
    logp_BCL = choice_logprobs(model, batch)
    return total_loss(logp_BCL, batch.target_mask_BCL, batch.label_B)


def gradients(model, batch, seed=0):
    """Return the loss and the gradient of every vector. seed: of dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(model, batch)
    loss.backward()
    return [loss.detach(), *(vector.grad for vector in minia3.vectors(model).values())]


def same(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
