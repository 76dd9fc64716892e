"""Several documents in one row, kept apart: none attends to another, and each begins at position 0.

transformers tells documents from positions that begin again, if there is neither an attention mask nor a cache
(masking_utils.py, `find_packed_sequence_indices`), and masks all pairs of tokens of two documents.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import PreTrainedModel
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hatrack_trainer.errors import UsageError

PADDING = 0  # any token, as no other sees it, and nothing is learned of it
PROBE = 8
"""Tokens of each document of the probe."""
TOLERANCE = 0.02
"""Of the largest logit: above what 16 bits round, and below what another document's tokens do."""


def pack(documents: Dataset, max_length: int) -> Dataset:
    """Rows of at most `max_length` tokens, best-fit decreasing over each 1,000 documents, with their `seq_lengths`.

    documents: `input_ids` and `labels` of at most `max_length` tokens, whose first label is not learned.
    """
    disable_progress_bars()
    return pack_dataset(documents, max_length, "bfd")


def packing_remark(rows: Dataset, max_length: int) -> str:
    """Says how full the rows are."""
    lengths = [length for row in rows["seq_lengths"] for length in row]
    full = sum(lengths) / (len(rows) * max_length)
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    return f"packing: {len(lengths)} documents in {count} of {max_length} tokens, {full:.0%} full"


class PackedCollator(DataCollatorForLanguageModeling):
    """Batches [rows, tokens] with position_ids and without an attention mask, which would make one document of a row.

    TRL's own way flattens a batch to one row, whose mask grows with the square of the batch where attention needs one.
    Padding is at position 0, token by token: documents of their own, without labels.
    """

    def __init__(self) -> None:
        super().__init__(pad_token_id=PADDING, return_position_ids=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Called by the trainer."""
        batch: dict[str, Any] = super().torch_call(examples)
        del batch["attention_mask"]
        return batch


def check_documents_apart(base: PreTrainedModel) -> None:
    """Raises UsageError for a base in which a document changes with what stands before it in its row."""
    ids = torch.arange(2 * PROBE, device=base.device).view(2, PROBE)
    first, second = _logits(base, ids), _logits(base, ids.flip(0)).flip(0)
    if (first - second).abs().max() > TOLERANCE * first.abs().max():
        raise UsageError("train.packing: documents of a row would see each other in this base")


@torch.no_grad()
def _logits(base: PreTrainedModel, documents: Tensor) -> Tensor:
    """documents[2, PROBE] in one row to logits[2, PROBE, vocabulary]."""
    positions = torch.arange(PROBE, device=documents.device).repeat(2)
    output = base(input_ids=documents.view(1, -1), position_ids=positions[None], use_cache=False)
    return output.logits.view(*documents.shape, -1).float()
