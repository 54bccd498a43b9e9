"""Packing: most of a block works token by token, so a padded batch can leave its padding out.

Two sources of 30 and 500 tokens fill a batch of 2 x 500 positions, but only 530 are real tokens.
Projections, norms and feed-forwards get those 530 as rows of one token each. Only attention needs
to know which tokens belong together, so it unpacks them.

Shapes: B batch, L length, D width, T real tokens of the batch.
"""

from minia3.model.to_device import to_device


class Packing:
    """The positions of the real tokens of a padded batch.

    mask_BL: bool, True = real. It stays on the CPU, because there `nonzero` waits for no GPU.
    """

    def __init__(self, mask_BL, device):
        self.row_T, self.column_T = to_device(mask_BL.nonzero(), device).unbind(1)
        self.shape = mask_BL.shape
        # On a CPU, if all padding is at the end: the real tokens of each row, see attend.py.
        self.lengths = None
        is_at_end = bool((mask_BL[:, :-1] >= mask_BL[:, 1:]).all())
        if device.type == "cpu" and is_at_end and not mask_BL.all():
            self.lengths = mask_BL.sum(1).tolist()

    def pack(self, x_BLD):
        """Return the real tokens (T, 1, D), row by row."""
        return x_BLD[self.row_T, self.column_T].unsqueeze(1)

    def unpack(self, x_T1D):
        """Return (B, L, D), with zeros in place of the padding."""
        x_BLD = x_T1D.new_zeros(*self.shape, x_T1D.shape[2])
        return x_BLD.index_put((self.row_T, self.column_T), x_T1D[:, 0])

    def adapters(self, adapter_B):
        """Return the adapter of each token (T,). One adapter for the whole batch stays (1,)."""
        if len(adapter_B) == 1:
            return adapter_B
        return adapter_B[self.row_T]


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
