"""Hard sharing for texts: one encoder for all tasks (a TextCNN or a Hugging Face model), one head per task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.classification.vectors import PADDING, TYPE
from counterpoise.language.dtypes import why_unusable

OUTPUTS = 3
"""Of the layer that is taken off a Hugging Face model: a size that no other layer has."""


@dataclass(frozen=True)
class Design:
    """What a model is built from, apart from its weights.

    Attributes:
        model: `textcnn`, or where a Hugging Face encoder came from.
        width: filters per kernel size of a TextCNN.
        kernels: kernel sizes of a TextCNN, odd.
        dropout: share of the features dropped in training before the heads.
        max_tokens: longer texts are cut.
        freeze_vectors: word vectors stay as they start.
        pooling: how a Hugging Face model comes to one vector a text: by the `own` head of its class for sequence
            classification, up to that head's last layer, or as the `mean` of its last states. `build_classifier` decides:
            own, unless there is no such class, or it needs a decoder.
    """

    model: str = "textcnn"
    width: int = 100
    kernels: tuple[int, ...] = (3, 5, 7)
    dropout: float = 0.5
    max_tokens: int = 256
    freeze_vectors: bool = False
    pooling: Literal["own", "mean"] = "mean"

    def __post_init__(self) -> None:
        if not self.kernels or any(k < 1 or k % 2 == 0 for k in self.kernels):
            raise ValueError(f"kernels: expected odd sizes, found {self.kernels}: an even one has no middle")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a share in [0, 1), found {self.dropout}")
        if min(self.width, self.max_tokens) < 1:
            raise ValueError(f"expected width and max_tokens of at least 1, found {self.width} and {self.max_tokens}")

    @property
    def takes_words(self) -> bool:
        """Whether it reads word vectors; otherwise a Hugging Face tokenizer's tokens."""
        return self.model == "textcnn"


class Encoder(nn.Module):
    """Token ids (B, T) and which of them are tokens (B, T) in, features (B, `features`) out."""

    features: int
    bias: bool = True
    """Whether heads on it have one."""

    def last_shared(self) -> list[Tensor]:
        """The weights nearest to the heads, which GradNorm looks at."""
        raise NotImplementedError


class TextCNN(Encoder):
    """The largest response of each filter over a text, of several widths in parallel (Kim: Convolutional Neural
    Networks for Sentence Classification, EMNLP 2014).

    Responses centred on padding are left out, so that a text's features do not depend on the texts beside it.

    Examples:
        >>> encoder = TextCNN(torch.zeros(9, 4), width=5)
        >>> encoder(torch.tensor([[2, 3, 0]]), torch.tensor([[True, True, False]])).shape
        torch.Size([1, 15])
    """

    def __init__(
        self, table_VD: Tensor, *, width: int = 100, kernels: Sequence[int] = (3, 5, 7), frozen: bool = False
    ) -> None:
        super().__init__()
        self.embedding = _embedding(table_VD, frozen)
        d = table_VD.shape[1]
        self.convolutions = nn.ModuleList(nn.Conv1d(d, width, k, padding=k // 2) for k in kernels)
        self.features = width * len(kernels)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Features, (B, width * kernels)."""
        x_BDT = self.embedding(ids_BT).transpose(1, 2)
        padding_B1T = ~mask_BT.unsqueeze(1)
        responses = (F.relu(c(x_BDT)).masked_fill(padding_B1T, 0.0) for c in self.convolutions)
        return torch.cat([r_BWT.amax(dim=2) for r_BWT in responses], dim=1)

    def last_shared(self) -> list[Tensor]:
        return [p for p in self.convolutions.parameters() if p.requires_grad]


class Pretrained(Encoder):
    """A Hugging Face model and one vector of it a text, see `Design.pooling`.

    Args:
        model: what `AutoModelForSequenceClassification` gives, whose last layer is taken off; or what `AutoModel` gives,
            of an encoder-decoder the encoder: the mean of its last hidden states over the tokens of a text.
        padding: the token that fills batches.
    """

    def __init__(self, model: nn.Module, padding: int = 0) -> None:
        super().__init__()
        whole: Any = model
        self.config: Any = whole.config  # of the whole: an encoder-decoder's encoder has another
        self.head = head_of(model)
        self.model: Any = whole
        self.layers = int(self.config.num_hidden_layers)
        if self.head is None:
            self.model = whole.get_encoder() if getattr(self.config, "is_encoder_decoder", False) else whole
            self.features = int(self.config.hidden_size)
            return
        last = whole.get_submodule(self.head)
        self.features, self.bias = last.in_features, last.bias is not None
        whole.set_submodule(self.head, nn.Identity())
        if self.config.pad_token_id is None:
            self.config.pad_token_id = padding  # a decoder's class finds the last token by it

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Features, (B, F)."""
        types_BT, ids_BT = ids_BT // TYPE, ids_BT % TYPE
        types = {"token_type_ids": types_BT} if bool(types_BT.any()) else {}
        found = self.model(input_ids=ids_BT, attention_mask=mask_BT.long(), **types)
        if self.head is not None:
            return found.logits  # type: ignore[no-any-return]
        mask_BT1 = mask_BT.unsqueeze(2).to(found.last_hidden_state.dtype)
        return (found.last_hidden_state * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)  # type: ignore[no-any-return]

    def last_shared(self) -> list[Tensor]:
        """The last layer's weights; all, when there is no list of layers."""
        stacks = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.layers]
        last = stacks[-1][-1] if stacks else self.model
        return [p for p in last.parameters() if p.requires_grad]


class HardSharing(nn.Module):
    """An encoder that all tasks share and a linear head for each.

    Args:
        encoder: what the tasks share.
        classes: how many classes each task has.
        dropout: see `Design`.

    Examples:
        >>> model = HardSharing(TextCNN(torch.zeros(9, 4), width=5), [2, 3]).eval()
        >>> features_BF = model.encoder(torch.tensor([[2, 3]]), torch.tensor([[True, True]]))
        >>> model.logits(features_BF, 1).shape
        torch.Size([1, 3])
    """

    def __init__(self, encoder: Encoder, classes: Sequence[int], *, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(encoder.features, c, bias=encoder.bias) for c in classes)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The shared features, (B, F), with dropout in training."""
        return self.dropout(self.encoder(ids_BT, mask_BT))  # type: ignore[no-any-return]

    def logits(self, features_BF: Tensor, task: int) -> Tensor:
        """One task's logits, (B, classes)."""
        return self.heads[task](features_BF)  # type: ignore[no-any-return]

    def shared(self) -> list[Tensor]:
        """The trained parameters that all tasks share."""
        return [p for p in self.encoder.parameters() if p.requires_grad]


def head_of(model: nn.Module) -> str | None:
    """The name of the last layer of a model for sequence classification; None: it has none, or it is not a linear one."""
    if "ForSequenceClassification" not in type(model).__name__:
        return None
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == OUTPUTS]
    return found[-1] if found else None


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Torch's generators start from `seed` inside the block and go on as they were after it."""
    forked = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        yield


def check_device(name: str) -> None:
    """Raise a ValueError where there is no device of that name."""
    if why := why_unusable(name):
        raise ValueError(f"device: expected cpu or a device that torch finds here, found {name!r} ({why})")


def build_encoder(design: Design, table_VD: Tensor) -> Encoder:
    """The word model of a design, over these starting vectors."""
    return TextCNN(table_VD, width=design.width, kernels=design.kernels, frozen=design.freeze_vectors)


def _embedding(table_VD: Tensor, frozen: bool) -> nn.Embedding:
    v, d = table_VD.shape
    embedding = nn.Embedding(v, d, padding_idx=PADDING, _weight=table_VD.clone())
    return embedding.requires_grad_(not frozen)
