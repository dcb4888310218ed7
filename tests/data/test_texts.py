# SPDX-License-Identifier: Apache-2.0
"""Labelled and running text: original files, small ones made here, TFDS's copies."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import data
from jaxdistill.data import DataError, Vocabulary, corpus, windows
from jaxdistill.data import texts as text

SST2 = {
    "train.tsv": "sentence\tlabel\nso bad \t0\ngood , no less\t1\n",
    "dev.tsv": "sentence\tlabel\na fine film\t1\n",
    "test_sentences.tsv": "label\tcontent\n0\tdull\n1\tcrème brûlée\n",
}
AG_NEWS = {
    "train.csv": "".join(f'"{i % 4 + 1}","T{i}","said ""{i}"""\n' for i in range(6)),
    "test.csv": '"3","Oil, up","a\nline"\n"4","Moon","near"\n',
}
TRAIN_10K = '"1","one . two"\n"2","three . four"\n'


def fails(match: str):
    """The sentence is one line and ends without a stop."""
    return pytest.raises(DataError, match=rf"\A{match}\Z")


def write(folder: Path, contents: dict[str, str], zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        raw = content.encode()
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Files made here have their own counts."""
    counts = {"train.tsv": 2, "dev.tsv": 1, "test_sentences.tsv": 2}
    counts |= {"train.csv": 6, "test.csv": 2, "train_10k.csv": 2}
    monkeypatch.setattr(text, "COUNTS", counts)
    monkeypatch.setattr(text, "HELD_OUT", {"sst2": 1, "ag_news": 1})
    counts = {"input.txt": 20, "train.txt": 6, "valid.txt": 4, "test.txt": 5}
    monkeypatch.setattr(corpus, "COUNTS", counts)


def original(*names: str) -> Path:
    """The folder of JAXDISTILL_DATA, or a skip that says what it lacks."""
    folder = os.environ.get("JAXDISTILL_DATA")
    if not folder or not any((Path(folder) / name).is_dir() for name in names):
        pytest.skip(f"JAXDISTILL_DATA names no folder with {' or '.join(names)}/")
    return Path(folder)


class TestOriginals:
    def test_sst2(self):
        texts = data.load_texts("sst2", original("sst2", "SST-2"))
        counts = [np.bincount(split.labels).tolist() for split in texts[1:4]]
        # Socher et al. and GLUE: positive and negative of each split.
        assert counts == [[29_780, 37_569], [428, 444], [912, 909]]
        assert (texts.num_classes, texts.train.labels.dtype) == (2, np.int32)
        dev = dict(zip(*texts.validation, strict=True))
        assert dev["it 's a charming and often affecting journey ."] == 1
        assert dev["unflinchingly bleak and desperate"] == 0

    def test_ag_news(self):
        texts = data.load_texts("ag_news", original("ag_news", "ag_news_small"))
        assert np.bincount(texts.test.labels).tolist() == [1_900] * 4
        assert len(texts.validation.texts) == 1_000
        total = len(texts.train.texts) + 1_000
        assert total in (10_000, 120_000)
        assert f"{total:,}" == "120,000" or "train_10k.csv" in texts.origin
        pensions = "Fears for T N pension after talks . Unions representing workers"
        found = [x for x in texts.test.texts if x.startswith(pensions)]
        assert len(found) == 1
        assert texts.test.labels[texts.test.texts.index(found[0])] == 2

    def test_shakespeare(self):
        found = data.load_corpus("shakespeare", original("tiny_shakespeare"))
        assert (len(found.train), len(found.validation)) == (1_003_854, 111_540)
        vocabulary = Vocabulary.of(found.train)
        assert len(vocabulary) == 65
        ids = vocabulary.encode(found.validation)
        assert "".join(vocabulary.decode(ids)) == found.validation

    def test_wikitext2(self):
        found = data.load_corpus("wikitext2", original("wikitext2_heldout"))
        assert (len(found.train), len(found.validation)) == (245_569, 217_646)
        assert found.test is None
        assert found.origin.startswith("test.txt, as there was no train.txt")
        assert "<unk>" in Vocabulary.of(found.train).tokens


@pytest.mark.usefixtures("small")
class TestTexts:
    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("inner", ["", "sst2", "SST-2"])
    def test_sst2(self, tmp_path, inner, zipped):
        write(tmp_path / inner, SST2, zipped)
        texts = data.load_texts("sst2", tmp_path)
        assert texts.train.texts == ["good , no less", "so bad"]
        assert texts.train.labels.tolist() == [1, 0]
        assert texts.validation.texts == ["a fine film"]
        assert texts.test.texts == ["crème brûlée", "dull"]
        assert texts.test.labels.tolist() == [1, 0]

    def test_carriage_returns_are_no_text(self, tmp_path):
        crlf = {name: x.replace("\n", "\r\n") for name, x in SST2.items()}
        write(tmp_path / "mine", crlf)
        write(tmp_path / "theirs", SST2)
        mine, theirs = (
            data.load_texts("sst2", tmp_path / name).train
            for name in ("mine", "theirs")
        )
        assert mine.texts == theirs.texts
        np.testing.assert_array_equal(mine.labels, theirs.labels)

    def test_ag_news_joins_title_and_description(self, tmp_path):
        write(tmp_path / "ag_news", AG_NEWS)
        texts = data.load_texts("ag_news", tmp_path)
        assert texts.test.texts == ["Moon . near", "Oil, up . a\nline"]
        assert texts.test.labels.tolist() == [3, 2]
        both = [*texts.train.texts, *texts.validation.texts]
        assert sorted(both) == [f'T{i} . said "{i}"' for i in range(6)]
        assert (len(texts.train.texts), len(texts.validation.texts)) == (5, 1)
        for split in (texts.train, texts.validation):
            for line, label in zip(split.texts, split.labels, strict=True):
                assert label == int(line[1]) % 4
        again = data.load_texts("ag_news", tmp_path / "ag_news")
        assert again.validation.texts == texts.validation.texts

    def test_ag_news_takes_all_of_train_where_it_is(self, tmp_path):
        part = {"train_10k.csv": TRAIN_10K, "test.csv": AG_NEWS["test.csv"]}
        write(tmp_path, part)
        few = data.load_texts("ag_news", tmp_path)
        assert len(few.train.texts) == 1
        assert few.origin == "train_10k.csv, test.csv; validation is 1 of train"
        write(tmp_path, AG_NEWS, zipped=True)
        assert len(data.load_texts("ag_news", tmp_path).train.texts) == 5

    @pytest.mark.parametrize(
        ("name", "file", "content", "sentence"),
        [
            ("sst2", "dev.tsv", "", "is empty"),
            ("sst2", "dev.tsv", "\n", "is empty"),
            (
                "sst2",
                "test_sentences.tsv",
                SST2["dev.tsv"],
                ", line 1: the header is 'sentence label', expected 'label content' "
                "with a tab between",
            ),
            (
                "sst2",
                "train.tsv",
                "sentence\tlabel\nbad\t0\ngood 1\n",
                ", line 3: 1 columns, expected 2 with a tab between",
            ),
            (
                "sst2",
                "train.tsv",
                "sentence\tlabel\nbad\t0\ngood\t-1\n",
                ", line 3: the label '-1' is no class; known: 0, 1",
            ),
            (
                "sst2",
                "dev.tsv",
                SST2["train.tsv"],
                " has 2 examples, the original 1: it is cut short or another file",
            ),
            (
                "ag_news",
                "test.csv",
                '"1","a","b"\n"0","a","b"\n',
                ", line 2: the label '0' is no class; known: 1, 2, 3, 4",
            ),
            (
                "ag_news",
                "test.csv",
                TRAIN_10K,
                ", line 1: 2 columns, expected 3 with commas between",
            ),
            ("ag_news", "test.csv", '"1","a","b', ", line 1: unexpected end of data"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path, name, file, content, sentence):
        write(tmp_path, SST2 if name == "sst2" else AG_NEWS)
        write(tmp_path, {file: content})
        with fails(rf".*/{file},? ?{sentence.lstrip(', ')}"):
            data.load_texts(name, tmp_path)

    def test_bytes_that_are_no_text_are_named(self, tmp_path):
        write(tmp_path, SST2)
        (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\nd\xe9j\xe0\t1\n")
        with fails(".*/dev.tsv, line 2: the text is no UTF-8"):
            data.load_texts("sst2", tmp_path)
        (tmp_path / "dev.tsv").unlink()
        packed = gzip.compress(SST2["dev.tsv"].encode())
        (tmp_path / "dev.tsv.gz").write_bytes(packed[:-9])
        with fails(".*/dev.tsv.gz is damaged or cut short: .*"):
            data.load_texts("sst2", tmp_path)

    def test_what_is_missing_is_named(self, tmp_path):
        with fails("unknown texts 'sst'; known: sst2, ag_news"):
            data.load_texts("sst")
        with fails(".*/nowhere does not exist or is not a folder"):
            data.load_texts("sst2", tmp_path / "nowhere")
        with fails(
            rf"no sst2 in {tmp_path}, {tmp_path}/sst2, {tmp_path}/SST-2: looked for "
            r"train.tsv, dev.tsv, test_sentences.tsv \(with or without .gz\); TFDS .* "
            "has no prepared copy of glue/sst2 either"
        ):
            data.load_texts("sst2", tmp_path)
        write(tmp_path / "ag_news", {"test.csv": AG_NEWS["test.csv"]})
        with fails(
            ".*/ag_news holds only part of ag_news: missing train.csv or train_10k.csv "
            r"\(with or without .gz\)"
        ):
            data.load_texts("ag_news", tmp_path)


def augment(folder, name, features, splits, config=None):
    """A data set as TFDS keeps it, by a builder of TFDS's name."""
    library = pytest.importorskip("tensorflow_datasets", reason="no TFDS")
    pytest.importorskip("array_record", reason="array_record is not installed")
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Made(library.core.GeneratorBasedBuilder):
            VERSION = library.core.Version("1.0.0")
            BUILDER_CONFIGS = config and [library.core.BuilderConfig(name=config)]

            def _info(self):
                return library.core.DatasetInfo(
                    builder=self, features=library.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {split: enumerate(rows) for split, rows in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

    Made.name = name
    builder = Made(data_dir=folder, file_format="array_record", config=config)
    builder.download_and_prepare()


@pytest.mark.usefixtures("small")
class TestTfds:
    def test_sst2_without_labels_of_its_test(self, tmp_path):
        splits = {
            "train": [{"sentence": f"film {i} ", "label": i % 2} for i in range(5)],
            "validation": [{"sentence": "dull", "label": 0}],
            "test": [{"sentence": "who knows", "label": -1}],
        }
        features = {"sentence": np.str_, "label": np.int64}
        augment(tmp_path, "glue", features, splits, "sst2")
        texts = data.load_texts("sst2", tmp_path)
        assert (len(texts.train.texts), len(texts.validation.texts)) == (4, 1)
        assert texts.test.texts == ["dull"]
        assert texts.test.labels.tolist() == [0]
        for line, label in zip(*texts.train, strict=True):
            assert int(line.removeprefix("film ")) % 2 == label
        assert texts.origin == (
            "TFDS's glue/sst2, whose test has no labels; test is its validation; "
            "validation is 1 of train"
        )

    def test_ag_news_is_as_its_files(self, tmp_path):
        rows = [
            {"title": f"T{i}", "description": f'said "{i}"', "label": i % 4}
            for i in range(6)
        ]
        test = [
            {"title": "Oil, up", "description": "a\nline", "label": 2},
            {"title": "Moon", "description": "near", "label": 3},
        ]
        features = {"title": np.str_, "description": np.str_, "label": np.int64}
        augment(
            tmp_path / "tfds", "ag_news_subset", features, {"train": rows, "test": test}
        )
        write(tmp_path / "files", AG_NEWS)
        mine = data.load_texts("ag_news", tmp_path / "files")
        theirs = data.load_texts("ag_news", tmp_path / "tfds")
        for one, other in zip(mine[1:4], theirs[1:4], strict=True):
            assert one.texts == other.texts
            np.testing.assert_array_equal(one.labels, other.labels)

    def test_shakespeare_is_as_its_file(self, tmp_path):
        whole = "To be, or not to be."
        splits = {
            split: [{"text": part}]
            for split, part in (
                ("train", whole[:18]),
                ("validation", whole[18:19]),
                ("test", whole[19:]),
            )
        }
        augment(tmp_path / "tfds", "tiny_shakespeare", {"text": np.str_}, splits)
        write(tmp_path / "files", {"input.txt": whole})
        for folder in ("tfds", "files"):
            found = data.load_corpus("shakespeare", tmp_path / folder)
            assert (found.train, found.validation) == (whole[:18], whole[18:])


@pytest.mark.usefixtures("small")
class TestCorpus:
    parts = {"valid.txt": " = A = \n", "test.txt": " a <unk> b\n\n"}

    def test_wikitext2_with_its_train(self, tmp_path):
        write(tmp_path, {**self.parts, "train.txt": " \n a b \n b\n"})
        found = data.load_corpus("wikitext2", tmp_path)
        assert list(found.train) == ["<eos>", "a", "b", "<eos>", "b", "<eos>"]
        assert list(found.validation) == ["=", "A", "=", "<eos>"]
        assert found.test == ["a", "<unk>", "b", "<eos>", "<eos>"]

    def test_wikitext2_without(self, tmp_path):
        write(tmp_path / "wikitext-2", self.parts, zipped=True)
        found = data.load_corpus("wikitext2", tmp_path)
        assert list(found.train) == ["a", "<unk>", "b", "<eos>", "<eos>"]
        assert found.test is None
        assert "no train.txt" in found.origin

    def test_what_is_wrong_is_named(self, tmp_path):
        with fails("unknown corpus 'ptb'; known: shakespeare, wikitext2"):
            data.load_corpus("ptb")
        with fails(r"wikitext2 needs --data-dir, a folder with valid.txt, test.txt .*"):
            data.load_corpus("wikitext2")
        with fails(
            "no shakespeare in .*: looked for input.txt .*tiny_shakespeare either"
        ):
            data.load_corpus("shakespeare", tmp_path)
        write(tmp_path, {"input.txt": "To be"})
        with fails(".*/input.txt has 5 tokens, the original 20: it is cut short or .*"):
            data.load_corpus("shakespeare", tmp_path)


class TestVocabulary:
    def test_there_and_back(self):
        words = ["the", "cat", "saw", "the", "dog"]
        vocabulary = Vocabulary.of(words)
        assert vocabulary.tokens == ("cat", "dog", "saw", "the")
        ids = vocabulary.encode(iter(words))
        assert (ids.tolist(), ids.dtype) == ([3, 0, 2, 3, 1], np.int32)
        assert vocabulary.decode(ids) == words
        assert vocabulary == Vocabulary.of(reversed(words))

    def test_rare_tokens_are_unknown(self):
        vocabulary = Vocabulary.of("abcab", at_least=2)
        assert vocabulary.tokens == ("<unk>", "a", "b")
        assert vocabulary.encode("bcz").tolist() == [2, 0, 0]
        # WikiText's own stays one token, and stands for what others lack.
        assert Vocabulary.of(["b", "<unk>"]).encode(["x", "b"]).tolist() == [0, 1]

    def test_what_is_not_there_is_named(self):
        letters = Vocabulary.of("ab")
        with fails(
            "token 'c' at position 1 is not among the vocabulary's 2, and there is no "
            "<unk>"
        ):
            letters.encode("ac")
        for number in (2, -1):
            with fails(f"number {number} at position 1 is out of range: .* are 0 to 1"):
                letters.decode([0, number])
        with fails("the vocabulary has the token 'b' more than once"):
            Vocabulary(("a", "b", "b"))


class TestWindows:
    @pytest.mark.parametrize(("size", "count"), [(5, 1), (8, 1), (9, 2), (13, 3)])
    def test_labels_are_the_tokens_that_follow(self, size, count):
        ids = np.random.default_rng(0).integers(0, 9, size)
        found = windows(ids, 4)
        inputs = found["inputs"]["input_ids"]
        assert inputs.shape == found["labels"].shape == (count, 4)
        assert inputs.dtype == found["labels"].dtype == np.int32
        np.testing.assert_array_equal(inputs.ravel(), ids[: 4 * count])
        np.testing.assert_array_equal(found["labels"].ravel(), ids[1 : 4 * count + 1])

    @pytest.mark.parametrize(("size", "length"), [(4, 4), (0, 1), (3, 0), (3, -1)])
    def test_too_few_tokens(self, size, length):
        with fails(
            f"windows of {length} tokens cannot be cut from {size}: one needs .*"
        ):
            windows(np.zeros(size, int), length)


class TestInputs:
    def test_a_text_without_tokens_is_named(self):
        keep = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
        ids = np.ones((4, 2), np.int32)
        with fails("row 2 is all padding: its attention_mask has no 1, .* at least"):
            data.check_inputs({"input_ids": ids, "attention_mask": keep})
        data.check_inputs({"input_ids": ids[:2], "attention_mask": keep[:2]})

    def test_inputs_without_a_mask_are_as_they_are(self):
        data.check_inputs({"input_ids": np.zeros((2, 3), np.int32)})
        data.check_inputs(np.zeros((2, 3)))
