"""Texts as token ids, by the vocabulary of the training texts or a Hugging Face tokenizer; word vectors in GloVe's format."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from counterpoise.checkpoints.reading import byte_lines

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<pad>", "<unk>")
BETWEEN = "<sep>"
"""A word of its own between two texts; no text holds it, it would come apart."""
TYPE = 1 << 28
"""Above every token id: one int32 holds a token and its type."""

SPLITTING = 3
"""Version of how texts are split into words, which stands in a saved model."""

Text = str | tuple[str, str]
"""A text, or a pair of them."""

# As the Stanford tokeniser that GloVe's authors and FDU-MTL's used splits: do n't, it 's, `` and ''.
# Of scripts without blanks between words (Thai to Khmer, kana, Han) every character is a token; marks stay with letters.
_ALONE = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff\u200c\u200d"
_WORD = rf"(?:[^\W{_ALONE}]|[{_MARKS}])+"
_TOKEN = re.compile(
    rf"{_WORD}(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|``|--+|''|\.\.\.|[{_ALONE}]|{_WORD}(?:[-.]{_WORD})*|\S"
)


def tokenize(text: Text) -> list[str]:
    """Lower-case tokens in Unicode's NFC; texts already split that way come out as they are. `BETWEEN` stands between
    those of a pair.

    Examples:
        >>> tokenize("It's a well-kept book, isn't it?")
        ['it', "'s", 'a', 'well-kept', 'book', ',', 'is', "n't", 'it', '?']
        >>> tokenize("好书!")
        ['好', '书', '!']
    """
    if isinstance(text, str):
        return _TOKEN.findall(unicodedata.normalize("NFC", text.lower()))
    return [*tokenize(text[0]), BETWEEN, *tokenize(text[1])]


def splits_anew(word: str) -> bool:
    """Whether a word of a vocabulary is of a script, or written in a way, that was split otherwise before `SPLITTING`."""
    return re.search(f"[{_ALONE}{_MARKS}]", word) is not None


class Vocabulary:
    """Words with their numbers: 0 is padding, 1 any word that is not here.

    Examples:
        >>> Vocabulary(["good", "bad"]).encode("bad, good", max_tokens=8)
        [3, 1, 2]
    """

    padding = PADDING

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._number = {w: i for i, w in enumerate(self.words, start=len(SPECIAL))}
        if twice := sorted(w for w, n in Counter(self.words).items() if n > 1):
            raise ValueError(f"the words of a vocabulary must differ, found more than once: {twice[:5]}")

    def __len__(self) -> int:
        return len(self.words) + len(SPECIAL)

    def encode(self, text: Text, *, max_tokens: int) -> list[int]:
        """The numbers of the first `max_tokens` tokens; at least one, unknown for an empty text.

        Of a pair the longer text is cut until both fit.
        """
        words = tokenize(text)
        if not isinstance(text, str) and len(words) > max_tokens > 2:
            first, second = words[: words.index(BETWEEN)], words[words.index(BETWEEN) + 1 :]
            room = max_tokens - 1
            shorter = min(len(first), len(second), room // 2)
            kept = room - shorter if len(first) > len(second) else shorter
            words = [*first[:kept], BETWEEN, *second[: room - kept]]
        return [self._number.get(t, UNKNOWN) for t in words[:max_tokens]] or [UNKNOWN]


class SubwordTokens:
    """A Hugging Face tokenizer with the calls of a `Vocabulary`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = next(int(x) for x in fillers if x is not None)

    def encode(self, text: Text, *, max_tokens: int) -> list[int]:
        """The ids of the first `max_tokens` tokens, with the tokenizer's own first and last ones; at least one.

        Of a pair the longer text is cut until both fit. Where the tokenizer tells the second text by a type (BERT's
        does), its ids are shifted by `TYPE` times that.
        """
        # In lists, as an empty second text alone would count as none.
        pair = ([text],) if isinstance(text, str) else ([text[0]], [text[1]])
        found = self.tokenizer(*pair, truncation=True, max_length=max_tokens)
        ids: list[int] = found["input_ids"][0]
        if any(types := found.get("token_type_ids", [()])[0]):
            ids = [x + TYPE * kind for x, kind in zip(ids, types, strict=True)]
        return ids or [self.padding]


class TokenIds(NamedTuple):
    """N texts as ids padded on the right, (N, T) int32, and their lengths, (N,) on the CPU.

    Examples:
        >>> ids_BT, mask_BT = token_ids([[5, 6], [7], [8, 9, 4]], 0).batch(torch.tensor([1, 0]))
        >>> ids_BT.tolist(), mask_BT.tolist()
        ([[7, 0], [5, 6]], [[True, False], [True, True]])
    """

    ids_NT: Tensor
    lengths_N: Tensor

    def batch(self, chosen_B: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of the chosen texts, cut to the longest of them, (B, T) int64, and which are tokens, (B, T) bool."""
        device, lengths_B = self.ids_NT.device, self.lengths_N[chosen_B]
        ids_BT = self.ids_NT[chosen_B.to(device), : int(lengths_B.max())].long()
        return ids_BT, torch.arange(ids_BT.shape[1], device=device) < lengths_B.to(device)[:, None]


def token_ids(rows: Sequence[Sequence[int]], padding: int, device: torch.device | str = "cpu") -> TokenIds:
    """Rows of token ids, none of them empty, as one padded tensor."""
    lengths_N = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids_NT = torch.full((len(rows), max(map(len, rows), default=0)), padding, dtype=torch.int32)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return TokenIds(ids_NT.to(device), lengths_N)


class WordVectors(NamedTuple):
    """A vocabulary, its vectors, (V, D) float32, and how many of its words the file knew."""

    vocabulary: Vocabulary
    table_VD: Tensor
    found: int


def word_vectors(
    texts: Iterable[Text],
    file: str | Path | None = None,
    *,
    dimension: int = 100,
    min_count: int = 2,
    max_words: int = 100_000,
    seed: int = 0,
) -> WordVectors:
    """The vocabulary of the training texts with its starting vectors.

    A word is kept when it occurs `min_count` times or the file knows it. A word without a vector starts normally
    distributed with the file's spread (0.1 without a file), unknown starts as the mean of the vectors, padding is 0
    and stays it.

    Args:
        texts: the training texts, and no others.
        file: in GloVe's or word2vec's text format, plain or .gz; None: no pretrained vectors.
        dimension: of the vectors when there is no file.
        min_count: how often a word without a vector must occur.
        max_words: the most words kept, the most frequent first.
        seed: of the vectors that the file does not give.

    Raises:
        ValueError: an unreadable file, or one that knows no word of the texts; no word that occurs often enough.
    """
    counts = Counter(token for text in texts for token in tokenize(text))
    known = {} if file is None else read_vectors(file, counts)
    if file is not None and not known:
        raise ValueError(f"{file}: expected vectors of words in the texts, found none of their {len(counts)} words")
    ranked = sorted(counts, key=lambda w: (-counts[w], w))
    words = [w for w in ranked if w in known or counts[w] >= min_count][:max_words]
    if not words:
        raise ValueError(
            f"texts: expected words that occur {min_count} times in training, found none among {len(counts)}; add texts, or "
            "word vectors that know them, or take a Hugging Face encoder, which reads parts of words"
        )
    if (share := sum(counts[w] for w in words) / counts.total()) < 0.5:
        warnings.warn(
            f"the vocabulary holds {100 * share:.0f} % of the words of training, as the others occur less than {min_count} "
            "times; word vectors or a Hugging Face encoder would read more of the texts",
            stacklevel=3,
        )
    pretrained = np.stack(list(known.values())) if known else np.zeros((0, dimension), np.float32)
    spread = float(pretrained.std()) if known else 0.1
    random = torch.Generator().manual_seed(seed)
    table_VD = spread * torch.randn(len(words) + len(SPECIAL), pretrained.shape[1], generator=random)
    for row, word in enumerate(words, start=len(SPECIAL)):
        if word in known:
            table_VD[row] = torch.from_numpy(known[word])
    table_VD[PADDING] = 0.0
    if known:
        table_VD[UNKNOWN] = torch.from_numpy(pretrained.mean(axis=0))
    return WordVectors(Vocabulary(words), table_VD, sum(w in known for w in words))


def read_vectors(file: str | Path, words: Collection[str]) -> dict[str, np.ndarray]:
    """The vectors of those of `words` that a text file in GloVe's format holds, float32.

    A line is a word and its numbers, separated by spaces; the first line of word2vec's format (how many, dimension) is
    passed over. The file is read once, line by line.

    Raises:
        ValueError: no such file, a damaged gzip file, a line with another number of numbers, or no numbers.
    """
    found: dict[str, np.ndarray] = {}
    dimension = 0
    for number, line in enumerate(_lines(Path(file).expanduser()), start=1):
        fields = line.rstrip().split(" ")
        if number == 1 and len(fields) == 2 and all(f.isdecimal() for f in fields):
            continue
        dimension = dimension or len(fields) - 1
        word = " ".join(fields[:-dimension]) if dimension else ""  # GloVe 840B holds words with spaces
        if not word:
            raise ValueError(
                f"{file}, line {number}: expected a word and {dimension or 'its'} numbers, found {line[:60]!r}; "
                f"is it a file in GloVe's text format?"
            )
        if word in words and word not in found:
            found[word] = _numbers(fields[-dimension:], f"{file}, line {number}")
    if not dimension:
        raise ValueError(f"{file}: expected lines of a word and its numbers, found an empty file")
    return found


def _numbers(fields: list[str], where: str) -> np.ndarray:
    try:
        values = np.array(fields, dtype=np.float32)
    except ValueError:
        raise ValueError(f"{where}: expected {len(fields)} numbers after the word, found {fields[:3]}...") from None
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: expected finite numbers, found {values[~np.isfinite(values)][0]}")
    return values


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of word vectors, found {'a folder' if path.is_dir() else 'nothing'}")
    for content in byte_lines(path):
        yield content.decode("utf-8", errors="replace")
