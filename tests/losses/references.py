# SPDX-License-Identifier: Apache-2.0
"""The losses in float64 NumPy, written from the papers: the outside oracle.

Naive on purpose: loops over examples, pairs and heads. A mask drops the rows (or keys)
from the computation; their values are 0. Where a formula divides 0 by 0 (a zero vector,
a constant row) the direction, cosine or correlation is 0. Nothing here imports the
library. The PyTorch versions at the end follow public code, in its conventions.
"""

import itertools
import math

import numpy as np

# Helpers


def log(x):
    """Natural logarithm with log 0 = -inf."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(x, np.float64))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def softmax(logits):
    return np.exp(log_softmax(logits))


def smoothed(labels, classes, label_smoothing):
    """Szegedy et al. 2016, section 7: (1 - e) onehot + e / C."""
    return (1 - label_smoothing) * np.eye(classes)[labels] + label_smoothing / classes


def kl(log_p, log_q):
    """sum p log(p / q) of two lists of log-probabilities, 0 log 0 = 0."""
    total = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        if np.exp(a) > 0:
            total += np.exp(a) * (a - b)
    return total


def existing(student, teacher):
    """Both without the classes that are -inf in both."""
    kept = ~(np.isneginf(student) & np.isneginf(teacher))
    return student[kept], teacher[kept]


def tempered(student, teacher, temperature):
    """`(log p, log q)` of teacher and student, over the classes that exist."""
    student, teacher = existing(student, teacher)
    return log_softmax(teacher / temperature), log_softmax(student / temperature)


def each_row(function, *arrays):
    """A function of vectors at every position of the leading axes."""
    arrays = [np.asarray(array, np.float64) for array in arrays]
    values = np.empty(arrays[0].shape[:-1])
    for index in np.ndindex(values.shape):
        values[index] = function(*(array[index] for array in arrays))
    return values


def unit(x):
    """x / |x|; the zero vector stays."""
    norm = math.sqrt((x * x).sum())
    return x / norm if norm > 0 else np.zeros_like(x)


def cosine(x, y):
    return (unit(x) * unit(y)).sum()


def pearson(x, y):
    """Correlation of two vectors; 0 if either is constant."""
    if len(x) == 0 or x.min() == x.max() or y.min() == y.max():
        return 0.0
    return cosine(x - x.mean(), y - y.mean())


def huber(x):
    """Park et al. 2019, section 3.2: x^2 / 2 up to 1, |x| - 1/2 beyond."""
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def real(mask, length):
    """The positions a mask keeps, all of them without one."""
    return [i for i in range(length) if mask is None or np.asarray(mask)[i]]


def vectors(x, kept):
    """Kept rows in float64, each flattened."""
    x = np.asarray(x, np.float64)
    return x.reshape(len(x), -1)[kept]


def at_kept(values, kept, length):
    """Values of the kept rows in their places, 0 elsewhere."""
    full = np.zeros(length)
    full[kept] = values
    return full


# Logits


def cross_entropy(student, labels, *, label_smoothing=0.0):
    """Szegedy et al. 2016, section 7; -inf logits take no part in the smoothing."""
    student, labels = np.asarray(student, np.float64), np.asarray(labels)
    values = np.empty(labels.shape)
    for index in np.ndindex(labels.shape):
        log_q = log_softmax(student[index])
        exists = np.isfinite(log_q)
        targets = label_smoothing * exists / exists.sum()
        targets[labels[index]] += 1 - label_smoothing
        used = targets > 0
        values[index] = -(targets[used] * log_q[used]).sum()
    return values


def forward_kl(student, teacher, *, temperature=1.0):
    """Hinton et al. 2015, section 2: T^2 sum p log(p / q)."""

    def row(student, teacher):
        log_p, log_q = tempered(student, teacher, temperature)
        return temperature**2 * kl(log_p, log_q)

    return each_row(row, student, teacher)


def reverse_kl(student, teacher, *, temperature=1.0):
    """Gu et al. 2024 (MiniLLM), section 2: T^2 sum q log(q / p)."""

    def row(student, teacher):
        log_p, log_q = tempered(student, teacher, temperature)
        return temperature**2 * kl(log_q, log_p)

    return each_row(row, student, teacher)


def generalized_jsd(student, teacher, *, beta=0.5, temperature=1.0):
    """Agarwal et al. 2024 (GKD), equation 1, M = beta P + (1 - beta) Q; times T^2."""

    def row(student, teacher):
        log_p, log_q = tempered(student, teacher, temperature)
        log_m = np.logaddexp(math.log(beta) + log_p, math.log(1 - beta) + log_q)
        jsd = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        return temperature**2 * jsd

    return each_row(row, student, teacher)


def total_variation(student, teacher, *, temperature=1.0):
    """Wen et al. 2023 (f-distill), the TVD objective: T^2 / 2 sum |p - q|."""

    def row(student, teacher):
        log_p, log_q = tempered(student, teacher, temperature)
        return temperature**2 * 0.5 * abs(np.exp(log_p) - np.exp(log_q)).sum()

    return each_row(row, student, teacher)


def soft_cross_entropy(student, teacher, *, temperature=1.0):
    """Hinton et al. 2015, section 2: -T^2 sum p log q."""

    def row(student, teacher):
        log_p, log_q = tempered(student, teacher, temperature)
        total = 0.0
        for a, b in zip(log_p, log_q, strict=True):
            if np.exp(a) > 0:
                total -= np.exp(a) * b
        return temperature**2 * total

    return each_row(row, student, teacher)


def logit_mse(student, teacher):
    """Ba & Caruana 2014, L2 on logits, as a mean over the classes that exist."""

    def row(student, teacher):
        student, teacher = existing(student, teacher)
        return ((student - teacher) ** 2).mean()

    return each_row(row, student, teacher)


def decoupled_kl(
    student,
    teacher,
    labels,
    *,
    target_weight=1.0,
    nontarget_weight=8.0,
    temperature=1.0,
):
    """Zhao et al. 2022 (DKD), equation 7: T^2 (alpha TCKD + beta NCKD)."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    labels = np.asarray(labels)
    values = np.empty(labels.shape)
    for index in np.ndindex(labels.shape):
        label = labels[index]
        p = softmax(teacher[index] / temperature)
        q = softmax(student[index] / temperature)
        others = [c for c in range(len(p)) if c != label]
        tckd = kl(log([p[label], p[others].sum()]), log([q[label], q[others].sum()]))
        nckd = kl(
            *tempered(student[index][others], teacher[index][others], temperature)
        )
        value = target_weight * tckd + nontarget_weight * nckd
        values[index] = temperature**2 * value
    return values


def dist(
    student, teacher, mask=None, *, inter_weight=1.0, intra_weight=1.0, temperature=1.0
):
    """Huang et al. 2022 (DIST), inter- and intra-relation losses; times T^2."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    shape, classes = student.shape[:-1], student.shape[-1]
    student, teacher = student.reshape(-1, classes), teacher.reshape(-1, classes)
    kept = real(None if mask is None else np.ravel(mask), len(student))
    student, teacher = student[kept], teacher[kept]
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    missing = np.isneginf(student) & np.isneginf(teacher)
    columns = [c for c in range(classes) if not missing[:, c].all()]
    intra = [1 - pearson(p[:, c], q[:, c]) for c in columns]
    values = []
    for i in range(len(kept)):
        there = ~missing[i]
        inter = 1 - pearson(p[i, there], q[i, there])
        value = inter_weight * inter + intra_weight * np.mean(intra)
        values.append(temperature**2 * value)
    return at_kept(values, kept, math.prod(shape)).reshape(shape)


def standardize(logits):
    """Sun et al. 2024 (logit standardization): Z-score over the classes, n - 1."""
    logits = np.asarray(logits, np.float64)
    scores = np.full(logits.shape, -np.inf)
    for index in np.ndindex(logits.shape[:-1]):
        there = np.isfinite(logits[index])
        z = logits[index][there]
        if len(z) < 2 or z.min() == z.max():
            scores[index][there] = 0
        else:
            scores[index][there] = (z - z.mean()) / z.std(ddof=1)
    return scores


def sparse_forward_kl(student, teacher, *, temperature=1.0, tail=True):
    """T^2 KL over the K kept outcomes and, with a tail, everything else as one more."""
    student = np.asarray(student, np.float64)
    values = np.empty(student.shape[:-1])
    for index in np.ndindex(values.shape):
        ids = [int(i) for i in np.asarray(teacher.ids)[index]]
        log_p = list(np.asarray(teacher.log_probs, np.float64)[index])
        q = softmax(student[index])
        log_q = list(log_softmax(student[index])[ids])
        others = [c for c in range(len(q)) if c not in ids]
        if tail and others:
            rest = 1 - math.fsum(np.exp(log_p))
            log_p.append(float(log(rest)) if rest > 1e-12 else -np.inf)
            log_q.append(float(log(math.fsum(q[others]))))
        values[index] = forward_kl(log_q, log_p, temperature=temperature)
    return values


# Features


def hint_mse(student, teacher):
    """Romero et al. 2015 (FitNets), equation 3, as a mean over the elements."""
    return each_row(lambda s, t: ((s - t) ** 2).mean(), student, teacher)


def cosine_distance(student, teacher):
    """Sanh et al. 2019 (DistilBERT), section 3: 1 - cos."""
    return each_row(lambda s, t: 1 - cosine(s, t), student, teacher)


def pool(x, height, width):
    """torch's adaptive_avg_pool2d of one [H, W, C]: windows from floor to ceil."""
    pooled = np.empty((height, width, x.shape[2]))
    for i, j in np.ndindex(height, width):
        top, bottom = i * x.shape[0] // height, -(-(i + 1) * x.shape[0] // height)
        left, right = j * x.shape[1] // width, -(-(j + 1) * x.shape[1] // width)
        pooled[i, j] = x[top:bottom, left:right].mean((0, 1))
    return pooled


def same_size(student, teacher):
    """Pairs of float64 `[H, W, C]`, one an example, pooled to the smaller size."""
    height = min(student.shape[1], teacher.shape[1])
    width = min(student.shape[2], teacher.shape[2])
    return [
        tuple(pool(np.asarray(x, np.float64), height, width) for x in pair)
        for pair in zip(student, teacher, strict=True)
    ]


def attention_transfer(student, teacher, *, power=2):
    """Zagoruyko & Komodakis 2017, equation 2 squared, as a mean over positions."""
    values = []
    for pair in same_size(student, teacher):
        s, t = (unit((abs(x) ** power).mean(-1).ravel()) for x in pair)
        values.append(((s - t) ** 2).mean())
    return np.array(values)


def neuron_selectivity(student, teacher):
    """Huang & Wang 2017 (NST): squared MMD of unit channel maps, kernel (x.y)^2."""

    def mean_kernel(xs, ys):
        return np.mean([[(x @ y) ** 2 for y in ys] for x in xs])

    values = []
    for pair in same_size(student, teacher):
        s, t = ([unit(x[:, :, c].ravel()) for c in range(x.shape[2])] for x in pair)
        mmd = mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
        values.append(mmd)
    return np.array(values)


def patient_mse(student, teacher):
    """Sun et al. 2019 (patient KD), equation 7, as a mean over the elements."""
    return each_row(lambda s, t: ((unit(s) - unit(t)) ** 2).mean(), student, teacher)


# Attention


def attention_mse(student, teacher, mask=None, mean_heads=False):
    """Jiao et al. 2020 (TinyBERT), equation 7, over the keys that are real."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    if mean_heads:
        student, teacher = (
            np.stack([np.mean(list(row), 0)[None] for row in x])
            for x in (student, teacher)
        )
    batch, heads, queries, keys = student.shape
    values = np.zeros((batch, queries))
    for b, i in np.ndindex(batch, queries):
        kept = real(None if mask is None else mask[b], keys)
        gaps = [
            (student[b, h, i, j] - teacher[b, h, i, j]) ** 2
            for h in range(heads)
            for j in kept
        ]
        values[b, i] = np.mean(gaps) if gaps else 0
    return values


def attention_kl(student, teacher, mask=None, mean_heads=False):
    """Wang et al. 2020 (MiniLM), attention transfer: KL of attention probabilities."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    if mean_heads:
        student, teacher = (
            np.stack([np.mean(list(row), 0)[None] for row in x])
            for x in (student, teacher)
        )
    batch, heads, queries, keys = student.shape
    values = np.zeros((batch, queries))
    for b, i in np.ndindex(batch, queries):
        kept = real(None if mask is None else mask[b], keys)
        gaps = [
            kl(log(teacher[b, h, i, kept]), log(student[b, h, i, kept]))
            for h in range(heads)
        ]
        values[b, i] = np.mean(gaps)
    return values


def relation_kl(student, teacher, mask=None, *, heads):
    """Wang et al. 2021 (MiniLMv2), section 3.1: KL of softmax(X X^T / sqrt(d))."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    batch, length, _ = student.shape
    values = np.zeros((batch, length))
    for b in range(batch):
        kept = real(None if mask is None else mask[b], length)
        for i in kept:
            for h in range(heads):
                log_r = []
                for x in (teacher[b], student[b]):
                    d = x.shape[1] // heads
                    head = x[:, h * d : (h + 1) * d]
                    scores = [head[i] @ head[j] / math.sqrt(d) for j in kept]
                    log_r.append(log_softmax(scores))
                values[b, i] += kl(*log_r) / heads
    return values


# Relations between the examples of a batch


def relational_distance(student, teacher, mask=None):
    """Park et al. 2019 (RKD), section 3.2.1: distances over their mean, Huber."""
    kept = real(mask, len(student))
    pairs = list(itertools.permutations(range(len(kept)), 2))
    psi = []
    for x in (vectors(student, kept), vectors(teacher, kept)):
        distance = {(i, j): math.sqrt(((x[i] - x[j]) ** 2).sum()) for i, j in pairs}
        mu = np.mean(list(distance.values())) if pairs else 0
        psi.append({pair: distance[pair] / mu if mu > 0 else 0.0 for pair in pairs})
    values = np.zeros(len(kept))
    for i, j in pairs:
        values[i] += huber(psi[1][i, j] - psi[0][i, j]) / (len(kept) - 1)
    return at_kept(values, kept, len(student))


def relational_angle(student, teacher, mask=None):
    """Park et al. 2019 (RKD), section 3.2.2: the angle at j of i, j, k, Huber."""
    kept = real(mask, len(student))
    s, t = vectors(student, kept), vectors(teacher, kept)
    n = len(kept)
    values = np.zeros(n)
    for i, j, k in itertools.permutations(range(n), 3):
        gap = cosine(t[i] - t[j], t[k] - t[j]) - cosine(s[i] - s[j], s[k] - s[j])
        values[j] += huber(gap) / ((n - 1) * (n - 2))
    return at_kept(values, kept, len(student))


def similarity_preserving(student, teacher, mask=None):
    """Tung & Mori 2019 (SP), section 3: rows of Q Q^T, l2-normalised."""
    kept = real(mask, len(student))
    s, t = vectors(student, kept), vectors(teacher, kept)
    n = len(kept)
    values = []
    for i in range(n):
        g_s = unit(np.array([s[i] @ s[j] for j in range(n)]))
        g_t = unit(np.array([t[i] @ t[j] for j in range(n)]))
        values.append(((g_t - g_s) ** 2).sum() / n)
    return at_kept(values, kept, len(student))


def probabilistic_transfer(student, teacher, mask=None):
    """Passalis & Tefas 2018 (PKT), section 3: cosine kernel, p of j given i, j != i."""
    kept = real(mask, len(student))

    def log_conditional(x, i):
        k = [(cosine(x[i], x[j]) + 1) / 2 for j in range(len(x)) if j != i]
        k = np.maximum(k, 0)  # rounding may push a cosine of -1 a little below
        return log(k / k.sum() if k.sum() > 0 else k)

    s, t = vectors(student, kept), vectors(teacher, kept)
    values = [kl(log_conditional(t, i), log_conditional(s, i)) for i in range(len(s))]
    return at_kept(values, kept, len(student))


def correlation_congruence(student, teacher, mask=None, *, gamma=0.4, order=2):
    """Peng et al. 2019 (CC), the Gaussian kernel's Taylor expansion on unit rows."""
    kept = real(mask, len(student))
    n = len(kept)

    def kernel(x, y):
        return sum(
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * (x @ y) ** p
            for p in range(order + 1)
        )

    s, t = ([unit(row) for row in vectors(x, kept)] for x in (student, teacher))
    values = [
        sum((kernel(t[i], t[j]) - kernel(s[i], s[j])) ** 2 for j in range(n)) / n
        for i in range(n)
    ]
    return at_kept(values, kept, len(student))


def linear_cka(student, teacher, mask=None):
    """Kornblith et al. 2019, equations 3 and 4: 1 - CKA, HSIC(K, L) = tr(K H L H)."""
    kept = real(mask, len(student))
    n = len(kept)
    h = np.eye(n) - np.ones((n, n)) / max(n, 1)

    def hsic(x, y):
        return np.trace(x @ x.T @ h @ y @ y.T @ h)

    # Moving the rows to the first one changes nothing but makes equal rows exactly 0.
    s, t = (x - x[:1] for x in (vectors(student, kept), vectors(teacher, kept)))
    scale = math.sqrt(max(hsic(s, s), 0) * max(hsic(t, t), 0))
    cka = hsic(s, t) / scale if scale > 0 else 0.0
    return at_kept(np.full(n, 1 - cka), kept, len(student))


def contrastive(
    student,
    teacher,
    labels=None,
    mask=None,
    *,
    bank=None,
    bank_labels=None,
    dataset_size=None,
    temperature=0.1,
):
    """Tian et al. 2020 (CRD), equations 18 and 19: NCE critic, the student anchors."""
    kept = real(mask, len(student))
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    values = []
    for i in kept:
        if bank is None:
            negatives = [
                teacher[j]
                for j in kept
                if j != i and (labels is None or labels[j] != labels[i])
            ]
        else:
            known = labels is not None and bank_labels is not None
            negatives = [
                np.asarray(bank[k], np.float64)
                for k in range(len(bank))
                if not known or bank_labels[k] != labels[i]
            ]
        ratio = 1.0 if dataset_size is None else len(negatives) / dataset_size
        critic = math.exp(cosine(teacher[i], student[i]) / temperature)
        value = -math.log(critic / (critic + ratio))
        for negative in negatives:
            critic = math.exp(cosine(negative, student[i]) / temperature)
            value -= math.log(ratio / (critic + ratio))  # 1 - h
        values.append(value)
    return at_kept(values, kept, len(student))


# Sequences


def shift_tokens(logits, tokens, mask):
    """Position l reads token l and predicts token l + 1: both must be real."""
    logits, tokens, mask = np.asarray(logits), np.asarray(tokens), np.asarray(mask)
    both = np.zeros((mask.shape[0], mask.shape[1] - 1), mask.dtype)
    for b, i in np.ndindex(both.shape):
        both[b, i] = 1 if mask[b, i] and mask[b, i + 1] else 0
    return logits[:, :-1], tokens[:, 1:], both


def real_sequences(student, labels, frame_mask, label_mask):
    """`(frame probabilities [T, V], list of labels)` of every example, unmasked."""
    for b in range(len(student)):
        x = np.asarray(student[b], np.float64)
        frames = real(None if frame_mask is None else frame_mask[b], len(x))
        places = real(None if label_mask is None else label_mask[b], len(labels[b]))
        yield softmax(x[frames]), [int(labels[b][n]) for n in places]


def ctc(student, labels, frame_mask=None, label_mask=None, *, blank=0):
    """Graves et al. 2006, equations 5 to 8: the forward recursion, in probabilities."""
    values = []
    for y, label in real_sequences(student, labels, frame_mask, label_mask):
        # Blanks around every label; alpha[s]: all paths that end at s.
        states = [blank]
        for one in label:
            states += [one, blank]
        # Before the first frame: a virtual state that may step to states 0 and 1.
        alpha, started = np.zeros(len(states)), False
        for frame in y:
            new = np.zeros(len(states))
            for s, symbol in enumerate(states):
                if not started:
                    arriving = 1.0 if s < 2 else 0.0
                else:
                    arriving = alpha[s] + (alpha[s - 1] if s >= 1 else 0)
                    if s >= 2 and symbol != blank and symbol != states[s - 2]:
                        arriving += alpha[s - 2]
                new[s] = arriving * frame[symbol]
            alpha, started = new, True
        if started:
            total = alpha[-1] + (alpha[-2] if label else 0)
        else:
            total = 0.0 if label else 1.0
        values.append(-log(total))
    return np.array(values)


def ctc_by_enumeration(student, labels, frame_mask=None, label_mask=None, *, blank=0):
    """Graves et al. 2006, equation 3: the sum over every path that collapses to it."""
    values = []
    for y, label in real_sequences(student, labels, frame_mask, label_mask):
        total = 0.0
        for path in itertools.product(range(y.shape[1]), repeat=len(y)):
            merged = [symbol for symbol, _ in itertools.groupby(path)]
            if [symbol for symbol in merged if symbol != blank] == label:
                total += math.prod(y[t][symbol] for t, symbol in enumerate(path))
        values.append(-log(total))
    return np.array(values)


def frame_kl(student, teacher, *, temperature=1.0):
    """Hinton et al. 2015 per frame; a slower student learns the mean of r frames."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    batch, frames, _ = student.shape
    ratio = teacher.shape[1] // frames
    values = np.empty((batch, frames))
    for b, i in np.ndindex(batch, frames):
        group = teacher[b, ratio * i : ratio * (i + 1)]
        p = np.mean([softmax(frame / temperature) for frame in group], 0)
        log_q = log_softmax(student[b, i] / temperature)
        values[b, i] = temperature**2 * kl(log(p), log_q)
    return values


# The same in PyTorch, as public code has them. Each says how it relates to ours.


def torch_cross_entropy(torch, student, labels, *, label_smoothing=0.0):
    """`F.cross_entropy`, no reduction: ours."""
    return torch.nn.functional.cross_entropy(
        student.reshape(-1, student.shape[-1]),
        labels.reshape(-1).long(),
        label_smoothing=label_smoothing,
        reduction="none",
    ).reshape(labels.shape)


def torch_forward_kl(torch, student, teacher, *, temperature=1.0):
    """`F.kl_div` summed over classes, times T^2: ours."""
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    gap = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return gap.sum(-1) * temperature**2


def torch_reverse_kl(torch, student, teacher, *, temperature=1.0):
    """`F.kl_div` the other way round, times T^2: ours."""
    return torch_forward_kl(torch, teacher, student, temperature=temperature)


def torch_soft_cross_entropy(torch, student, teacher, *, temperature=1.0):
    """`F.cross_entropy` with probabilities for targets, `[B, C]`, times T^2: ours."""
    p = torch.softmax(teacher / temperature, -1)
    value = torch.nn.functional.cross_entropy(
        student / temperature, p, reduction="none"
    )
    return value * temperature**2


def torch_generalized_jsd(torch, student, teacher, *, beta=0.5, temperature=1.0):
    """TRL's `generalized_jsd_loss`, summed over classes: ours without the T^2."""
    kl_div = torch.nn.functional.kl_div
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
    teachers = kl_div(log_m, log_p, reduction="none", log_target=True)
    students = kl_div(log_m, log_q, reduction="none", log_target=True)
    return (beta * teachers + (1 - beta) * students).sum(-1)


def torch_decoupled_kl(
    torch,
    student,
    teacher,
    labels,
    *,
    target_weight=1.0,
    nontarget_weight=8.0,
    temperature=1.0,
):
    """mdistiller's `dkd_loss` (the target taken out by -1000): the mean of ours."""
    F = torch.nn.functional
    target = F.one_hot(labels.long(), student.shape[1]).to(student.dtype)

    def two(logits):
        p = torch.softmax(logits / temperature, 1)
        return torch.stack([(p * target).sum(1), (p * (1 - target)).sum(1)], 1)

    s, t = (x / temperature - 1000.0 * target for x in (student, teacher))
    tckd = F.kl_div(two(student).log(), two(teacher), reduction="batchmean")
    nckd = F.kl_div(torch.log_softmax(s, 1), torch.softmax(t, 1), reduction="batchmean")
    return temperature**2 * (target_weight * tckd + nontarget_weight * nckd)


def torch_dist(
    torch, student, teacher, *, inter_weight=1.0, intra_weight=1.0, temperature=1.0
):
    """DIST_KD's `DIST` (1e-8 added to the norms' product): the mean of ours."""

    def gap(x, y):
        x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
        return 1 - ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()

    q, p = (torch.softmax(x / temperature, 1) for x in (student, teacher))
    value = inter_weight * gap(q, p) + intra_weight * gap(q.T, p.T)
    return temperature**2 * value


def torch_standardize(torch, logits):
    """logit-standardization-KD's `normalize` (1e-7 added to the deviation): ours."""
    return (logits - logits.mean(-1, keepdim=True)) / (
        1e-7 + logits.std(-1, keepdim=True)
    )


def torch_hint_mse(torch, student, teacher):
    """RepDistiller's `HintLoss`, `nn.MSELoss`: the mean of ours."""
    return torch.nn.functional.mse_loss(student, teacher)


def torch_cosine_distance(torch, student, teacher):
    """DistilBERT's `CosineEmbeddingLoss`, targets 1, `[B, D]`: the mean of ours."""
    ones = torch.ones(len(student), dtype=student.dtype)
    return torch.nn.functional.cosine_embedding_loss(student, teacher, ones)


def torch_patient_mse(torch, student, teacher):
    """PKD's patience loss, the MSE of normalised vectors: the mean of ours."""
    F = torch.nn.functional
    return F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))


def torch_same_size(torch, student, teacher):
    """RepDistiller's pooling of NCHW features: square, the height decides."""
    shrink = torch.nn.functional.adaptive_avg_pool2d
    if student.shape[2] > teacher.shape[2]:
        return shrink(student, (teacher.shape[2],) * 2), teacher
    if student.shape[2] < teacher.shape[2]:
        return student, shrink(teacher, (student.shape[2],) * 2)
    return student, teacher


def torch_attention_transfer(torch, student, teacher, *, power=2):
    """RepDistiller's `Attention` on NCHW, even powers: the mean of ours."""
    s, t = (
        torch.nn.functional.normalize(x.pow(power).mean(1).flatten(1))
        for x in torch_same_size(torch, student, teacher)
    )
    return (s - t).pow(2).mean()


def torch_neuron_selectivity(torch, student, teacher):
    """RepDistiller's `NSTLoss` on NCHW: the mean of ours."""
    s, t = (
        torch.nn.functional.normalize(x.flatten(2), dim=2)
        for x in torch_same_size(torch, student, teacher)
    )

    def mean_kernel(x, y):
        return torch.einsum("bcx,bdx->bcd", x, y).pow(2).mean()

    return mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)


def torch_attention_mse(torch, student, teacher):
    """TinyBERT's: scores up to -100 become 0. The mean of ours times real keys / S."""
    s, t = (torch.where(x <= -1e2, torch.zeros_like(x), x) for x in (student, teacher))
    return torch.nn.functional.mse_loss(s, t)


def torch_relational_distance(torch, student, teacher):
    """RepDistiller's `RKDLoss`, loss_d: over B x B, (B-1)/B of our mean."""

    def psi(x):
        distance = (x[:, None] - x[None]).norm(dim=2)
        return distance / distance[distance > 0].mean()

    s, t = (x.flatten(1) for x in (student, teacher))
    return torch.nn.functional.smooth_l1_loss(psi(s), psi(t))


def torch_relational_angle(torch, student, teacher):
    """RepDistiller's `RKDLoss`, loss_a: over B^3, (B-1)(B-2)/B^2 of our mean."""

    def cosines(x):
        sides = torch.nn.functional.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(sides, sides.transpose(1, 2))

    s, t = (x.flatten(1) for x in (student, teacher))
    return torch.nn.functional.smooth_l1_loss(cosines(s), cosines(t))


def torch_similarity_preserving(torch, student, teacher):
    """RepDistiller's `Similarity`: over B x B, the mean of ours."""
    s, t = (
        torch.nn.functional.normalize(x.flatten(1) @ x.flatten(1).T)
        for x in (student, teacher)
    )
    return (t - s).pow(2).sum() / len(student) ** 2


def torch_probabilistic_transfer(torch, student, teacher, *, itself=True):
    """The authors' `PKT` (eps 1e-7): counts j = i too, so no multiple of ours.

    `itself=False` leaves j = i out, as the paper does: the mean over B x B is then our
    mean over B divided by B.
    """
    eps = 1e-7

    def conditional(x):
        x = x / (x.norm(dim=1, keepdim=True) + eps)
        k = (x @ x.T + 1) / 2
        if not itself:
            k = k * (1 - torch.eye(len(k), dtype=k.dtype))
        return k / k.sum(1, keepdim=True)

    q, p = conditional(student), conditional(teacher)
    return (p * torch.log((p + eps) / (q + eps))).mean()


def torch_correlation_congruence(torch, student, teacher, *, gamma=0.4, order=2):
    """Knowledge-Distillation-Zoo's `CC`: MSE over B x B, the mean of ours."""

    def kernel(x):
        x = torch.nn.functional.normalize(x.flatten(1))
        return math.exp(-2 * gamma) * sum(
            (2 * gamma) ** p / math.factorial(p) * (x @ x.T) ** p
            for p in range(order + 1)
        )

    return torch.nn.functional.mse_loss(kernel(student), kernel(teacher))


def torch_contrastive(torch, student, teacher, *, bank, dataset_size, temperature=0.1):
    """RepDistiller's `ContrastLoss`, one side, Z = 1, eps 1e-7: the mean of ours."""
    s, t, negatives = (
        torch.nn.functional.normalize(x, dim=1) for x in (student, teacher, bank)
    )
    positive = torch.exp((s * t).sum(1) / temperature)
    negative = torch.exp(s @ negatives.T / temperature)
    noise = len(bank) / dataset_size
    hits = torch.log(positive / (positive + noise + 1e-7))
    rejections = torch.log(noise / (negative + noise + 1e-7))
    return -(hits.sum() + rejections.sum()) / len(student)


def torch_ctc(torch, student, labels, frame_mask, label_mask, *, blank=0):
    """`F.ctc_loss`, no reduction, masks that pad on the right: ours."""
    return torch.nn.functional.ctc_loss(
        torch.log_softmax(student, -1).transpose(0, 1),
        labels.long(),
        frame_mask.long().sum(1),
        label_mask.long().sum(1),
        blank=blank,
        reduction="none",
    )
