# SPDX-License-Identifier: Apache-2.0
"""Stored teacher outputs: what is read is what the teacher says, or it is refused."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import struct

from jaxdistill import losses, models, teachers
from jaxdistill.data.augment import flip, replay, view_of
from jaxdistill.data.tokens import mask_tokens
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.teachers import StoredTeacher, ensemble, mean_logits
from jaxdistill.teachers import live as make_live
from jaxdistill.teachers.store import StoreError
from jaxdistill.train import init_state, make_train_step, scan_train
from jaxdistill.types import Outputs, TopK
from tests.builders import CLASSES, assert_identical, live, make_batch

pytestmark = pytest.mark.usefixtures("any_teacher")

SIZE, BATCH = 40, 8
EXAMPLES = {
    name: value
    for name, value in make_batch(0, SIZE).items()
    if name in ("inputs", "labels")
}
MODULE = models.MLP((7, CLASSES))
TEACHER = live(MODULE)
OF = {"data": "random", "split": "train", "transform": "none", "batch_size": BATCH}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Several files and several parts in each, of 40 examples."""
    for module in (teachers.store,):
        monkeypatch.setattr(module, "SHARD", 16)
    monkeypatch.setattr(teachers.store, "CHUNK", 8)


@struct.dataclass
class RulesOut:
    """A teacher of whose classes one has no probability."""

    model: models.BoundModule
    which: int = struct.field(pytree_node=False)

    def __call__(self, batch):
        logits = self.model(batch).logits
        return Outputs(logits.at[:, self.which].set(-jnp.inf))


def describe(**options):
    return teachers.store.describe(TEACHER, EXAMPLES, **{**OF, **options})


@pytest.fixture
def store(tmp_path):
    """A dense store, and its manifest."""
    manifest = describe(layers=(0,))
    teachers.store.write(tmp_path / "s", TEACHER, EXAMPLES, manifest, progress=False)
    return tmp_path / "s", manifest


def outputs(batch_size=BATCH):
    """The live teacher's on all examples, at a batch shape."""
    forward = jax.jit(lambda t, batch: t(batch))
    parts = [
        forward(
            TEACHER,
            {
                "inputs": EXAMPLES["inputs"][i : i + batch_size],
                "mask": np.ones(batch_size),
            },
        )
        for i in range(0, SIZE, batch_size)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def test_what_is_read_is_what_the_teacher_says(store):
    path, manifest = store
    arrays = teachers.store.read(path, manifest)
    assert {name: a.shape for name, a in arrays.items()} == {
        "logits": (SIZE, 1, CLASSES),
        "hidden_0": (SIZE, 1, 7),
    }
    np.testing.assert_array_equal(arrays["logits"][:, 0], outputs().logits)
    np.testing.assert_array_equal(arrays["hidden_0"][:, 0], outputs().hidden_states[0])
    assert (path / "logits" / "c" / "2").exists()  # sharded
    stored = StoredTeacher()({"teacher": arrays})
    assert [*stored.hidden_states] == [0]
    np.testing.assert_array_equal(stored.hidden_states[0], outputs().hidden_states[0])


def test_top_k_is_the_largest_and_what_is_left_is_known(tmp_path):
    manifest = describe(top_k=2)
    teachers.store.write(tmp_path, TEACHER, EXAMPLES, manifest, progress=False)
    arrays = {
        name: a[:, 0] for name, a in teachers.store.read(tmp_path, manifest).items()
    }
    logits = outputs().logits
    np.testing.assert_array_equal(arrays["ids"], np.argsort(-logits, -1)[:, :2])
    back = arrays["log_probs"] + arrays["logsumexp"][:, None]
    kept = np.take_along_axis(logits, arrays["ids"], -1)
    np.testing.assert_allclose(back, kept, rtol=1e-5, atol=1e-6)


def test_a_store_of_the_first_version_is_refused(store):
    path, manifest = store
    older = json.loads((path / "manifest.json").read_text()) | {"format": 3}
    (path / "manifest.json").write_text(json.dumps(older))
    with pytest.raises(
        StoreError, match=f"{path} was written by jaxdistill 0.1; delete"
    ):
        teachers.store.read(path, manifest)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_precisions(tmp_path, dtype):
    manifest = describe(dtype=dtype)
    teachers.store.write(tmp_path, TEACHER, EXAMPLES, manifest, progress=False)
    found = teachers.store.read(tmp_path, manifest)["logits"][:, 0]
    np.testing.assert_array_equal(found, outputs().logits.astype(dtype))


def student_and_state():
    student, optimizer = models.student(models.MLP((4, CLASSES))), optax.sgd(0.1)
    batch = {name: value[:1] for name, value in EXAMPLES.items()}
    batch["mask"] = np.ones(1, np.float32)
    return student, optimizer, init_state(jax.random.key(0), student, optimizer, batch)


def train(objective, teacher, examples, augment=None):
    """Parameters after some shuffled steps."""
    student, optimizer, state = student_and_state()
    step = scan_train(make_train_step(student, objective, optimizer, augment=augment))
    index = np.random.default_rng(1).permutation(SIZE).reshape(-1, BATCH)
    rows = {"index": index, "mask": np.ones(index.shape, np.float32)}
    return jax.jit(step)(state, (teacher, examples), rows)[0].params


def test_a_step_is_bit_equal_to_live_at_the_batch_shape_it_was_written_at(store):
    path, manifest = store
    both = combine({"hard": (0.5, hard_labels()), "soft": (0.5, soft_targets())})
    live_params = train(both, TEACHER, EXAMPLES)
    stored = {**EXAMPLES, "teacher": teachers.store.read(path, manifest)}
    for found, expected in zip(
        jax.tree.leaves(train(both, StoredTeacher(), stored)),
        jax.tree.leaves(live_params),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_another_batch_shape_is_close(tmp_path):
    manifest = describe(batch_size=20)
    teachers.store.write(tmp_path, TEACHER, EXAMPLES, manifest, progress=False)
    found = teachers.store.read(tmp_path, manifest)["logits"][:, 0]
    expected = outputs().logits
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


def test_top_k_teaches_by_the_sparse_loss(tmp_path):
    manifest = describe(top_k=3)
    teachers.store.write(tmp_path, TEACHER, EXAMPLES, manifest, progress=False)
    arrays = {k: v[:8] for k, v in teachers.store.read(tmp_path, manifest).items()}
    batch = {**make_batch(0, 8), "teacher": arrays}
    stored = StoredTeacher()(batch)
    assert isinstance(stored.logits, TopK)
    mine = make_live(MODULE, TEACHER.variables)(batch)
    values, _ = soft_targets(temperature=2.0)(mine, stored, batch, 0)
    expected = losses.sparse_forward_kl(mine.logits, stored.logits, temperature=2.0)
    np.testing.assert_array_equal(values, expected)


def test_views_are_made_again_for_the_student(tmp_path):
    """Whatever the batch, an example's outputs are of the very view it is shown."""
    examples = {
        "inputs": np.random.default_rng(0).normal(size=(SIZE, 4, 6)).astype(np.float32),
        "labels": EXAMPLES["labels"],
    }
    teacher = make_live(MODULE, MODULE.init(jax.random.key(0), examples["inputs"][:1]))
    manifest = teachers.store.describe(
        teacher, examples, **{**OF, "transform": "flip"}, views=3, seed=5
    )
    write = partial(teachers.store.write, tmp_path, teacher, examples, manifest)
    write(augment=flip(), progress=False)
    stored = {**examples, "teacher": teachers.store.read(tmp_path, manifest)}
    index = np.array([3, 31, 7, 8])
    batch = {name: jax.tree.map(lambda x: x[index], v) for name, v in stored.items()}
    batch |= {"index": index, "mask": np.ones(4, np.float32)}
    seen = []
    for key in range(6):
        shown = replay(flip(), manifest.seed, manifest.views)(
            batch, jax.random.key(key)
        )
        found, expected = StoredTeacher()(shown).logits, teacher(shown).logits
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        seen.append(np.asarray(shown["inputs"]))
    assert len({images.tobytes() for images in seen}) > 1
    alone = {name: jax.tree.map(lambda x: x[1:2], v) for name, v in batch.items()}
    view = jnp.array([2])
    np.testing.assert_array_equal(
        view_of(flip(), 5, alone, view)["inputs"][0],
        view_of(flip(), 5, batch, jnp.full(4, 2))["inputs"][1],
    )


def test_a_killed_writer_goes_on(store, tmp_path):
    path, manifest = store
    again = tmp_path / "again"
    calls = []

    class Killed(Exception):
        pass

    real = teachers.store.of_examples

    def dying(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers.store, "of_examples", dying)
        with pytest.raises(Killed):
            teachers.store.write(again, TEACHER, EXAMPLES, manifest, progress=False)
        with pytest.raises(StoreError, match="no finished teacher outputs"):
            teachers.store.read(again, manifest)
        teachers.store.write(again, TEACHER, EXAMPLES, manifest, progress=False)
    assert len(calls) == 4  # three shards, one of them twice
    for name, array in teachers.store.read(path, manifest).items():
        np.testing.assert_array_equal(teachers.store.read(again, manifest)[name], array)


def test_several_processes_write_one_store(tmp_path, monkeypatch):
    manifest = describe()
    for process in (1, 0):  # the first waits for the others
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        teachers.store.write(tmp_path, TEACHER, EXAMPLES, manifest, progress=False)
        assert (tmp_path / "manifest.json").exists() == (process == 0)
    found = teachers.store.read(tmp_path, manifest)["logits"][:, 0]
    np.testing.assert_array_equal(found, outputs().logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher", "0" * 64),
        ("data", "mnist"),
        ("split", "test"),
        ("size", 41),
        ("content", "0" * 64),
        ("transform", "normalised"),
        ("classes", 9),
        ("top_k", 3),
        ("dtype", "float16"),
        ("views", 2),
        ("seed", 1),
        ("layers", ()),
        ("batch_size", 16),
        ("devices", 2),
        ("compute", "bfloat16"),
        ("arrays", {}),
        ("format", 0),
    ],
)
def test_another_stores_outputs_are_refused_by_the_field(store, field, value):
    path, manifest = store
    other = replace(manifest, **{field: value})
    for use in (
        lambda: teachers.store.read(path, other),
        lambda: teachers.store.write(path, TEACHER, EXAMPLES, other, progress=False),
    ):
        with pytest.raises(StoreError, match=f"holds outputs of another {field}: "):
            use()


SMALL = ["manifest.json", "shard_0.json", "shard_16.json", "logits/zarr.json"]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_cut_short_is_named(store, name):
    path, manifest = store
    content = (path / name).read_bytes()
    for size in (0, 1, len(content) // 2, len(content.rstrip()) - 1):
        (path / name).write_bytes(content[:size])
        with pytest.raises(StoreError, match=f"{path}.* is damaged: "):
            teachers.store.read(path, manifest)
    (path / name).unlink()
    with pytest.raises(StoreError, match=f"{path}.* is damaged: |no finished"):
        teachers.store.read(path, manifest)


@pytest.mark.parametrize("name", SMALL)
def test_no_flipped_bit_of_a_small_file_passes(store, name):
    """Of zarr.json a few are no part of the array, as the level of compression."""
    path, manifest = store
    expected, content = teachers.store.read(path, manifest), (path / name).read_bytes()
    shape = max(content.find(b'"shape":['), 0)
    bits = {*range(0, 8 * len(content), 3), *range(8 * shape, 8 * shape + 160)}
    passed = 0
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(changed)
        try:
            found = teachers.store.read(path, manifest)
        except StoreError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        passed += 1
        assert_identical(found, expected)
    assert passed <= (0.05 * len(bits) if name == "logits/zarr.json" else 0)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"format": 5}'])
def test_a_damaged_begin_is_named(store, content):
    path, manifest = store
    (path / "manifest.json").unlink()
    (path / "begun.json").write_bytes(content)
    with pytest.raises(StoreError, match=f"{path}.* (is damaged|another teacher): "):
        teachers.store.write(path, TEACHER, EXAMPLES, manifest, progress=False)


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_text("")])
def test_what_the_message_says_brings_a_store_back(store, damage, monkeypatch):
    """Without its manifest it is unfinished: what is marked is not computed again."""
    path, manifest = store
    computed, real = [], teachers.store.of_examples
    monkeypatch.setattr(
        teachers.store,
        "of_examples",
        lambda *args: computed.append(args[3][0]) or real(*args),
    )
    expected = teachers.store.read(path, manifest)
    (path / "manifest.json").write_text("")
    with pytest.raises(StoreError, match="delete it and give the command"):
        teachers.store.write(path, TEACHER, EXAMPLES, manifest, progress=False)
    (path / "manifest.json").unlink()
    damage(path / "shard_16.json")
    teachers.store.write(path, TEACHER, EXAMPLES, manifest, progress=False)
    assert computed == [16]
    assert_identical(teachers.store.read(path, manifest), expected)
    assert not list(path.glob("*.partial"))


def test_a_resumed_writer_names_an_array_of_another_kind(store):
    path, manifest = store
    (path / "manifest.json").unlink()
    (path / "shard_0.json").unlink()
    (path / "logits" / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match=f"{path}/logits is damaged: "):
        teachers.store.write(path, TEACHER, EXAMPLES, manifest, progress=False)


def test_the_manifest_knows_teacher_and_inputs():
    other = live(MODULE, 8)
    assert teachers.store.describe(other, EXAMPLES, **OF).teacher != describe().teacher
    changed = {**EXAMPLES, "inputs": EXAMPLES["inputs"].copy()}
    changed["inputs"][3, 2] += 1e-6
    assert teachers.store.describe(TEACHER, changed, **OF).content != describe().content


def files(path):
    return sorted(file for file in (path / "logits" / "c").rglob("*") if file.is_file())


def flip_a_bit(path):
    content = bytearray(files(path)[1].read_bytes())
    content[len(content) // 3] ^= 1
    files(path)[1].write_bytes(content)


def cut(path):
    files(path)[0].write_bytes(files(path)[0].read_bytes()[:-20])


def lose_a_file(path):
    files(path)[2].unlink()


def lose_a_mark(path):
    (path / "shard_16.json").unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lose_a_file, lose_a_mark])
def test_damage_is_found_and_named(store, damage):
    path, manifest = store
    damage(path)
    with pytest.raises(StoreError, match=f"{path}.* is damaged: "):
        teachers.store.read(path, manifest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": CLASSES + 1}, f"between 1 and the {CLASSES} classes, got 6"),
        ({"top_k": 0}, "got 0"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"batch_size": 0}, "batch_size of a store must be at least 1, got 0"),
        ({"devices": 0}, "devices of a store must be at least 1, got 0"),
        ({"devices": 3}, "batch_size of 8 does not divide over 3 devices"),
        ({"layers": (5,)}, "the teacher's 1 hidden states, counted from 0, got 5"),
        ({"layers": (-1,)}, "got -1"),
        ({"views": 0}, "views of a store must be at least 1, got 0"),
    ],
)
def test_senseless_options(options, message):
    with pytest.raises(StoreError, match=message):
        describe(**options)


@pytest.mark.parametrize("members", [1, 2, BATCH])
def test_an_ensemble_is_refused(members):
    teacher = ensemble([TEACHER] * members)
    with pytest.raises(StoreError, match="logits of one model.* `mean_logits`"):
        teachers.store.describe(teacher, EXAMPLES, **OF)
    mean = mean_logits([TEACHER] * members)
    assert teachers.store.describe(mean, EXAMPLES, **OF).classes == CLASSES


class Words(nn.Module):
    """Logits of each token, `[B, L, V]`, from a mapping."""

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        x = nn.Embed(11, 6)(inputs["input_ids"])
        return Outputs(nn.Dense(9)(x * inputs["attention_mask"][..., None]))


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_text_model_takes_a_mapping_and_says_every_token(top_k, tmp_path):
    rng = np.random.default_rng(0)
    mask = (rng.random((SIZE, 4)) < 0.7).astype(np.float32)
    mask[:, 0], mask[:, 1] = 1, 0  # each text has a token, and padding
    inputs = {
        "input_ids": rng.integers(0, 11, (SIZE, 4), np.int32),
        "attention_mask": mask,
    }
    labels = rng.integers(0, 9, (SIZE, 4), np.int32)
    examples = {"inputs": inputs, "labels": labels, "token_mask": mask}
    teacher = make_live(Words(), Words().init(jax.random.key(0), inputs))
    manifest = teachers.store.describe(teacher, examples, **OF, top_k=top_k)
    assert (manifest.size, manifest.classes) == (SIZE, 9)
    teachers.store.write(tmp_path, teacher, examples, manifest, progress=False)
    stored = StoredTeacher()(
        {"teacher": teachers.store.read(tmp_path, manifest)}
    ).logits
    logits = teacher({**examples, "mask": np.ones(SIZE)}).logits
    if top_k is None:
        np.testing.assert_allclose(stored, logits, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(stored.ids, jax.lax.top_k(logits, 3)[1])
    found = teachers.store.verify(tmp_path, teacher, examples, manifest)
    right = (logits.argmax(-1) == labels)[mask > 0].mean()
    assert found == {"difference": 0, "accuracy": pytest.approx(right)}
    flipped = {**inputs, "attention_mask": 1 - mask}
    other = {"inputs": flipped, "labels": labels}
    assert teachers.store.describe(teacher, other, **OF).content != manifest.content
    with pytest.raises(
        StoreError, match="bucket_lengths takes one set of logits of each"
    ):
        teachers.store.describe(
            teacher, examples, **OF, top_k=top_k, bucket_lengths=(2,)
        )


@pytest.mark.parametrize("views", [1, 3])
def test_texts_cut_to_their_batch_say_the_same_in_their_order(views, tmp_path):
    rng = np.random.default_rng(0)
    longest = rng.integers(1, 9, SIZE)
    inputs = {
        "input_ids": rng.integers(3, 11, (SIZE, 8), np.int32),
        "attention_mask": (np.arange(8) < longest[:, None]).astype(np.int32),
    }
    examples = {"inputs": inputs, "labels": EXAMPLES["labels"]}
    module = models.BagOfEmbeddings(11, 4, 3)
    teacher = make_live(module, module.init(jax.random.key(0), inputs))
    mask = None if views == 1 else mask_tokens(2, 11, (), share=0.5)

    def stored(name, **options):
        manifest = teachers.store.describe(
            teacher, examples, **OF, views=views, **options
        )
        path = tmp_path / name
        write = partial(teachers.store.write, path, teacher, examples, manifest)
        write(augment=mask, progress=False)
        found = teachers.store.verify(path, teacher, examples, manifest, augment=mask)
        assert found["difference"] < 1e-6
        return teachers.store.read(path, manifest)["logits"]

    np.testing.assert_allclose(
        stored("cut", bucket_lengths=(3, 5)), stored("whole"), rtol=1e-5, atol=1e-6
    )


def test_verify_computes_random_rows_again(store):
    path, manifest = store
    found = teachers.store.verify(path, TEACHER, EXAMPLES, manifest, rows=10)
    assert found["difference"] == 0
    right = outputs().logits.argmax(-1) == EXAMPLES["labels"]
    assert found["accuracy"] == pytest.approx(right.mean())
    wrong = json.loads((path / "manifest.json").read_text())
    assert wrong["size"] == SIZE
    other = live(MODULE, 8)
    assert teachers.store.verify(path, other, EXAMPLES, manifest)["difference"] > 0.01


def test_verify_knows_a_class_that_is_ruled_out(tmp_path):
    teacher = RulesOut(TEACHER, 1)
    manifest = teachers.store.describe(teacher, EXAMPLES, **OF)
    teachers.store.write(tmp_path, teacher, EXAMPLES, manifest, progress=False)
    assert (
        teachers.store.verify(tmp_path, teacher, EXAMPLES, manifest)["difference"] == 0
    )
    other = RulesOut(TEACHER, 2)
    found = teachers.store.verify(tmp_path, other, EXAMPLES, manifest)
    assert found["difference"] == np.inf
