#!/usr/bin/env python3
"""Writes data/reference/tokens: small tokenizers of three kinds, and what they make of text.txt, by SentencePiece; for
dev/test_tokens.sh, which needs neither. From the project folder: dev/tokens_reference.py [KIND...]

fold.tok and fold.bin in the same folder are older. They show that a .tok of version 1 with folded whitespace, which
data/common.py does not write any more, is still read."""
import io, os, sys, tempfile

import sentencepiece

sys.path.insert(0, "data")
import common

FOLDER = "data/reference/tokens"
TEXT = FOLDER + "/text.txt"
# What is replaced by what: longer and shorter rules, rules with spaces, rules that remove, a rule inside a user-defined
# piece, and letters of which one is a prefix of another rule.
RULES = {"\t": " ", "\r": " ", "\f": " ", "\v": "", "\x01": "", "\u200b": " ", "\ufeff": "", "\u00df": "ss",
         "\u2500": "-", "\u2500\u2500": "=", "\u2500\u2500\u2500\u2500": " == ", "--": "  -  - ", "`": "", ".": " .",
         "un": "UN", "\u00e9": "e\u0301", **{c: c.lower() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}, "Me": "ME"}
KINDS = { # own: any text comes back; bpe: like Llama's; rules: whitespace folded and no bytes, like T5's, and RULES
    "own": dict(model_type="unigram", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"], unk_id=0, eos_id=1, bos_id=-1),
    "bpe": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                remove_extra_whitespaces=False, user_defined_symbols=["chunk", "\n"]),
    "rules": dict(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=["chunk"]),
}

for name in sys.argv[1:] or KINDS:
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as f:
        for pair in RULES.items() if name == "rules" else ():
            f.write("\t".join(" ".join(f"{ord(c):X}" for c in text) for text in pair) + "\n")
        f.flush()
        sentencepiece.SentencePieceTrainer.train(
            input="README.md", model_writer=model, vocab_size=500, minloglevel=2, character_coverage=0.99,
            **KINDS[name], **(dict(normalization_rule_tsv=f.name) if name == "rules" else {}))
    tokenizer = common.SentencePiece(model.getvalue(), name)
    tokenizer.tok = name + ".tok"
    tokenizer.write(FOLDER)
    common.write_split(FOLDER, name, [TEXT], tokenizer)
    os.remove(FOLDER + "/tokenizer.model")
