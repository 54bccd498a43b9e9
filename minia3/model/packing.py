"""Packing: most of a block works token by token, so a padded batch can leave its padding out.

Two sources of 30 and 500 tokens fill a batch of 2 x 500 positions, but only 530 are real tokens.
Projections, norms and feed-forwards get those 530 as rows of one token each. Only attention needs
to know which tokens belong together. On a GPU, it gets a padded batch again. On a CPU, long rows
stay end to end, and attention reads them one by one.

Shapes: B batch, L length, D width, T real tokens of the batch, N positions of the batch (B * L),
G key/value heads, K head width.
"""

import torch

from minia3.model.to_device import to_device

LEAST_COLUMNS = 64  # attention takes longer for shorter rows one by one than for all at once


class Packing:
    """The positions of the real tokens of a padded batch.

    mask_BL: bool, True = real. It should be on the CPU, because `nonzero` would wait for a GPU.

    Positions are counted through the whole batch, and each occurs once, so the backward passes of
    `pack` and `unpack` are plain copies. The backward pass of x[rows, columns] would accumulate,
    for which a GPU sorts the indices.

    block: the first of the blocks that read the tokens.
    lengths: how many real tokens each row has, if attention computes row by row (attend.py).
    Otherwise None.
    """

    def __init__(self, mask_BL, device, block):
        self.position_T = to_device(mask_BL.flatten().nonzero()[:, 0], device)
        self.shape = mask_BL.shape
        self.lengths = None
        # Compiled code would be compiled again for other lengths.
        if is_long_and_padded(mask_BL, device) and not is_compiled(block):
            self.lengths = mask_BL.sum(1).tolist()

    def pack(self, x_BLD):
        """Return the real tokens (T, 1, D), row by row."""
        return x_BLD.flatten(0, 1).index_select(0, self.position_T).unsqueeze(1)

    def unpack(self, x_T1D):
        """Return (B, L, D), with zeros in place of the padding."""
        x_ND = x_T1D.new_zeros(self.shape.numel(), x_T1D.shape[2])
        # `index_copy_` is missing on Apple's GPUs before torch 2.8, and slow before torch 2.13.
        x_ND.index_put_((self.position_T,), x_T1D.squeeze(1))
        return x_ND.unflatten(0, self.shape)

    def rows(self, x_T1D):
        """Return the tokens as attention reads them: unpacked, or (1, T, D), row after row."""
        if self.lengths is None:
            return self.unpack(x_T1D)
        return x_T1D.squeeze(1).unsqueeze(0)

    def tokens(self, x):
        """Return the real tokens (T, 1, D) of what attention returns. This undoes `rows`."""
        if self.lengths is None:
            return self.pack(x)
        return x.squeeze(0).unsqueeze(1)

    def padded_heads(self, x):
        """Return keys or values (B, G, L, K), with zeros in place of the padding.

        x: the keys or values of `rows`, which may be (1, G, T, K), row after row.
        """
        if self.lengths is None:
            return x
        x_TGK = x.squeeze(0).transpose(0, 1)
        x_BLGK = self.unpack(x_TGK.flatten(1).unsqueeze(1)).unflatten(2, x_TGK.shape[1:])
        return x_BLGK.transpose(1, 2)

    def positions(self, position_BL):
        """Return the positions (1, T) of tokens in `rows`, or position_BL (B or 1, L) as it is."""
        if self.lengths is None:
            return position_BL
        position_N = position_BL.expand(self.shape).flatten()
        return position_N[self.position_T].unsqueeze(0)

    def adapters(self, adapter_B):
        """Return the adapter of each token (T,). One adapter for the whole batch stays (1,)."""
        if len(adapter_B) == 1:
            return adapter_B
        return adapter_B[self.position_T // self.shape[1]]


def is_compiled(module):
    """Return whether torch compiles a module, or the function that calls it."""
    return torch.compiler.is_compiling() or module._compiled_call_impl is not None


def is_long_and_padded(mask_BL, device):
    """Return whether this is a padded batch of long rows on a CPU, with all padding at the end."""
    if device.type != "cpu" or mask_BL.shape[1] < LEAST_COLUMNS or mask_BL.all():
        return False
    return bool((mask_BL[:, :-1] >= mask_BL[:, 1:]).all())


class NoPacking:
    """The methods of Packing for a batch without padding, which stays as it is."""

    lengths = None

    def pack(self, x):
        return x

    unpack = rows = tokens = padded_heads = positions = adapters = pack


NO_PACKING = NoPacking()
