# SPDX-License-Identifier: Apache-2.0
"""Sources, splits and batches; every kind of bad data ends in one sentence."""

import gzip
import hashlib
import shutil
import socket
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxdistill import data
from jaxdistill.data import (
    Batches,
    DataError,
    Dataset,
    check_labels,
    fetch,
    holdout,
    image_files,
)
from jaxdistill.study import few_labels

IDX = [file for pair in image_files.IDX_FILES.values() for file in pair]
DIGITS_TEST_SHA256 = "bf7fa461884133bb570bc55a30f5f3a0de137d1599145861bc422940922613bb"
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def fails(match: str):
    """The sentence is one line and ends without a stop, as `error: ...` shows it."""
    return pytest.raises(DataError, match=rf"\A{match}\Z")


def path_of(path: Path) -> str:
    return str(path).replace(".", r"\.")


@pytest.fixture(scope="module")
def mnist(data_dir):
    return data.load("mnist", data_dir)


@pytest.fixture
def copy(data_dir, tmp_path) -> Path:
    """A folder of links to the original files, for a test to replace some."""
    for file in (data_dir / "mnist").glob("*.gz"):
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def prepared(data_dir, tmp_path_factory) -> Path:
    """MNIST as a TFDS data set."""
    pytest.importorskip("tensorflow_datasets", reason="TFDS is not installed")
    pytest.importorskip("array_record", reason="array_record is not installed")
    folder = tmp_path_factory.mktemp("tfds")
    fetch.prepare_tfds("mnist", folder, data_dir / "mnist")
    return folder


class TestDigits:
    digits = data.load("digits")

    def test_the_shipped_images(self):
        assert self.digits.train["images"].shape == (1000, 8, 8)
        assert self.digits.test["images"].shape == (797, 8, 8)
        images = np.concatenate(
            [self.digits.train["images"], self.digits.test["images"]]
        )
        assert images.dtype == np.uint8
        assert (images.min(), images.max()) == (0, self.digits.peak) == (0, 16)
        assert len(np.unique(images.reshape(1797, -1), axis=0)) == 1797

    def test_counts_per_class(self):
        train, test = (
            np.bincount(split["labels"], minlength=self.digits.num_classes)
            for split in (self.digits.train, self.digits.test)
        )
        # The original file's counts, of the UCI repository's description.
        original = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        np.testing.assert_array_equal(train + test, original)

    def test_the_split_never_changes(self):
        """If it was meant to change, every committed result must be made again."""
        pixels = self.digits.test["images"].tobytes()
        assert hashlib.sha256(pixels).hexdigest() == DIGITS_TEST_SHA256

    def test_equals_scikit_learns_copy(self):
        datasets = pytest.importorskip("sklearn.datasets", reason="no scikit-learn")
        copy = datasets.load_digits()
        theirs = {
            (*image.astype(int), label)
            for image, label in zip(copy.data, copy.target, strict=True)
        }
        ours = {
            (*image.astype(int), label)
            for split in (self.digits.train, self.digits.test)
            for image, label in zip(
                split["images"].reshape(-1, 64), split["labels"], strict=True
            )
        }
        assert ours == theirs

    def test_attribution_is_shipped(self):
        text = resources.files("jaxdistill.data").joinpath("digits.LICENSE").read_text()
        assert "CC BY 4.0" in text
        assert "https://doi.org/10.24432/C50P49" in text

    def test_inputs_are_standardised_by_the_training_pixels(self):
        inputs = self.digits.inputs(self.digits.train)["inputs"]
        assert inputs.dtype == np.float32
        assert abs(inputs.mean()) < 0.01
        assert inputs.std() == pytest.approx(1, abs=0.01)


class TestIdx:
    def replace(self, folder: Path, file: str, content: bytes) -> Path:
        (folder / file).unlink()
        (folder / file).write_bytes(content)
        return folder / file

    def test_counts_per_class(self, mnist):
        assert np.bincount(mnist.train["labels"]).tolist() == MNIST_TRAIN
        assert np.bincount(mnist.test["labels"]).tolist() == MNIST_TEST
        assert mnist.train["images"].shape == (60_000, 28, 28)

    @pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
    def test_pixels_have_the_stated_mean_and_deviation(self, name, data_dir):
        source = data.load(name, data_dir)
        pixels = source.train["images"] / np.float32(source.peak)
        assert pixels.mean(dtype=np.float64) == pytest.approx(source.mean, abs=1e-4)
        assert pixels.std(dtype=np.float64) == pytest.approx(source.deviation, abs=1e-4)

    def test_images_keep_their_labels(self, mnist, data_dir):
        """Sorting moves an image and its label together."""
        raw = [gzip.decompress((data_dir / f"mnist/{f}.gz").read_bytes()) for f in IDX]
        images, labels = (image_files.parse_idx(r) for r in raw[2:])
        by_bytes = {image.tobytes(): y for image, y in zip(images, labels, strict=True)}
        for image, label in zip(
            mnist.test["images"], mnist.test["labels"], strict=True
        ):
            assert by_bytes[image.tobytes()] == label

    def test_raw_files_are_the_gzipped_ones(self, copy, mnist):
        for file in IDX:
            raw = gzip.decompress((copy / f"{file}.gz").read_bytes())
            (copy / f"{file}.gz").unlink()
            (copy / file).write_bytes(raw)
        assert_equal(data.load("mnist", copy), mnist)

    def test_truncated_file(self, copy):
        content = (copy / f"{IDX[3]}.gz").read_bytes()
        path = self.replace(copy, f"{IDX[3]}.gz", content[: len(content) // 2])
        with fails(f"{path_of(path)} is damaged or cut short: .*end-of-stream.*"):
            data.load("mnist", copy)

    @pytest.mark.parametrize("at", [0, 60, 200, 1000, 4000, -6, -1])
    def test_a_flipped_byte(self, copy, at):
        content = bytearray((copy / f"{IDX[3]}.gz").read_bytes())
        content[at] ^= 0xFF
        path = self.replace(copy, f"{IDX[3]}.gz", bytes(content))
        with fails(f"{path_of(path)} is damaged or cut short: .*"):
            data.load("mnist", copy)

    def test_another_file_of_the_same_name(self, copy):
        raw = bytearray(gzip.decompress((copy / f"{IDX[3]}.gz").read_bytes()))
        raw[-1] ^= 1
        path = self.replace(copy, f"{IDX[3]}.gz", gzip.compress(raw))
        with fails(
            rf"{path_of(path)} is not the original mnist file: its SHA-256 differs "
            r"\(10008 bytes uncompressed\); fetch it again"
        ):
            data.load("mnist", copy)

    def test_another_data_set_under_the_same_names(self, copy):
        with fails(".*train-images.* is not the original fashion_mnist file: .*"):
            data.load("fashion_mnist", copy)

    @pytest.mark.parametrize("file", IDX)
    def test_a_missing_file(self, copy, file):
        (copy / f"{file}.gz").unlink()
        with fails(
            rf"{path_of(copy)} holds only part of mnist: missing {file} "
            r"\(with or without \.gz\)"
        ):
            data.load("mnist", copy)

    @pytest.mark.parametrize("shape", [(), (24,), (2, 3, 4), (0, 5)])
    def test_parse(self, shape):
        values = np.arange(np.prod(shape, dtype=int), dtype=np.uint8).reshape(shape)
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        parsed = image_files.parse_idx(header + values.tobytes())
        assert parsed.shape == shape
        np.testing.assert_array_equal(parsed, values)

    @pytest.mark.parametrize(
        ("raw", "sentence"),
        [
            (b"", r"not an IDX file of unsigned bytes: it begins b''"),
            (b"\x89PNG....", r"not an IDX file .*: it begins b'\\x89PNG'"),
            (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "not an IDX file of unsigned bytes: .*"),
            (b"\0\0\x08\2\0\0\0\1", "not an IDX file of unsigned bytes: .*"),
            (
                b"\0\0\x08\1\0\0\0\5abc",
                r"the IDX file says shape \(5,\) but holds 3 .*",
            ),
        ],
    )
    def test_parse_of_something_else(self, raw, sentence):
        with fails(sentence):
            image_files.parse_idx(raw)


class TestWithoutFiles:
    def test_unknown_name(self):
        known = "digits, mnist, fashion_mnist, cifar100"
        with fails(f"unknown data set 'cifar'; known: {known}"):
            data.load("cifar")

    def test_missing_folder(self, tmp_path):
        folder = tmp_path / "nowhere"
        with fails(f"data folder {path_of(folder)} does not exist or is not a folder"):
            data.load("mnist", folder)

    @pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
    def test_no_network(self, name, tmp_path, offline):
        pytest.importorskip("tensorflow_datasets", reason="TFDS is not installed")
        with fails(
            f"no network: .* cannot be reached to download {name}; give --data-dir, a "
            "folder with its four original IDX files or TFDS's own copy"
        ):
            data.load(name, tmp_path)

    def test_tfds_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
        with fails(
            r"reading mnist needs tensorflow-datasets \(pip install "
            r"'jaxdistill\[data\]'\), or --data-dir with the original IDX files"
        ):
            data.load("mnist", tmp_path)

    def test_preparing_from_a_folder_without_the_files(self, tmp_path, offline):
        pytest.importorskip("tensorflow_datasets", reason="TFDS is not installed")
        shutil.copy(__file__, tmp_path / f"{IDX[0]}.gz")
        with fails(f"{path_of(tmp_path)} does not hold {IDX[1]}.gz, {IDX[2]}.gz, .*"):
            fetch.prepare_tfds("mnist", tmp_path / "tfds", tmp_path)

    def test_preparing_an_unknown_name(self, tmp_path):
        with fails("unknown data set 'digits'; known: mnist, fashion_mnist"):
            fetch.prepare_tfds("digits", tmp_path, tmp_path)


class TestTfds:
    def test_equals_the_files_in_the_same_order(self, prepared, mnist):
        assert_equal(data.load("mnist", prepared), mnist)
        assert "tensorflow" not in sys.modules

    def test_a_damaged_copy(self, prepared, tmp_path):
        shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
        (record,) = tmp_path.rglob("mnist-train.array_record-*")
        record.write_bytes(record.read_bytes()[:1_000_000])
        with fails(
            f"TFDS's copy of mnist in {path_of(record.parent)} is damaged: .*; delete "
            "that folder to have it made again"
        ):
            data.load("mnist", tmp_path)

    def test_a_copy_in_the_format_of_tensorflow(self, prepared, tmp_path):
        shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
        (info,) = tmp_path.rglob("dataset_info.json")
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with fails(
            f"TFDS's copy of mnist in {path_of(tmp_path)} cannot be read without "
            "TensorFlow (.*TFRECORD.*); give another --data-dir"
        ):
            data.load("mnist", tmp_path)

    def test_equals_the_stock_builders_copy(self, data_dir, tmp_path):
        pytest.importorskip("tensorflow", reason="TFDS's own builder needs TensorFlow")
        library = pytest.importorskip("tensorflow_datasets")
        config = library.download.DownloadConfig(manual_dir=str(data_dir / "mnist"))
        library.data_source(
            "mnist",
            data_dir=tmp_path,
            builder_kwargs={"file_format": "array_record"},
            download_and_prepare_kwargs={"download_config": config},
        )
        assert_equal(data.load("mnist", tmp_path), data.load("mnist", data_dir))


def assert_equal(one: Dataset, other: Dataset) -> None:
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        for key in ("images", "labels"):
            assert mine[key].dtype == theirs[key].dtype
            np.testing.assert_array_equal(mine[key], theirs[key])


class TestBatches:
    @pytest.mark.parametrize(("size", "batch_size"), [(7, 3), (6, 3), (1, 1), (5, 5)])
    def test_each_example_once_an_epoch(self, size, batch_size):
        batches = Batches(size, batch_size, seed=1)
        for epoch in range(3):
            at = epoch * batches.steps_per_epoch
            rows = batches.indices(at, at + batches.steps_per_epoch)
            assert rows["index"].shape == (batches.steps_per_epoch, batch_size)
            real = rows["index"][rows["mask"] > 0]
            assert sorted(real.tolist()) == list(range(size))
            assert rows["mask"].sum() == size

    def test_padding_repeats_a_valid_row_at_the_end(self):
        rows = Batches(7, 4).indices(0, 2)
        np.testing.assert_array_equal(rows["mask"], [[1, 1, 1, 1], [1, 1, 1, 0]])
        assert rows["index"][1, 3] in rows["index"][1, :3]
        assert (rows["index"].dtype, rows["mask"].dtype) == (np.int32, np.float32)

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 9), (2, 4), (3, 8), (8, 9), (4, 4)]
    )
    def test_rows_are_a_window_of_all_epochs(self, start, stop):
        batches = Batches(10, 4, seed=3)  # three batches an epoch
        whole = batches.indices(0, 9)
        part = batches.indices(start, stop)
        for key in ("index", "mask"):
            np.testing.assert_array_equal(part[key], whole[key][start:stop])
            np.testing.assert_array_equal(
                np.concatenate([batches.indices(i, i + 1)[key] for i in range(9)]),
                whole[key],
            )

    def test_texts_of_like_length_share_batches_in_random_order(self):
        lengths = np.random.default_rng(0).integers(3, 48, 1_001)
        batches = Batches(1_001, 10, seed=2, lengths=tuple(lengths.tolist()))
        rows = batches.indices(0, 101)
        real = rows["index"][rows["mask"] > 0]
        assert sorted(real.tolist()) == list(range(1_001))
        found = lengths[rows["index"][:-1]]
        assert np.ptp(found, axis=1).mean() < 3  # of 45 in all
        assert np.corrcoef(np.arange(100), found.mean(1))[0, 1] < 0.3
        again = batches.indices(101, 202)
        sharing = [len({*a} & {*b}) for a in rows["index"] for b in again["index"]]
        assert max(sharing) < 10  # each epoch mixes them anew
        # A resumed run sees the very batches that were left; the last is of any length.
        part = batches.indices(40, 140)["index"]
        np.testing.assert_array_equal(part[:61], rows["index"][40:])
        np.testing.assert_array_equal(part[61:], again["index"][:39])

    @pytest.mark.parametrize("size", [40, 400])
    def test_of_few_texts_too_each_epoch_has_other_batches(self, size):
        batches = Batches(size, 10, lengths=tuple(range(size)))
        count = batches.steps_per_epoch
        rows = batches.indices(0, 2 * count)["index"]
        first, second = ({*map(frozenset, x)} for x in np.split(rows, [count]))
        assert not first & second

    def test_there_is_a_length_for_each_example(self):
        with pytest.raises(DataError, match="2 lengths were given for 3 examples"):
            Batches(3, 1, lengths=(1, 2))

    def test_the_order_is_the_seeds_and_the_epochs(self):
        first = Batches(50, 50, seed=0).indices(0, 2)["index"]
        again = Batches(50, 50, seed=0).indices(0, 2)["index"]
        other = Batches(50, 50, seed=1).indices(0, 2)["index"]
        np.testing.assert_array_equal(first, again)
        assert (first[0] != first[1]).any()
        assert (first != other).any(axis=1).all()

    def test_every_position_of_an_example_is_as_likely(self):
        """A chi-squared over 400 seeds, its 99.99% quantile for 9 degrees is 33.7."""
        firsts = [
            Batches(10, 10, seed=s).indices(0, 1)["index"][0, 0] for s in range(400)
        ]
        counts = np.bincount(firsts, minlength=10)
        assert ((counts - 40) ** 2 / 40).sum() < 33.7

    @pytest.mark.parametrize(
        ("step", "epoch", "batch"), [(0, 0, 0), (2, 0, 2), (3, 1, 0), (7, 2, 1)]
    )
    def test_position(self, step, epoch, batch):
        position = Batches(10, 4, seed=3).position(step)
        assert position == {"seed": 3, "epoch": epoch, "batch": batch}

    def test_iterate_gives_the_batches_of_rows(self):
        examples = {"inputs": np.arange(7.0), "labels": np.arange(7) % 3}
        batches = Batches(7, 3, seed=2)
        rows = batches.indices(3, 6)  # the second epoch
        for i, batch in enumerate(batches.iterate(examples, epoch=1)):
            np.testing.assert_array_equal(batch["index"], rows["index"][i])
            np.testing.assert_array_equal(batch["mask"], rows["mask"][i])
            np.testing.assert_array_equal(batch["inputs"], batch["index"].astype(float))
            np.testing.assert_array_equal(batch["labels"], batch["index"] % 3)
        assert i == 2

    @pytest.mark.parametrize(
        ("size", "batch_size", "sentence"),
        [
            (0, 1, "the data set is empty"),
            (5, 6, "a batch of 6 cannot be drawn from 5 examples"),
            (5, 0, "a batch of 0 cannot be drawn from 5 examples"),
            (5, -1, "a batch of -1 cannot be drawn from 5 examples"),
        ],
    )
    def test_impossible_sizes(self, size, batch_size, sentence):
        with fails(sentence):
            Batches(size, batch_size)


def test_known_labels_lie_all_over_every_epoch():
    """The draw of the labels is no epoch's order."""
    examples = {"inputs": np.arange(1000.0), "labels": np.arange(1000) % 10}
    distilled = SimpleNamespace(teacher="teacher")
    for seed in (0, 3):
        known = few_labels(examples, 100)(distilled, seed)["labelled"]
        rows = Batches(1000, 100, seed).indices(0, 50)
        found = known[rows["index"]].sum(1)
        assert found.sum() == 500
        assert found.max() < 25


class TestHoldout:
    examples = {"images": np.arange(20).reshape(10, 2), "labels": np.arange(10)}

    def test_splits_without_overlap_or_loss(self):
        rest, held = holdout(self.examples, 3)
        assert (len(rest["labels"]), len(held["labels"])) == (7, 3)
        both = np.concatenate([rest["labels"], held["labels"]])
        assert sorted(both.tolist()) == list(range(10))
        for part in (rest, held):
            np.testing.assert_array_equal(part["images"][:, 0], 2 * part["labels"])

    def test_is_the_seeds(self):
        first, again, other = (
            holdout(self.examples, 5, seed)[1]["labels"].tolist() for seed in (0, 0, 1)
        )
        assert first == again != other

    @pytest.mark.parametrize("count", [-1, 0, 10, 11])
    def test_no_split_is_empty(self, count):
        with fails(f"cannot hold out {count} of 10 examples: one split would be empty"):
            holdout(self.examples, count)


@pytest.mark.parametrize("peak", [16, 255])
def test_normalize_is_the_formula(peak):
    images = np.random.default_rng(0).integers(0, peak + 1, (5, 4, 4), np.uint8)
    result = data.normalize(images, 0.3, 0.4, peak)
    assert result.dtype == np.float32
    exact = (images.astype(np.float64) / peak - 0.3) / 0.4
    np.testing.assert_allclose(result, exact, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (
            [0, 2, 3],
            "label 3 at position 2 is out of range: with 3 classes, labels are 0 to 2",
        ),
        ([0, -1, 9], "label -1 at position 1 is out of range: with 3 classes, .*"),
        ([[0, 1], [1, -100]], "label -100 at position 3 is out of range: .*"),
        ([0.0, 1.0], "labels must be integers, got float64"),
        ([True, False], "labels must be integers, got bool"),
    ],
)
def test_labels_out_of_range(labels, sentence):
    labels = np.array(labels)
    with fails(sentence):
        check_labels(labels, 3)
    images = np.zeros((len(labels), 2, 2), np.uint8)
    split = {"images": images, "labels": labels}
    with fails(sentence):
        Dataset("mine", split, split, 3, 255, 0.5, 0.5).inputs(split)


def test_labels_in_range():
    for dtype in (np.uint8, np.int64):
        check_labels(np.array([0, 1, 2], dtype), 3)


def test_pixels_are_normalised_in_float32():
    """A float64 mean gave other last bits than the kept results were made with."""
    digits = data.load("digits")
    images = digits.test["images"]
    scaled = images / np.float32(digits.peak)
    expected = (scaled - np.float32(digits.mean)) / np.float32(digits.deviation)
    np.testing.assert_array_equal(digits.inputs(digits.test)["inputs"], expected)
