# SPDX-License-Identifier: Apache-2.0
"""Masked tokens: which are chosen, what becomes of them, and what is left alone."""

import jax
import numpy as np
import pytest

from jaxdistill.data.augment import describe
from jaxdistill.data.tokens import hide_tokens, mask_tokens

VOCAB, MASK, SPECIAL = 37, 4, (0, 1, 2)
SHAPE = (512, 64)
KEY = jax.random.key(3)


def make(seed=0, **more):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCAB, SHAPE).astype(np.int32)
    length = rng.integers(1, SHAPE[1] + 1, SHAPE[0])
    keep = (np.arange(SHAPE[1])[None] < length[:, None]).astype(np.int32)
    ids[:, 0], ids[:, 7], ids[:, 9] = 1, 2, MASK  # [CLS], [SEP], a mask already there
    inputs = {"input_ids": np.where(keep > 0, ids, 11), "attention_mask": keep}
    mask = (np.arange(SHAPE[0]) < 500).astype(np.float32)
    return {"inputs": inputs, "mask": mask, **more}


BATCH = make()
IDS, KEEP = BATCH["inputs"]["input_ids"], BATCH["inputs"]["attention_mask"]
PREPARE = mask_tokens(MASK, VOCAB, SPECIAL)
WORDS = (KEEP * BATCH["mask"][:, None] > 0) & ~np.isin(IDS, (*SPECIAL, MASK))


def masked(augment=PREPARE, batch=BATCH, key=KEY):
    found = augment(batch, key)
    return found, np.asarray(found["inputs"]["input_ids"]), found["token_mask"] > 0


def assert_share(found, total, share):
    """A binomial count within four and a half standard deviations."""
    assert abs(found - share * total) < 4.5 * np.sqrt(total * share * (1 - share))


def test_shares_are_those_of_the_paper():
    _, hidden, chosen = masked()
    chosen = np.asarray(chosen)
    assert_share(chosen.sum(), WORDS.sum(), 0.15)
    before, after = IDS[chosen], hidden[chosen]
    stray = 0.1 / VOCAB  # a random word that is the mask, or the word itself
    assert_share((after == MASK).sum(), len(after), 0.8 + stray)
    assert_share((after == before).sum(), len(after), 0.1 + stray)
    others = (after != MASK) & (after != before)
    assert_share(others.sum(), len(after), 0.1 * (1 - 2 / VOCAB))


def test_random_words_are_any_and_all_positions_are_alike():
    counts, places = np.zeros(VOCAB), np.zeros(SHAPE[1])
    for seed in range(20):
        _, hidden, chosen = masked(key=jax.random.key(seed))
        random = np.asarray(chosen) & (hidden != MASK) & (hidden != IDS)
        counts += np.bincount(hidden[random], minlength=VOCAB)
        places += np.asarray(chosen).sum(0)
    assert counts[MASK] == 0
    rest = np.delete(counts, MASK)
    # A word is kept out where it replaces itself: by one in 32 of the words from 5 up.
    odds = np.where(np.delete(np.arange(VOCAB), MASK) < 5, 1, 31 / 32)
    expected = rest.sum() * odds / odds.sum()
    chi = ((rest - expected) ** 2 / expected).sum()
    assert abs(chi - 35) < 4.5 * np.sqrt(2 * 35)
    some = WORDS.sum(0) > 0
    total = 20 * WORDS.sum(0)[some]
    gap = (places[some] - 0.15 * total) / np.sqrt(total * 0.15 * 0.85)
    assert abs((gap**2).sum() - some.sum()) < 4.5 * np.sqrt(2 * some.sum())


def test_only_real_words_are_chosen_and_the_rest_stays():
    found, hidden, chosen = masked()
    assert not (np.asarray(chosen) & ~WORDS).any()
    np.testing.assert_array_equal(hidden[~np.asarray(chosen)], IDS[~np.asarray(chosen)])
    np.testing.assert_array_equal(found["labels"], IDS)
    np.testing.assert_array_equal(found["inputs"]["attention_mask"], KEEP)
    assert hidden.dtype == IDS.dtype
    assert found["mask"] is BATCH["mask"]


def test_every_word_may_be_asked_for_and_none():
    _, _, chosen = masked(mask_tokens(MASK, VOCAB, SPECIAL, share=1.0))
    np.testing.assert_array_equal(chosen, WORDS)
    _, hidden, chosen = masked(mask_tokens(MASK, VOCAB, SPECIAL, share=0.0))
    assert not chosen.any()
    np.testing.assert_array_equal(hidden, IDS)


def test_a_batch_may_leave_tokens_out():
    asked = np.zeros(SHAPE, np.float32)
    asked[:, 3] = 1
    every = mask_tokens(MASK, VOCAB, SPECIAL, share=1.0)
    _, _, chosen = masked(every, {**BATCH, "token_mask": asked})
    np.testing.assert_array_equal(chosen, WORDS & (asked > 0))


def test_padding_takes_no_part_in_the_draw():
    ids = np.where(KEEP > 0, IDS, 30)
    other = {**BATCH, "inputs": {**BATCH["inputs"], "input_ids": ids}}
    (_, mine, chosen), (_, theirs, also) = masked(), masked(batch=other)
    np.testing.assert_array_equal(chosen, also)
    np.testing.assert_array_equal(mine * KEEP, theirs * KEEP)


def test_the_key_decides_compiled_or_not():
    found, again = PREPARE(BATCH, KEY), jax.jit(PREPARE)(BATCH, KEY)
    jax.tree.map(np.testing.assert_array_equal, dict(found), dict(again))
    _, hidden, _ = masked(key=jax.random.key(4))
    assert (hidden != np.asarray(found["inputs"]["input_ids"])).any()


def test_without_an_attention_mask_all_tokens_are_real():
    bare = {"inputs": {"input_ids": IDS}, "mask": np.ones(SHAPE[0], np.float32)}
    _, _, chosen = masked(mask_tokens(MASK, VOCAB, SPECIAL, share=1.0), bare)
    np.testing.assert_array_equal(chosen, ~np.isin(IDS, (*SPECIAL, MASK)))


def test_tokens_are_hidden_and_the_task_stays():
    batch = {**BATCH, "labels": np.arange(SHAPE[0])}
    found = hide_tokens(MASK, SPECIAL, share=0.1)(batch, KEY)
    ids = np.asarray(found["inputs"]["input_ids"])
    gone = ids != IDS
    assert_share(gone.sum(), WORDS.sum(), 0.1)
    assert (ids[gone] == MASK).all()
    assert not (gone & ~WORDS).any()
    assert ids.dtype == IDS.dtype
    for name in ("labels", "mask"):
        assert found[name] is batch[name]
    assert set(found) == set(batch)
    every = hide_tokens(MASK, SPECIAL, share=1.0)(batch, KEY)["inputs"]
    np.testing.assert_array_equal(every["input_ids"], np.where(WORDS, MASK, IDS))


def test_it_is_described_by_its_numbers():
    expected = "mask_tokens(mask_id=4, share=0.15, special=(0, 1, 2), vocab=37)"
    assert describe(PREPARE) == expected
    hidden = describe(hide_tokens(MASK, SPECIAL))
    assert hidden == "hide_tokens(mask_id=4, share=0.1, special=(0, 1, 2))"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_tokens(37, VOCAB, ()), "id 37 is not in a vocabulary of 37"),
        (lambda: mask_tokens(4, VOCAB, (-1,)), "id -1 is not in a vocabulary of 37"),
        (lambda: mask_tokens(4, VOCAB, (), share=1.5), "a share from 0 to 1, got 1.5"),
        (lambda: hide_tokens(4, (), share=-1), "hide_tokens needs a share from 0 to 1"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
