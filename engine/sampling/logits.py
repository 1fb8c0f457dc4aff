"""Edits to a step's logits [N, V] before tokens are chosen: biases, masks and penalties of all rows at once.

Each edit collects its (row, token) entries on the host, copies them to the device in one piece and applies them in a
few tensor operations, so its cost grows with what the requests ask for, not with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.sampling.grammar import GrammarState, allowed_words
from engine.transfer import send
from engine.types import InvalidRequestError, SamplingParams

BITS_PER_WORD = 32


class SeenTokens:
    """The tokens that penalties bear on, and how often each was said in the output; a token's cost is constant."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._place = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._place, np.int64, len(self._place))
        self._counts = np.zeros(len(self._place), np.float32)

    def append(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place >= len(self._ids):
            size = max(64, 2 * len(self._ids))
            self._ids = np.resize(self._ids, size)
            self._counts = np.concatenate([self._counts, np.zeros(size - len(self._counts), np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """[number of tokens seen], each once."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        """[number of tokens seen], 0 for one that only the prompt has."""
        return self._counts[: len(self._place)]


@dataclass(frozen=True, slots=True)
class RowEdits:
    """What one row asks for; None: nothing."""

    row: int
    params: SamplingParams
    bias: tuple[np.ndarray, np.ndarray] | None  # token ids, values
    banned_ids: np.ndarray | None
    seen: SeenTokens | None
    grammar: GrammarState | None
    pending: bool = False  # the row's newest token is not among ``seen`` yet
    allowed_ids: np.ndarray | None = None


def edit_(logits: Tensor, edits: Sequence[RowEdits], newest: Tensor | None = None) -> None:
    """Apply all edits to ``logits`` [N, V] in place, in the order of RowEdits' fields.

    ``newest`` [N]: each row's newest token, for rows in which it is ``pending``.
    """
    _add_biases_(logits, edits)
    _ban_(logits, edits)
    _keep_only_(logits, edits)
    _penalise_(logits, edits, newest)
    _mask_(logits, edits)


def token_ids_array(token_ids: Sequence[int], vocab_size: int, param: str) -> np.ndarray:
    """Raises InvalidRequestError for an id beyond ``vocab_size``."""
    if max(token_ids) >= vocab_size:
        raise InvalidRequestError(
            f"{param} has token id {max(token_ids)}, the vocabulary ends at {vocab_size - 1}", param
        )
    return np.array(token_ids, np.int64)


def bias_arrays(params: SamplingParams, vocab_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """logit_bias as token ids and values. Raises InvalidRequestError for an id beyond ``vocab_size``."""
    if not params.logit_bias:
        return None
    token_ids, values = zip(*params.logit_bias, strict=True)
    return token_ids_array(token_ids, vocab_size, "logit_bias"), np.array(values, np.float32)


def _add_biases_(logits: Tensor, edits: Sequence[RowEdits]) -> None:
    biases = [(edit.row, *edit.bias) for edit in edits if edit.bias is not None]
    if biases:
        rows, ids = _entries([(row, token_ids) for row, token_ids, _ in biases], logits.device)
        values = send(np.concatenate([values for _, _, values in biases]), logits.device)
        logits.index_put_((rows, ids), values, accumulate=True)


def _ban_(logits: Tensor, edits: Sequence[RowEdits]) -> None:
    banned = [(edit.row, edit.banned_ids) for edit in edits if edit.banned_ids is not None]
    if banned:
        logits[_entries(banned, logits.device)] = -torch.inf


def _keep_only_(logits: Tensor, edits: Sequence[RowEdits]) -> None:
    allowed = [(edit.row, edit.allowed_ids) for edit in edits if edit.allowed_ids is not None]
    if allowed:
        entries = _entries(allowed, logits.device)
        kept = logits[entries]
        logits[send(np.array([row for row, _ in allowed]), logits.device)] = -torch.inf
        logits[entries] = kept


def _penalise_(logits: Tensor, edits: Sequence[RowEdits], newest: Tensor | None) -> None:
    """A pending token gets an entry of its own. If it had one, both write the same value."""
    penalised = [edit for edit in edits if edit.seen is not None]
    if not penalised:
        return
    device = logits.device
    seen = [edit.seen for edit in penalised if edit.seen is not None]
    lengths = [len(s.ids) for s in seen]
    owners = np.repeat(np.arange(len(penalised)), lengths)  # of the entries, as index into ``penalised``
    pending = np.flatnonzero([edit.pending for edit in penalised])
    rows = np.array([edit.row for edit in penalised])
    owner, pending_owner, row = (send(a, device) for a in (owners, pending, rows))
    ids = send(np.concatenate([s.ids for s in seen]), device)
    counts = send(np.concatenate([s.counts for s in seen]), device)
    if len(pending):
        assert newest is not None
        latest = torch.full_like(row, -1).index_copy_(0, pending_owner, newest[row[pending_owner]].long())
        is_latest = (ids == latest[owner]).float()
        num_before = counts.new_zeros(len(penalised)).index_add_(0, owner, counts * is_latest)
        counts = torch.cat((counts + is_latest, num_before[pending_owner] + 1))
        ids, owner = torch.cat((ids, latest[pending_owner])), torch.cat((owner, pending_owner))
    params = [edit.params for edit in penalised]
    strengths = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    repetition, frequency, presence = send(np.array(strengths, np.float32), device)[owner].unbind(-1)
    entries = row[owner], ids
    values = logits[entries]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[entries] = values - frequency * counts - presence * (counts > 0)


def _mask_(logits: Tensor, edits: Sequence[RowEdits]) -> None:
    grammars = [(edit.row, edit.grammar) for edit in edits if edit.grammar is not None]
    if not grammars:
        return
    vocab_size, device = logits.shape[-1], logits.device
    rows = send(np.array([row for row, _ in grammars]), device)
    words = send(allowed_words([grammar for _, grammar in grammars], vocab_size), device)
    bits = torch.arange(BITS_PER_WORD, dtype=torch.int32, device=device)
    allowed = ((words[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]
    logits[rows] = logits[rows].masked_fill_(~allowed, -torch.inf)


def _entries(ids_of_row: Sequence[tuple[int, np.ndarray]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and token ids of all (row, token) pairs, ready to index logits [N, V] with."""
    rows = np.repeat([row for row, _ in ids_of_row], [len(ids) for _, ids in ids_of_row])
    pairs = np.stack([rows, np.concatenate([ids for _, ids in ids_of_row])])
    rows_dev, ids_dev = send(pairs, device)
    return rows_dev, ids_dev
