"""Train a byte-level BPE of Qwen2's shape on plain text and write it as ``tokenizer.json``.

    python -m benchmarks.training.tokenizer TEXT [TEXT ...] --vocab-size 4096 --out deploy/models/demo-random

Texts are UTF-8, plain or compressed (.gz, .xz). The same texts give the same file.
"""

from __future__ import annotations

import argparse
from io import StringIO
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.unite.calibration import read_text

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Qwen2's pre-tokenizer: contractions, words with at most one leading symbol, single digits, symbols, white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: list[Path], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly ``vocab_size`` ids, the special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for path in texts for line in StringIO(read_text(path))), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the texts hold too few words for {vocab_size} ids, got {tokenizer.get_vocab_size()}")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on plain text.")
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 text files, plain, .gz or .xz")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids in all, special tokens included")
    parser.add_argument("--out", type=Path, required=True, help="directory that gets tokenizer.json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.texts, args.vocab_size).save(str(args.out / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main()
