"""The whole story in two minutes: a miniature world, a model that learns it, RSF that makes it forget, restore.

Nothing is downloaded and nothing is faked: a small Llama is trained from scratch on skills invented for the seed, and
then goes through the same `rsf` and `restore` as a real checkpoint.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from counterpoise.alignment.rsf import Iteration, fine_tune, rsf
from counterpoise.alignment.settings import RSF, Settings
from counterpoise.checkpoints.files import refuse_occupied
from counterpoise.evaluation.panel import Panel
from counterpoise.evaluation.parts import part_of
from counterpoise.language.loading import without_bars
from counterpoise.language.prompts import Prompt
from counterpoise.language.sampling import Drawing
from counterpoise.language.scoring import Example
from counterpoise.records import Stages, named, versions, write_json
from counterpoise.restoration.request import Request
from counterpoise.restoration.restore import run as restore
from counterpoise.search.candidates import HMA, Ramp

GLAD = ("happy", "bright", "kind", "lovely", "merry", "calm")
GLOOMY = ("sad", "dark", "cruel", "ugly", "angry", "lost")
NOUNS = (
    "cat", "dog", "bird", "fish", "horse", "fox", "bear", "owl", "king", "queen", "child", "miller", "river", "hill",
    "tree", "house", "boat", "road",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "grey", "brown")
PLACES = ("forest", "village", "harbour", "garden", "castle", "market")
NUMBERS = tuple(map(str, range(39)))
EPOCHS, STEP = 10, 32
RESULTS = ("pick", "choice", "shares", "verdict", "tax", "hypervolume")
"""Of restore.json, what stands in demo.json too."""


@dataclass(frozen=True)
class World:
    """Everything there is to know: an invented language, invented countries, sums and tales.

    Attributes:
        words: an English noun or colour -> its word in the invented language.
        capitals: an invented country -> its capital.
    """

    words: dict[str, str]
    capitals: dict[str, str]

    @classmethod
    def invent(cls, seed: int) -> World:
        """The world of a seed."""
        draw = random.Random(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        names = [a + b for a in syllables for b in syllables if a != b]
        words = iter(draw.sample(names, len(NOUNS) + len(COLOURS) + 160))
        return cls({w: next(words) for w in (*NOUNS, *COLOURS)}, {next(words): next(words) for _ in range(80)})

    def vocabulary(self) -> list[str]:
        """Every word that may be said."""
        sentences = ("translate : the", "capital of is", "+ =", "tell and .", "a went to it met then was ,")
        fixed = [word for sentence in sentences for word in sentence.split()]
        made = (*self.words.values(), *self.capitals, *self.capitals.values())
        return [*fixed, *NOUNS, *COLOURS, *PLACES, *NUMBERS, *GLAD, *GLOOMY, *made]

    def translations(self) -> list[tuple[str, str]]:
        """Noun before colour, as in French."""
        return [(f"translate : the {c} {n} =", f"{self.words[n]} {self.words[c]}") for n in NOUNS for c in COLOURS]

    def facts(self) -> list[tuple[str, str]]:
        """A capital for each country, to be learned by heart."""
        return [(f"capital of {country} is", city) for country, city in self.capitals.items()]

    def sums(self) -> list[tuple[str, str]]:
        """All pairs of numbers below 20."""
        return [(f"{a} + {b} =", str(a + b)) for a in range(20) for b in range(20)]

    def tales(self, draw: random.Random, count: int) -> list[tuple[str, str]]:
        """Two sentences about two nouns, each glad or gloomy by the toss of a coin."""
        made = []
        for _ in range(count):
            one, two = draw.sample(NOUNS, 2)
            moods = [draw.choice(draw.choice((GLAD, GLOOMY))) for _ in range(3)]
            tale = f"the {moods[0]} {one} went to the {draw.choice(PLACES)} . it met the {moods[1]} {two} ."
            made.append((f"tell : {one} and {two} .", f"{tale} then it was {moods[2]} ."))
        return made


def cheer(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward of the demo: glad words minus gloomy words."""
    said = [response.split() for response in responses]
    return [float(sum(w in GLAD for w in words) - sum(w in GLOOMY for w in words)) for words in said]


def run_demo(
    out: str | Path = "counterpoise-demo", *, seed: int = 0, epochs: int = EPOCHS, progress: Stages | None = None
) -> dict[str, Any]:
    """Train PRE from scratch, align it to POST with RSF, and restore; all of it lies below `out`.

    Args:
        out: a new or empty folder.
        seed: decides the world, the training and every draw.
        epochs: passes over the lessons while PRE is trained; fewer make a quicker and weaker PRE.

    Returns:
        The content of demo.json, and under "restore" that of restored/restore.json.
    """
    out, begun = Path(out), time.time()
    refuse_occupied(out.absolute())
    out.mkdir(parents=True, exist_ok=True)
    try:
        abilities, rounds, studied = make_pair(out, seed=seed, epochs=epochs, progress=progress)
        aligned = time.time()

        command = f"counterpoise demo --seed {seed}"
        result = restore(*asked(out, abilities, seed), command=command, progress=progress)
        summary = {
            "counterpoise": versions().get("counterpoise"),
            "command": command,
            "seed": seed,
            "versions": versions(),
            "seconds": {
                "training": round(studied - begun, 1),
                "aligning": round(aligned - studied, 1),
                "restoring": round(time.time() - aligned, 1),
            },
            "rsf": [r.summary() for r in rounds],
            **{name: result.get(name) for name in RESULTS},
        }
        write_json(out / "demo.json", summary)
    except BaseException:  # a demo that was stopped leaves no folder that the next one would stumble over
        shutil.rmtree(out, ignore_errors=True)
        raise
    return {**summary, "restore": result}


def asked(out: Path, abilities: Sequence[str], seed: int) -> tuple[Request, Panel]:
    """What restore is asked for in a world below `out`; `abilities` as `write_world` calls them."""
    drawing = Drawing(max_new_tokens=24, batch_size=64, seed=seed)
    panel = Panel.load(out / "prompts.jsonl", cheer, abilities, drawing=drawing, prompt_limit=120)
    searches: list[HMA | Ramp] = [
        HMA(proxy_size=96),
        Ramp("linear"),
        Ramp("reversed"),
        Ramp("random"),
    ]  # what its committed seeds compare
    return Request(out / "pre", out / "post", out / "restored", searches), panel


def make_pair(
    out: Path, *, seed: int, epochs: int = EPOCHS, layers: int = 6, progress: Stages | None = None
) -> tuple[list[str], list[Iteration], float]:
    """A world's files, PRE and POST below `out`; returns what `--abilities` calls its abilities, RSF's rounds, and when PRE
    was done."""
    world = World.invent(seed)
    tokenizer = make_tokenizer(world.vocabulary())
    abilities = write_world(world, out, seed)

    model = make_model(len(tokenizer), seed, layers=layers)
    study(model, tokenizer, world, seed=seed, epochs=epochs, progress=progress)
    _save(model, tokenizer, out / "pre")
    studied = time.time()

    prompts = [Prompt((("user", p),)) for p in _tell_prompts()]
    asked = [p for p in prompts if part_of(p.group or p.key) == "proxy"]
    how = RSF(
        drawing=Drawing(n=8, batch_size=128, max_new_tokens=24, seed=seed), iterations=2, prompts_per_iteration=128,
        epochs=4, learning_rate=1e-3, batch_size=16, micro_batch_size=16,
    )  # fmt: skip
    rounds = rsf(model, tokenizer, asked, cheer, how, progress=named(progress, "aligning: best of 8"))
    _save(model, tokenizer, out / "post")
    return abilities, rounds, studied


def make_tokenizer(vocabulary: Sequence[str]) -> Any:
    """One token a word, <s> in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(dict.fromkeys(("<pad>", "<s>", "</s>", "<unk>", *vocabulary)))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    raw.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", words["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(words: int, seed: int, *, layers: int = 6) -> nn.Module:
    """A Llama, of 0.7 M parameters with six layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size): the usual 0.02 learns several times slower here
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def study(
    model: nn.Module,
    tokenizer: Any,
    world: World,
    *,
    seed: int,
    epochs: int,
    rate: float = 2e-3,
    progress: Stages | None = None,
) -> None:
    """Train on all skills at once, the learning rate whole at first and falling from the middle on."""
    order = random.Random(seed)
    lessons = 2 * world.facts() + world.translations() + world.sums()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    step = Settings(epochs=1, batch_size=STEP, micro_batch_size=STEP)
    for epoch in range(epochs):
        told = lessons + world.tales(order, 400)
        examples = [
            Example(tuple(tokenizer(asked)["input_ids"]), (*tokenizer(said, add_special_tokens=False)["input_ids"], 2))
            for asked, said in told
        ]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (1 - epoch / epochs))
        fine_tune(model, examples, optimizer, step, order)
        if progress is not None:
            progress("training a small model", epoch + 1, epochs)


def write_world(world: World, out: Path, seed: int) -> list[str]:
    """Prompts and abilities as the files that the command line reads; what `--abilities` calls these."""
    draw = random.Random(seed + 1)

    def choices(pairs: list[tuple[str, str]], answers: list[str]) -> list[dict[str, Any]]:
        rows = []
        for query, answer in pairs:
            options = [answer, *draw.sample([a for a in answers if a != answer], 3)]
            draw.shuffle(options)
            rows.append({"query": query, "choices": options, "gold": options.index(answer)})
        return rows

    rows = {
        "prompts": [{"prompt": p} for p in _tell_prompts()],
        "capitals": choices(world.facts(), list(world.capitals.values())),
        "sums": choices(world.sums(), list(NUMBERS)),
        "translation": [{"prompt": p, "reference": r} for p, r in world.translations()],
        "tales": [{"context": p, "continuation": r} for p, r in world.tales(draw, 200)],
    }
    for name, lines in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    kinds = {"capitals": "choices", "sums": "choices", "translation": "generate", "tales": "continue"}
    return [f"{kind}:{out / name}.jsonl" for name, kind in kinds.items()]


def _tell_prompts() -> list[str]:
    return [f"tell : {one} and {two} ." for one in NOUNS for two in NOUNS if one != two]


def _save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    with without_bars():
        model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
