# SPDX-License-Identifier: Apache-2.0
"""A study's examples with a teacher's outputs beside them, computed once."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from etils import epath

from jaxdistill.data.augment import Augment
from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.teachers import fingerprints, store
from jaxdistill.teachers.knowledge import unwrap
from jaxdistill.teachers.views import View


@dataclass
class TeacherStores:
    """The stores of one run; the last one read stays in memory.

    Attributes:
      partitioner: how the steps run that read them.
      folder: for stores, one for each teacher, data set and batch shape.
      compute: what the steps compute in, see `manifest.Manifest`.
      bucket_lengths: lengths that batches of texts are cut to, likewise.
      progress: whether to show bars.
    """

    partitioner: Partitioner
    folder: epath.Path
    compute: Any
    bucket_lengths: tuple[int, ...]
    progress: bool
    _last: tuple[Any, Any, Any] = (None, None, None)

    def of(
        self,
        examples: Mapping[str, Any],
        teacher: Any,
        batch_size: int,
        *,
        augment: Augment | None = None,
        views: int = 1,
        top_k: int | None = None,
    ) -> dict[str, Any]:
        """The examples with a placed teacher's outputs, from disk if they are there.

        They are computed as in a step on `batch_size` examples, split over the run's
        devices and in its precision, and so are equal to the live teacher's; where
        batches are cut they differ by rounding.

        Args:
          examples: the same object again is asked of the disk once, unless its inputs
            have changed.
          teacher: of one set of logits, not an ensemble.
          batch_size: of the step.
          augment: the augmentation of the views, None for the examples as they are.
          views: of each example, to be seen again with `augment.replay`.
          top_k: how many classes are kept, None for all.
        """
        teacher = self.partitioner.fetch(teacher)
        # What does not divide is split in no way that is known here.
        devices = math.gcd(batch_size, len(self.partitioner.devices))
        model = fingerprints.of_model(unwrap(teacher))
        name = f"{model[:16]}-{batch_size}-{devices}"
        if augment is not None:
            view = View.of(augment, 0, views, examples)
            digest = json.loads(view.program)["digest"]
            name = f"{name}-{views}-{digest[:8]}"
        if top_k is not None:
            name = f"{name}-top{top_k}"
        if self.bucket_lengths:
            name = f"{name}-cut{'-'.join(map(str, self.bucket_lengths))}"
        key = name, fingerprints.of_data(examples["inputs"])
        if self._last[0] != key or self._last[1] is not examples:
            manifest = store.describe(
                teacher,
                examples,
                data="this run's",
                split="train",
                transform="as the examples are",
                augment=augment,
                check_finite=False,
                views=views,
                top_k=top_k,
                batch_size=batch_size,
                devices=devices,
                bucket_lengths=self.bucket_lengths,
                compute=self.compute,
            )
            path = self.folder / f"{name}-{manifest.content[:16]}"
            options: dict[str, Any] = {"augment": augment, "progress": self.progress}
            store.write(path, teacher, examples, manifest, **options)
            # The first process finishes the store, and the others wait until then.
            processes.on_first(partial(store.check, path, manifest))
            merged = {**examples, "teacher": store.read(path, manifest)}
            self._last = (key, examples, merged)
        return self._last[2]
