"""To be written."""


class Packing:
    """Where a padded batch has its real tokens. What works token by token gets them alone, as T rows of one token,
    (T, 1, D), each with the adapter of its row. Attention unpacks them, to (B, L, D) with zeros for padding.
    """

    def __init__(self, mask_BL, device):
        self.row_T, self.column_T = mask_BL.nonzero().to(device).unbind(1)
        self.shape = mask_BL.shape

    def pack(self, x_BLD):
        return x_BLD[self.row_T, self.column_T].unsqueeze(1)

    def unpack(self, x_T1D):
        return x_T1D.new_zeros(*self.shape, x_T1D.shape[2]).index_put(
            (self.row_T, self.column_T), x_T1D[:, 0]
        )
