"""What the original's code computes from tiny random checkpoints, drawn pictures and given numbers.

All of it lies in shared/parity where that folder is beside the repository; a part of it is in data/parity, so that a
clone alone tests the same kinds of things. Its README says what it is.
"""

from pathlib import Path

WHOLE = Path(__file__).resolve().parents[2] / "shared" / "parity"
PARITY = WHOLE if WHOLE.is_dir() else Path(__file__).parent / "data" / "parity"


def same_columns(logits, stored):
    """The logits of the words that are stored: of all, or of every eighth."""
    return logits[..., :: logits.shape[-1] // stored.shape[-1]]
