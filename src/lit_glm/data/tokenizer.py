"""Word-piece tokenizer, a small wrapper around the `tokenizers` library."""

import os
import re
from pathlib import Path
from typing import List, Match

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from lit_glm.errors import InputError


def _lower_sigma(text: str) -> str:
    """Lower-case capital sigmas by their place in the word, as Python does; the library lacks the final sigma."""

    def lower(word: Match[str]) -> str:
        lowered = word.group().replace("\u0130", "I").lower()  # U+0130 alone becomes two characters
        return "".join(low if char == "\u03a3" else char for char, low in zip(word.group(), lowered))

    return re.sub(r"\S*\u03a3\S*", lower, text) if "\u03a3" in text else text


class WordPieceTokenizer:
    """Tokenizer for BERT's uncased word pieces with GLM's command tokens.

    Command tokens are recognised anywhere in a text, case-sensitively; the rest is cleaned, lower-cased, stripped of
    accents, split at white space, punctuation and CJK ideographs, and covered by the longest matching pieces.
    """

    def __init__(self, vocab_file: "str | os.PathLike[str]") -> None:
        """Read a vocabulary.

        Args:
            vocab_file: one token per line; its id is the line number from 0. The two block symbols
                (start and end of piece) follow after the last line.

        Raises:
            InputError: if the file is missing or lacks a command token.
        """
        path = Path(vocab_file)
        try:
            # Split at line feeds only: a vocabulary may contain other characters that Python treats as line breaks.
            lines = path.read_bytes().decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data.vocab_file={path}: cannot be read as UTF-8 text ({error})") from error
        tokens = [line.rstrip("\r") for line in lines]
        if tokens and not tokens[-1]:
            tokens.pop()
        vocabulary = {token: number for number, token in enumerate(tokens)}
        missing = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name not in vocabulary]
        if missing:
            raise InputError(f"data.vocab_file={path}: lacks the tokens {', '.join(missing)}; is it a BERT vocabulary?")
        self.eos, self.cls, self.mask = (vocabulary[name] for name in ("[PAD]", "[CLS]", "[MASK]"))
        self.sop, self.eop = len(tokens), len(tokens) + 1
        self.size = len(tokens) + 2
        vocabulary.update({"<|startofpiece|>": self.sop, "<|endofpiece|>": self.eop})

        self._tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        commands = ("[PAD]", "[CLS]", "[MASK]", "[UNK]", "[SEP]", "<|startofpiece|>", "<|endofpiece|>")
        self._tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in commands])

    def encode(self, text: str) -> List[int]:
        """Return the word-piece ids of a text; [] for white space only."""
        ids: List[int] = self._tokenizer.encode(_lower_sigma(text), add_special_tokens=False).ids
        return ids
