"""Packing: most of a block works token by token, so a padded batch can leave its padding out.

Two sources of 30 and 500 tokens fill a batch of 2 x 500 positions, but only 530 are real tokens.
Projections, norms and feed-forwards get only these. Attention must know which tokens belong
together. It gets the padded batch again, or, on a CPU, long rows end to end, one after the other:

    the batch         (2, 500, D)
    pack              (530, 1, D)                   for everything but attention
    for_attention     (2, 500, D) or (1, 530, D)    and `from_attention` is the way back

Shapes: B batch, L length, D width, T real tokens of the batch, G key/value heads, K head width.
"""

import torch

from minia3.model.to_device import to_device

# Attention takes longer for shorter rows one by one than for all of them at once.
LEAST_COLUMNS = 64


class Packing:
    """The places of the real tokens of a padded batch.

    mask_BL: bool, True = real. It should be on the CPU, because `nonzero` would wait for a GPU.
    block: the first of the blocks that read the tokens, because it matters whether it is compiled.

    lengths: how many real tokens each row has, if attention gets the rows end to end. None: it gets
    the padded batch.

    Places are counted through the whole batch, and each occurs once, so the backward passes of
    `pack` and `unpack` are plain copies. The backward pass of x[rows, columns] would accumulate,
    for which a GPU sorts the indices.
    """

    def __init__(self, mask_BL, device, block):
        self.place_T = true_places(mask_BL, device)
        self.shape = mask_BL.shape
        self.lengths = None
        if lies_end_to_end(mask_BL, device, block):
            self.lengths = mask_BL.sum(1).tolist()

    def pack(self, x_BLD):
        """Return the real tokens (T, 1, D), row by row."""
        return x_BLD.flatten(0, 1).index_select(0, self.place_T).unsqueeze(1)

    def unpack(self, x_T1D):
        """Return (B, L, D), with zeros in place of the padding."""
        return spread(x_T1D.squeeze(1), self.place_T, self.shape)

    def for_attention(self, x_T1D):
        """Return the tokens as attention reads them: (B, L, D), or (1, T, D) end to end."""
        if self.lengths is None:
            return self.unpack(x_T1D)
        return x_T1D.squeeze(1).unsqueeze(0)

    def from_attention(self, x):
        """Return the real tokens (T, 1, D) of what attention returns."""
        if self.lengths is None:
            return self.pack(x)
        return x.squeeze(0).unsqueeze(1)

    def positions_for_attention(self, position_BL):
        """Return the positions of the tokens that attention reads: (B or 1, L), or (1, T)."""
        if self.lengths is None:
            return position_BL
        return position_BL.expand(self.shape).flatten()[self.place_T].unsqueeze(0)

    def padded_kv(self, kv):
        """Return keys and values (B, G, L, K), with zeros in place of the padding.

        kv: those that attention reads, which may be (1, G, T, K), end to end.
        """
        if self.lengths is None:
            return kv
        k_TGK, v_TGK = (x.squeeze(0).transpose(0, 1) for x in kv)
        k_BLGK = spread(k_TGK, self.place_T, self.shape)
        v_BLGK = spread(v_TGK, self.place_T, self.shape)
        return k_BLGK.transpose(1, 2), v_BLGK.transpose(1, 2)

    def adapters(self, adapter_B):
        """Return the adapter of each token (T,). One adapter for the whole batch stays (1,)."""
        if len(adapter_B) == 1:
            return adapter_B
        return adapter_B[self.place_T // self.shape[1]]


def lies_end_to_end(mask_BL, device, block):
    """Return whether attention gets the rows of this batch end to end.

    This is faster on a CPU if the rows are long and there is padding. It is not done for compiled
    blocks, which would be compiled again for other lengths. And the padding must be at the end,
    because then the mask and the biases of each row are the first rows and columns of those of the
    batch.
    """
    is_compiled = torch.compiler.is_compiling() or block._compiled_call_impl is not None
    if is_compiled or device.type != "cpu" or mask_BL.shape[1] < LEAST_COLUMNS or mask_BL.all():
        return False
    return bool((mask_BL[:, :-1] >= mask_BL[:, 1:]).all())


def true_places(mask, device):
    """Return (T,) long: the places in the flattened mask that are True.

    The mask should be on the CPU.
    """
    return to_device(mask.flatten().nonzero()[:, 0], device)


def spread(x, place_T, shape):
    """Return zeros (*shape, ...) with x (T, ...) in their places. This undoes x_flat[place_T]."""
    flat = x.new_zeros(shape.numel(), *x.shape[1:])
    # `index_copy_` is missing on Apple's GPUs before torch 2.8, and slow before torch 2.13.
    flat.index_put_((place_T,), x)
    return flat.unflatten(0, shape)


class NoPacking:
    """The methods of Packing for a batch without padding, which stays as it is."""

    lengths = None

    def pack(self, x):
        return x

    unpack = for_attention = from_attention = pack
    positions_for_attention = padded_kv = adapters = pack


NO_PACKING = NoPacking()
