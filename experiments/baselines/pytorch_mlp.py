# SPDX-License-Identifier: Apache-2.0
"""The PyTorch side of compare_pytorch: the script most articles print, and its best.

Nothing here knows of JAX. Three loops over the same networks and the same loss: as the
articles print it, tuned by hand, and the tuned one compiled.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where networks are loaded to, and batches go."""


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them; widths from the pixels to the classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def load(module: nn.Module, state_dict: dict[str, np.ndarray]) -> nn.Module:
    """The module with these weights, in their precision, on the device."""
    tensors = {key: torch.tensor(value) for key, value in state_dict.items()}
    module.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
    return module.to(DEVICE)


def make_loss(temperature: float, hard_weight: float, soft_weight: float) -> Loss:
    """The articles' loss, `(student logits, teacher logits, labels) -> scalar`.

    `hard CE + soft T^2 KL`, the KL's reduction being batchmean.
    """

    def loss(student, teacher, labels):
        soft = functional.kl_div(
            functional.log_softmax(student / temperature, dim=-1),
            functional.softmax(teacher / temperature, dim=-1),
            reduction="batchmean",
        )
        hard = functional.cross_entropy(student, labels)
        return hard_weight * hard + soft_weight * temperature**2 * soft

    return loss


class Images:
    """A data set as torchvision's MNIST with ToTensor and Normalize gives it.

    Torchvision is not needed, but its operations are all here, in their order: what an
    article's loop costs is for the most part what happens at each look at an image.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean, deviation, peak):
        self.images, self.labels = torch.tensor(images), torch.tensor(labels)
        self.mean, self.deviation, self.peak = (mean,), (deviation,), peak

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index], int(self.labels[index])
        return self.normalize(self.to_tensor(Image.fromarray(image.numpy()))), label

    def to_tensor(self, picture: Image.Image) -> torch.Tensor:
        """Bytes `[H, W]` to floats `[1, H, W]` in [0, 1]."""
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        channels = len(picture.getbands())
        pixels = pixels.view(picture.size[1], picture.size[0], channels)
        return pixels.permute((2, 0, 1)).contiguous().to(torch.float32).div(self.peak)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Subtract the mean, divide by the deviation, channel by channel."""
        pixels = pixels.clone()
        mean = torch.as_tensor(self.mean, dtype=pixels.dtype)
        deviation = torch.as_tensor(self.deviation, dtype=pixels.dtype)
        if (deviation == 0).any():
            raise ValueError(f"the deviation {self.deviation} has a 0")
        return pixels.sub_(mean.view(-1, 1, 1)).div_(deviation.view(-1, 1, 1))


def article(student, teacher, loss, images: Images, batch_size, learning_rate):
    """A function that trains the student for one epoch, as the articles print it.

    It returns the mean of the batches' losses.
    """
    loader: DataLoader = DataLoader(
        images,  # type: ignore[arg-type]  # has what a loader asks for
        batch_size=batch_size,
        shuffle=True,
        num_workers=0,
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)

    def epoch() -> float:
        student.train()
        teacher.eval()
        running = 0.0
        for images, labels in loader:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            optimizer.zero_grad()
            with torch.no_grad():
                targets = teacher(images)
            value = loss(student(images), targets, labels)
            value.backward()
            optimizer.step()
            running += value.item()
        return running / len(loader)

    return epoch


def tuned(student, teacher, loss, images, labels, batch_size, learning_rate, **options):
    """A function that trains for one epoch with all that makes eager PyTorch fast.

    The normalised images lie in memory, a batch is one gather, Adam is fused, and no
    loss is read before the epoch ends. Options: see `make_step`.
    """
    images = torch.tensor(images, device=DEVICE)
    labels = torch.tensor(labels, device=DEVICE).long()
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate, fused=True)
    step = make_step(student, teacher, loss, optimizer, **options)

    def epoch() -> float:
        order = torch.randperm(len(labels), device=DEVICE).split(batch_size)
        total = torch.zeros((), device=DEVICE)
        for index in order:
            total += step(images.index_select(0, index), labels.index_select(0, index))
        return total.item() / len(order)

    return epoch


def make_step(student, teacher, loss, optimizer, *, compiled: bool = False) -> Callable:
    """One optimizer step, `(images, labels) -> loss`.

    Args:
      student: trained, in training mode.
      teacher: not trained, in evaluation mode.
      loss: see `make_loss`.
      optimizer: of the student's parameters.
      compiled: put both forward passes, the loss and its gradient through
        torch.compile; a fused optimizer is one kernel already.
    """
    student.train()
    teacher.eval()

    def forward(images, labels):
        with torch.no_grad():
            targets = teacher(images)
        return loss(student(images), targets, labels)

    if compiled:
        forward = torch.compile(forward, dynamic=False)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = forward(images, labels)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def compiler_problem() -> str | None:
    """Why torch.compile does not work here, or None if it does."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(2, device=DEVICE))
    except Exception as error:  # whatever the compiler's search came upon
        return f"torch.compile does not work here: {type(error).__name__}"
    return None


def follow(student, teacher, loss, batches: Iterable, rates: Iterable) -> np.ndarray:
    """The loss of each Adam step over given batches of NumPy arrays, at given rates."""
    optimizer = torch.optim.Adam(student.parameters())
    step = make_step(student, teacher, loss, optimizer)
    losses = []
    for (images, labels), rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        batch = torch.tensor(images), torch.tensor(labels).long()
        losses.append(step(*(part.to(DEVICE) for part in batch)))
    return torch.stack(losses).cpu().numpy()


def set_adam(optimizer, model: nn.Module, count: int, first: dict, second: dict):
    """Give Adam the moments (by parameter name) that it has after `count` steps."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(count)),
            "exp_avg": torch.tensor(first[name], device=DEVICE),
            "exp_avg_sq": torch.tensor(second[name], device=DEVICE),
        }


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is at their label."""
    model.eval()
    with torch.no_grad():
        guess = model(torch.tensor(images, device=DEVICE)).argmax(-1).cpu()
    return float((guess == torch.tensor(labels)).double().mean())
