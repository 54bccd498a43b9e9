"""Packing: most of a block works token by token, so a padded batch can leave its padding out.

Two sources of 30 and 500 tokens fill a batch of 2 x 500 positions, but only 530 are real tokens.
Projections, norms and feed-forwards get those 530 as rows of one token each. Only attention needs
to know which tokens belong together, so it unpacks them.

Shapes: B batch, L length, D width, T real tokens of the batch, N positions of the batch (B * L).
"""

from minia3.model.to_device import to_device

LEAST_COLUMNS = 64  # attention takes longer for shorter rows one by one than for all at once


class Packing:
    """The positions of the real tokens of a padded batch.

    mask_BL: bool, True = real. It should be on the CPU, because `nonzero` would wait for a GPU.

    Positions are counted through the whole batch, and each occurs once, so the backward passes of
    `pack` and `unpack` are plain copies. The backward pass of x[rows, columns] would accumulate,
    for which a GPU sorts the indices.
    """

    def __init__(self, mask_BL, device):
        self.position_T = to_device(mask_BL.flatten().nonzero()[:, 0], device)
        self.shape = mask_BL.shape
        # For long rows on a CPU, if all padding is at the end: how many real tokens each row has.
        # Attention then computes row by row (attend.py).
        self.lengths = None
        is_long = device.type == "cpu" and mask_BL.shape[1] >= LEAST_COLUMNS
        is_at_end = bool((mask_BL[:, :-1] >= mask_BL[:, 1:]).all())
        if is_long and is_at_end and not mask_BL.all():
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

    def adapters(self, adapter_B):
        """Return the adapter of each token (T,). One adapter for the whole batch stays (1,)."""
        if len(adapter_B) == 1:
            return adapter_B
        return adapter_B[self.position_T // self.shape[1]]


class NoPacking:
    """The methods of Packing for a batch without padding, which stays as it is."""

    lengths = None

    def pack(self, x):
        return x

    def unpack(self, x):
        return x

    def adapters(self, adapter_B):
        return adapter_B


NO_PACKING = NoPacking()
