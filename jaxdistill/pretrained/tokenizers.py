# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of Hugging Face's library: from a folder, trained, and texts as arrays.

tokenizer = tokens.load_tokenizer("bert-sst2")
tokens.check_tokenizer(tokenizer, module.encoder.size)
inputs = tokens.encode(tokenizer, texts, length=64)
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.models.config import TransformerConfig
from jaxdistill.pretrained.files import find

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""BERT's own tokens, numbered from 0 where a tokenizer is trained."""
CHARACTERS = 1_000
"""As many of a text's characters are tokens, the most frequent; others are [UNK]."""
END_OF_TEXT = "<|endoftext|>"
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"


def load_tokenizer(folder: str | Path) -> Any:
    """A folder's tokenizer, a `tokenizers.Tokenizer`.

    Args:
      folder: with tokenizer.json, or BERT's vocab.txt (in lower case, unless
        tokenizer_config.json says otherwise), or GPT-2's vocab.json and merges.txt;
        the first that is there is read. Tokens that were added to a vocabulary are in
        tokenizer.json, else in tokenizer_config.json or added_tokens.json. A hub's id,
        as in `pretrained.load`.

    Raises:
      ValueError: none of them is there, one is damaged, an added token has a number
        that is not the next, every text is to begin with a token of its own, or a
        library is not installed.
    """
    library, folder = _library(), find(folder)
    whole, words = folder / "tokenizer.json", folder / "vocab.txt"
    pieces = folder / "vocab.json", folder / "merges.txt"
    if whole.is_file():
        return _read(library.Tokenizer.from_file, whole)
    config = _config(folder)
    if words.is_file():
        model = _read(library.models.WordPiece.from_file, words, unk_token="[UNK]")
        tokenizer = _bert(model, config)
    elif all(path.is_file() for path in pieces):
        model = _read(library.models.BPE.from_file, *pieces)
        tokenizer = _gpt2(model, config)
    else:
        raise ValueError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.txt, or "
            "vocab.json and merges.txt"
        )
    return add_tokens(tokenizer, folder, config, _config(folder, ADDED))


def train_wordpiece(texts: Iterable[str], vocab: int) -> Any:
    """A lower-casing tokenizer as BERT has it, trained on texts; the same each time.

    Args:
      texts: strings.
      vocab: V, with the five of `SPECIAL`, of which [PAD] is 0. Few texts may have
        fewer pieces.

    Raises:
      ValueError: V has no room for each character alone and inside a word.

    References:
      Schuster and Nakajima 2012, Japanese and Korean Voice Search (pieces); Devlin et
      al. 2019, BERT, section 3. The library merges the most frequent pair, as byte-pair
      encoding does, not the one that raises the likelihood most.
    """
    library = _library()
    texts = list(texts)
    first, inside = _characters(library, texts)
    alphabet = [*SPECIAL, *first, *inside]
    if len(alphabet) > vocab:
        raise ValueError(
            f"a vocabulary of {vocab} has no room for the {len(alphabet)} special "
            "tokens and characters of these texts"
        )
    # The library numbers characters inside words in no fixed order, and breaks ties by
    # number. As special tokens they have theirs, but a tokenizer with such special
    # tokens would find them in every text: only its vocabulary is kept.
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=vocab,
        special_tokens=alphabet,
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=False,
    )
    draft = _bert(library.models.WordPiece(unk_token="[UNK]"), {}, special=False)
    draft.train_from_iterator(texts, trainer)
    model = library.models.WordPiece(draft.get_vocab(), unk_token="[UNK]")
    return _bert(model, {})


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    pairs: Sequence[str] | None = None,
    *,
    front: bool = False,
) -> dict[str, np.ndarray]:
    """Texts as a model's inputs, cut off at a length and padded.

    Args:
      tokenizer: its own settings of padding and length are not looked at.
      texts: N strings.
      length: L, special tokens included.
      pairs: N strings that follow the texts, or None; the longer of two is cut first.
      front: whether padding is before the texts, as `generate` takes it, or behind.

    Returns:
      `input_ids`, `attention_mask` (0 for padding) and, of pairs between which the
      tokenizer puts special tokens, as BERT's does, `token_type_ids` (1 for the second
      text), each int32 `[N, L]`. Padding is [PAD], or 0 where there is none.

    Raises:
      ValueError: L has no room beside the special tokens, a row has no tokens at all,
        there are more or fewer pairs than texts, or either is a single string.
    """
    for given in (texts, pairs):
        if isinstance(given, str):
            raise ValueError(f"encode takes a list of texts, got one: {given!r}")
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"{len(pairs)} pairs were given for {len(texts)} texts")
    special = tokenizer.num_special_tokens_to_add(pairs is not None)
    if length <= special:
        raise ValueError(
            f"a length of {length} has no room for a text beside {special} special "
            "tokens"
        )
    tokenizer = _library().Tokenizer.from_str(tokenizer.to_str())  # its own stays
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    rows = texts if pairs is None else list(zip(texts, pairs, strict=True))
    found = tokenizer.encode_batch(list(rows))
    shape = (len(found), length)
    ids = np.full(shape, tokenizer.token_to_id("[PAD]") or 0, np.int32)
    keep, types = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, encoding in enumerate(found):
        size = len(encoding.ids)
        if not size:
            raise ValueError(
                f"row {row} has no tokens, and would be all padding: its text is "
                f"{texts[row]!r}"
            )
        at = slice(length - size, None) if front else slice(size)
        ids[row, at], types[row, at], keep[row, at] = encoding.ids, encoding.type_ids, 1
    inputs = {"input_ids": ids, "attention_mask": keep}
    # Of single texts all are 0, which BERT takes where there are none, and to which a
    # GPT would add the embedding of token 0.
    typed = special and pairs is not None
    return {**inputs, "token_type_ids": types} if typed else inputs


def check_tokenizer(
    tokenizer: Any, size: TransformerConfig, padded: bool = False
) -> None:
    """Raise ValueError where a tokenizer has not the model's number of tokens.

    Args:
      tokenizer: see `load_tokenizer`.
      size: the model's numbers.
      padded: whether the model may have more tokens than the tokenizer: some round
        theirs up.
    """
    count = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if count != size.vocab and not (padded and count < size.vocab):
        raise ValueError(
            f"the tokenizer has {count} tokens, the model {size.vocab}: they are not "
            "from one folder"
        )


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Raise ValueError where a token has not the same number in both; it is named.

    Logits, and hidden states by token, can be matched only where it has.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    numbered = sorted((number, token) for token, number in {**theirs, **mine}.items())
    for _, token in numbered:
        if mine.get(token) != theirs.get(token):
            one, other = (_place(found.get(token)) for found in (mine, theirs))
            raise ValueError(
                f"the token {token!r} {one} in the student's tokenizer, and {other} "
                "in the teacher's"
            )


def _place(number: int | None) -> str:
    return "is missing" if number is None else f"is {number}"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "tokenizers are not installed: pip install 'jaxdistill[huggingface]'"
        ) from error
    return tokenizers


def _read(reader: Any, *paths: Path, **settings: Any) -> Any:
    try:
        return reader(*map(str, paths), **settings)
    except Exception as error:  # the library raises its own types
        names = " or ".join(str(path) for path in paths)
        reason = str(error).split("\n")[0]
        raise ValueError(f"{names} is damaged: {reason}") from error


def _config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    config = _read(
        lambda name: json.loads(Path(name).read_text(encoding="utf-8")), path
    )
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping")
    return config


def _bert(model: Any, config: dict[str, Any], special: bool = True) -> Any:
    """BERT's tokenizer of a WordPiece model."""
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    if special:
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise ValueError(f"the vocabulary of vocab.txt lacks {', '.join(missing)}")
        tokenizer.add_special_tokens(list(SPECIAL))
        ends = (("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        tokenizer.post_processor = library.processors.BertProcessing(*ends)
    return tokenizer


def _gpt2(model: Any, config: dict[str, Any]) -> Any:
    """GPT-2's tokenizer of a byte-pair encoding."""
    library = _library()
    tokenizer = library.Tokenizer(model)
    spaced = config.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.post_processor = library.processors.ByteLevel(trim_offsets=False)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _characters(library: Any, texts: list[str]) -> tuple[list[str], list[str]]:
    """Characters of texts, sorted: all of them, and those inside words with `##`."""
    draft = _bert(library.models.WordPiece(unk_token="[UNK]"), {}, special=False)
    alone, inside = Counter[str](), set()
    for text in texts:
        normal = draft.normalizer.normalize_str(text)
        for word, _ in draft.pre_tokenizer.pre_tokenize_str(normal):
            alone.update(word)
            inside |= set(islice(word, 1, None))
    kept = sorted(alone, key=lambda c: (-alone[c], c))[:CHARACTERS]
    return sorted(kept), [f"##{c}" for c in sorted(inside & set(kept))]


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(
    tokenizer: Any, folder: Path, config: Mapping[str, Any], added: Mapping[str, Any]
) -> Any:
    """The tokenizer, changed in place: with the added tokens, by their numbers.

    Args:
      tokenizer: a `tokenizers.Tokenizer` of the vocabulary alone.
      folder: for messages.
      config: the content of tokenizer_config.json.
      added: that of added_tokens.json.

    Raises:
      ValueError: an entry is no token, has a number that is not the next, or every
        text is to begin with a token of its own.
    """
    from tokenizers import AddedToken

    if config.get("add_bos_token"):
        raise ValueError(
            f"{folder}: tokenizer_config.json has add_bos_token, which is read from "
            "tokenizer.json alone"
        )
    entries = [_checked(entry, folder) for entry in _entries(config, added, folder)]
    # The library gives each token that comes the next free number.
    for entry in sorted(entries, key=lambda entry: entry["id"]):
        flags = {name: entry[name] for name in FLAGS if name in entry}
        token = AddedToken(entry["content"], **flags)
        if entry.get("special"):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != entry["id"]:
            raise ValueError(
                f"{folder}: the added token {token.content!r} is {entry['id']}, and "
                f"would be {found}"
            )
    return tokenizer


def _entries(config, added, folder) -> Iterator[dict[str, Any]]:
    """The tokens of both files, each with its number."""
    for token, number in added.items():
        yield {"content": token, "id": number}
    try:
        for number, token in config.get("added_tokens_decoder", {}).items():
            yield {**token, "id": int(number)}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: the added_tokens_decoder of tokenizer_config.json is no "
            "mapping from numbers to tokens"
        ) from error


def _checked(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    flags = [entry[name] for name in FLAGS if name in entry]
    named = isinstance(entry.get("content"), str) and type(entry["id"]) is int
    if not (named and all(isinstance(flag, bool) for flag in flags)):
        raise ValueError(f"{folder} has an added token that is none: {entry}")
    return entry
