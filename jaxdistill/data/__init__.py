# SPDX-License-Identifier: Apache-2.0
"""Data sets, batches and streams, as NumPy arrays on the host.

`images`       image data sets by name, and what their pixels are
`image_files`  their original files: IDX, CIFAR's binaries
`texts`        labelled texts: SST-2, AG News
`corpus`       running texts for language models, and their vocabulary
`fetch`        where files are: a folder, a prepared copy, TFDS
`examples`     what examples must be; `DataError`
`batches`      which examples go into which batch
`stream`       batches read ahead by worker processes
`augment`, `tokens`   what changes a batch on the device, with jax: import them by name

`import jaxdistill.data` loads no jax: the last two are not loaded with the folder.
"""

from jaxdistill.data.batches import Batches, Orders, pad
from jaxdistill.data.corpus import Corpus, Vocabulary, load_corpus, windows
from jaxdistill.data.examples import (
    DataError,
    check_examples,
    check_inputs,
    check_labels,
    normalize,
)
from jaxdistill.data.images import Dataset, holdout, load
from jaxdistill.data.stream import Stream
from jaxdistill.data.texts import Labelled, Texts, load_texts
