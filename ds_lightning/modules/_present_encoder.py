"""An encoder that sees the samples which have its modality, and no others."""

from typing import Self

import torch
from torch import Tensor, nn

from ds_lightning.errors import ConfigError


class PresentEncoder(nn.Module):
    """Give the tokens of the samples that have a modality; whatever stands in the others' place is never read.

    Args:
        modality: its name, for messages.
        encoder: has `num_features`, D, and maps inputs and their mask to tokens (B, N, D) and their mask.
        frozen: whether it is left as it is, in eval mode and without gradients.
    """

    def __init__(self, modality: str, encoder: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.modality, self.num_features, self.frozen = modality, int(encoder.num_features), frozen  # type: ignore[arg-type]
        self.encoder = encoder
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Change the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(
        self, x: Tensor | None, mask: Tensor | None, present: Tensor | None, size: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens (B, N, D), and which of them are real, (B, N) bool or None; absent samples get zeros.

        Args:
            x: inputs (B, ...); None when no sample has any.
            mask: (B, T) bool, True for a real frame; None: all.
            present: (B,) bool on the CPU; None: all.
            size: B.
            device: of the batch.
        """
        if present is not None and not present.any():
            dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
            return torch.zeros(size, 1, self.num_features, device=device, dtype=dtype), None
        assert x is not None
        if present is None or bool(present.all()):
            return self._tokens(x, mask)
        rows = present.nonzero()[:, 0].to(device, non_blocking=True)
        tokens, token_mask = self._tokens(x[rows], None if mask is None else mask[rows])
        tokens = tokens.new_zeros(size, *tokens.shape[1:]).index_copy(0, rows, tokens)
        if token_mask is not None:
            token_mask = token_mask.new_zeros(size, token_mask.shape[1]).index_copy(0, rows, token_mask)
        return tokens, token_mask

    def _tokens(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            given = self.encoder(x, mask)
        try:
            tokens, token_mask = given
            fits = tokens.dim() == 3 and tokens.shape[::2] == (len(x), self.num_features)
        except (TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise ConfigError(
                f"the {self.modality} encoder {type(self.encoder).__name__} gave {_form(given)}; expected tokens "
                f"({len(x)}, N, {self.num_features}) and their mask, a pair"
            )
        return tokens, token_mask


def _form(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor {tuple(given.shape)}"
    return f"({', '.join(map(_form, given))})" if isinstance(given, tuple) else f"a {type(given).__name__}"
