# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: trained here, of folders against transformers', and what differs."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxdistill import models, pretrained
from jaxdistill.pretrained import tokenizers

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TEXTS = [
    "The film is a charming and often affecting journey.",
    "Unflinchingly bleak, and desperate!",
    "Crème brûlée; the films charm, the journeys affect.",
]
NEW = [
    "a Charming CRÈME [MASK] film.",
    "",
    "desperately 電 unknown",
    "the the the film",
]


def fails(match: str):
    return pytest.raises(ValueError, match=rf"\A{match}\Z")


@pytest.fixture(scope="module")
def trained():
    return pretrained.train_wordpiece(TEXTS, 100)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def bert(tmp_path, trained):
    """A folder with vocab.txt."""
    vocabulary = trained.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return tmp_path


@pytest.fixture
def gpt2(tmp_path):
    """A folder with GPT-2's two files, whose tokens are the bytes and some pairs."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("f", "i"), ("Ã", "¨")]
    words = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    numbers = {word: i for i, word in enumerate([*words, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def assert_as_theirs(mine, theirs, length=12):
    """The same arrays for texts, and for pairs of them."""
    for pairs in (None, NEW[::-1]):
        found = pretrained.encode(mine, NEW, length, pairs)
        expected = theirs(
            NEW, pairs, padding="max_length", truncation=True, max_length=length
        )
        if pairs is None:  # all 0, which a BERT takes where there are none
            assert not np.any(expected.pop("token_type_ids", 0))
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


class TestTrained:
    def test_special_tokens_are_first(self, trained):
        assert [trained.token_to_id(token) for token in tokenizers.SPECIAL] == [
            *range(5)
        ]
        assert trained.get_vocab_size() == 100

    def test_whole_words_and_pieces(self, trained):
        assert trained.encode("THE film").tokens == ["[CLS]", "the", "film", "[SEP]"]
        pieces = trained.encode("charmed").tokens[1:-1]
        assert "".join(piece.removeprefix("##") for piece in pieces) == "charmed"
        assert trained.encode("crème").tokens == trained.encode("creme").tokens
        # No piece is a special token: it would be found in the middle of a text.
        assert "##e" not in trained.encode("##e").tokens
        assert trained.encode("[MASK]").ids == [2, 4, 3]

    def test_the_same_in_another_process(self, trained):
        """The library numbers pieces in the order of a hash that each process draws."""
        code = (
            "from jaxdistill.pretrained import tokenizers; import sys; "
            f"print(ascii(tokenizers.train_wordpiece({TEXTS!a}, 100).to_str()))"
        )
        command = [sys.executable, "-c", code]
        for _ in range(2):
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            assert found.stdout.strip() == ascii(trained.to_str())

    def test_no_room_for_characters(self):
        with fails(
            "a vocabulary of 8 has no room for the 9 special tokens and characters of "
            "these texts"
        ):
            pretrained.train_wordpiece(["ab", "cb"], 8)
        assert pretrained.train_wordpiece(["ab", "cb"], 9).get_vocab_size() == 9

    def test_rare_characters_are_unknown(self, monkeypatch):
        monkeypatch.setattr(tokenizers, "CHARACTERS", 2)
        tokenizer = pretrained.train_wordpiece(["aab b c"], 50)
        assert tokenizer.encode("b c").tokens == ["[CLS]", "b", "[UNK]", "[SEP]"]

    def test_as_transformers_reads_it(self, trained, transformers, tmp_path):
        trained.save(str(tmp_path / "tokenizer.json"))
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]"
        )
        assert_as_theirs(pretrained.load_tokenizer(tmp_path), theirs)
        assert pretrained.load_tokenizer(tmp_path).to_str() == trained.to_str()


class TestFolders:
    def test_vocab_txt_is_as_the_trained(self, bert, trained):
        mine = pretrained.load_tokenizer(bert)
        for name, array in pretrained.encode(trained, NEW, 9).items():
            np.testing.assert_array_equal(pretrained.encode(mine, NEW, 9)[name], array)
        assert mine.decode(mine.encode("charmed film").ids) == "charmed film"

    @pytest.mark.parametrize(
        "config", [{}, {"do_lower_case": False}, {"strip_accents": False}]
    )
    def test_vocab_txt_is_as_transformers(self, bert, transformers, config):
        content = {"tokenizer_class": "BertTokenizer", **config}
        (bert / "tokenizer_config.json").write_text(json.dumps(content))
        theirs = transformers.BertTokenizerFast.from_pretrained(bert)
        assert_as_theirs(pretrained.load_tokenizer(bert), theirs)

    @pytest.mark.parametrize("where", ["added_tokens", "tokenizer_config"])
    def test_added_tokens_are_as_transformers(self, bert, transformers, where):
        """Of vocab.txt, as models have them whose vocabulary was resized."""
        content = {"[ENT]": 100, "[REL]": 101}
        if where == "tokenizer_config":
            names = ("lstrip", "rstrip", "normalized", "single_word")
            flags = dict.fromkeys(names, False)
            content = {
                "added_tokens_decoder": {
                    str(number): {"content": token, "special": True, **flags}
                    for token, number in content.items()
                }
            }
        (bert / f"{where}.json").write_text(json.dumps(content))
        mine = pretrained.load_tokenizer(bert)
        assert mine.get_vocab_size() == 102
        theirs = transformers.BertTokenizerFast.from_pretrained(bert)
        texts = ["the [ENT] film [REL]", "[ENT][ENT] the"]
        found = pretrained.encode(mine, texts, 12)["input_ids"]
        expected = theirs(texts, padding="max_length", max_length=12)["input_ids"]
        np.testing.assert_array_equal(found, expected)
        assert {100, 101} <= set(found.ravel().tolist())

    def test_an_added_token_of_another_number(self, bert):
        (bert / "added_tokens.json").write_text(json.dumps({"[ENT]": 105}))
        with fails(rf"{bert}: the added token '\[ENT\]' is 105, and would be 100"):
            pretrained.load_tokenizer(bert)

    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            ("added_tokens", {"[ENT]": "x"}, "has an added token that is none: .*"),
            ("added_tokens", {"[ENT]": 7.5}, "has an added token that is none: .*"),
            ("added_tokens", {"[ENT]": None}, "has an added token that is none: .*"),
            ("decoder", {"100": {}}, "has an added token that is none: .*"),
            ("decoder", {"100": {"content": 3}}, "has an added token that is none: .*"),
            (
                "decoder",
                {"100": {"content": "a", "lstrip": "yes"}},
                "has an added token that is none: .*",
            ),
            ("decoder", [], "the added_tokens_decoder of .* from numbers to tokens"),
            ("decoder", None, "the added_tokens_decoder of .* numbers to tokens"),
            ("decoder", {"x": {"content": "a"}}, "the added_tokens_decoder .* tokens"),
            ("decoder", {"100": "a"}, "the added_tokens_decoder of .* to tokens"),
        ],
    )
    def test_added_tokens_that_are_none(self, bert, name, content, sentence):
        file = "added_tokens.json"
        if name == "decoder":
            file, content = "tokenizer_config.json", {"added_tokens_decoder": content}
        (bert / file).write_text(json.dumps(content))
        with fails(f"{bert}:? {sentence}"):
            pretrained.load_tokenizer(bert)

    def test_a_first_token_of_every_text(self, gpt2):
        config = json.dumps({"add_bos_token": True})
        (gpt2 / "tokenizer_config.json").write_text(config)
        with fails(f"{gpt2}: tokenizer_config.json has add_bos_token, which .* alone"):
            pretrained.load_tokenizer(gpt2)

    def test_gpt2_is_as_transformers(self, gpt2, transformers):
        theirs = transformers.GPT2TokenizerFast.from_pretrained(gpt2)
        mine = pretrained.load_tokenizer(gpt2)
        for text in [*NEW, *TEXTS, "the<|endoftext|> the\n\t x"]:
            assert mine.encode(text).ids == theirs(text)["input_ids"]
            assert mine.decode(mine.encode(text).ids, False) == text

    def test_gpt2_merges(self, gpt2):
        mine = pretrained.load_tokenizer(gpt2)
        assert mine.encode("the the fi").tokens == ["the", "Ġthe", "Ġ", "fi"]
        ids = pretrained.encode(mine, ["the the", "the"], 3)
        assert ids["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
        assert ids["input_ids"][1, 1:].tolist() == [0, 0]

    def test_nothing_there(self, tmp_path):
        (tmp_path / "vocab.json").write_text("{}")
        with fails(
            f"{tmp_path} has no tokenizer: expected tokenizer.json, or vocab.txt, or "
            "vocab.json and merges.txt"
        ):
            pretrained.load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("file", "content", "sentence"),
        [
            ("tokenizer.json", "{", ".*/tokenizer.json is damaged: .+"),
            ("tokenizer_config.json", "{", ".*/tokenizer_config.json is damaged: .+"),
            ("tokenizer_config.json", "[]", ".* is damaged: it holds no mapping"),
            ("vocab.txt", "[PAD]\n[UNK]\n[SEP]\n", ".*vocab.txt lacks .CLS., .MASK."),
        ],
    )
    def test_damaged(self, bert, file, content, sentence):
        (bert / file).write_text(content)
        with fails(sentence):
            pretrained.load_tokenizer(bert)

    def test_without_the_library(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with fails(
            r"tokenizers are not installed: pip install 'jaxdistill\[huggingface\]'"
        ):
            pretrained.load_tokenizer(tmp_path)


class TestEncode:
    def test_shapes_and_padding(self, trained):
        found = pretrained.encode(trained, ["the film", "", "the " * 9], 6)
        the, film = trained.token_to_id("the"), trained.token_to_id("film")
        assert found["input_ids"].tolist() == [
            [2, the, film, 3, 0, 0],
            [2, 3, 0, 0, 0, 0],
            [2, the, the, the, the, 3],
        ]
        assert found["attention_mask"].sum(1).tolist() == [4, 2, 6]
        assert {x.dtype for x in found.values()} == {np.dtype(np.int32)}

    @pytest.mark.parametrize("special", [False, True])
    def test_texts_without_pairs_have_no_types(self, gpt2, special):
        """GPT-2 would add the embedding of token 0 for them."""
        library = pytest.importorskip("tokenizers")
        tokenizer = pretrained.load_tokenizer(gpt2)
        if special:
            start = (
                tokenizers.END_OF_TEXT,
                tokenizer.token_to_id(tokenizers.END_OF_TEXT),
            )
            tokenizer.post_processor = library.processors.TemplateProcessing(
                f"{tokenizers.END_OF_TEXT} $A", special_tokens=[start]
            )
        found = pretrained.encode(tokenizer, ["the"], 4)
        assert {*found} == {"input_ids", "attention_mask"}
        assert found["attention_mask"].sum() == 1 + special

    def test_padding_may_come_first(self, trained):
        behind = pretrained.encode(trained, ["the film", ""], 6)
        found = pretrained.encode(trained, ["the film", ""], 6, front=True)
        for name, array in found.items():
            for row, size in zip(array, (4, 2), strict=True):
                assert not row[: 6 - size].any()
            np.testing.assert_array_equal(array[0, 2:], behind[name][0, :4])
            np.testing.assert_array_equal(array[1, 4:], behind[name][1, :2])

    def test_pairs_have_types(self, trained):
        found = pretrained.encode(trained, ["the film"], 8, ["the"])
        assert found["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]
        assert found["attention_mask"].sum() == 6

    def test_a_tokenizers_own_settings_stay(self, trained):
        plain = pretrained.encode(trained, TEXTS, 9)
        mine = pretrained.train_wordpiece(TEXTS, 100)
        mine.enable_padding(direction="left", length=20, pad_id=7)
        mine.enable_truncation(3)
        before = mine.to_str()
        for name, array in pretrained.encode(mine, TEXTS, 9).items():
            np.testing.assert_array_equal(array, plain[name])
        assert mine.to_str() == before

    def test_what_cannot_be_encoded(self, trained, gpt2):
        with fails("row 1 has no tokens, and would be all padding: its text is ''"):
            pretrained.encode(pretrained.load_tokenizer(gpt2), ["the", ""], 4)
        with fails("a length of 2 has no room for a text beside 2 special tokens"):
            pretrained.encode(trained, ["the"], 2)
        with fails("a length of 3 has no room for a text beside 3 special tokens"):
            pretrained.encode(trained, ["the"], 3, ["film"])
        with fails("1 pairs were given for 2 texts"):
            pretrained.encode(trained, ["the", "film"], 8, ["film"])


class TestChecks:
    def test_the_models_vocabulary(self, trained):
        def size(vocab):
            return models.TransformerConfig(vocab, 4, 1, 1)

        pretrained.check_tokenizer(trained, size(100))
        pretrained.check_tokenizer(trained, size(128), padded=True)
        for vocab, padded in ((128, False), (99, False), (99, True)):
            with fails(
                f"the tokenizer has 100 tokens, the model {vocab}: they are not from "
                "one folder"
            ):
                pretrained.check_tokenizer(trained, size(vocab), padded)

    def test_the_teachers_tokens(self, trained):
        pretrained.check_same_tokenizer(trained, pretrained.train_wordpiece(TEXTS, 100))
        one, more, other = (
            pretrained.train_wordpiece(texts, 9)
            for texts in (["a b"], ["a b c"], ["a c"])
        )
        with fails(
            "the token 'c' is missing in the student's tokenizer, and is 7 in the "
            "teacher's"
        ):
            pretrained.check_same_tokenizer(one, more)
        with fails(
            "the token 'b' is 6 in the student's .* is missing in the teacher's"
        ):
            pretrained.check_same_tokenizer(one, other)
        with fails("the token 'b' is missing in .*, and is 6 in the teacher's"):
            pretrained.check_same_tokenizer(other, more)


def test_one_text_is_no_list_of_texts(trained):
    with pytest.raises(ValueError, match="takes a list of texts, got one: 'a film'"):
        pretrained.encode(trained, "a film", 6)
