#!/usr/bin/env python3
"""Writes data/reference/tokens: small tokenizers of three kinds, and what they make of text.txt, by SentencePiece; for
dev/test_tokens.sh, which needs neither. From the project folder: dev/tokens_reference.py"""
import io, os, sys

import sentencepiece

sys.path.insert(0, "data")
import common

FOLDER = "data/reference/tokens"
TEXT = FOLDER + "/text.txt"
KINDS = { # own: what data/*.py train; fold: whitespace folded, no bytes, like T5's; bpe: like Llama's
    "own": None,
    "fold": dict(model_type="unigram", normalization_rule_name="identity", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    "bpe": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                remove_extra_whitespaces=False, user_defined_symbols=["chunk", "\n"]),
}

for name, arguments in KINDS.items():
    if arguments is None:
        contents = common.train_sentencepiece(["README.md"], 500)
    else:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(input="README.md", model_writer=model, vocab_size=500, minloglevel=2,
                                                 character_coverage=0.99, **arguments)
        contents = model.getvalue()
    tokenizer = common.SentencePiece(contents, name)
    tokenizer.tok = name + ".tok"
    tokenizer.write(FOLDER)
    common.write_split(FOLDER, name, [TEXT], tokenizer)
    os.remove(FOLDER + "/tokenizer.model")
