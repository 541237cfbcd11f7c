"""Tokens: a prompt that can be typed and that brings the image back.

DoRI's triggers are embeddings that no text encoder need ever give. A service that takes text alone is attacked with
text alone, so here the prompt's words are exchanged, one after the other, with DoRI's aim: that the model denoises the
known image well. It is UnlearnDiffAtk's aim, too (Zhang et al., "To Generate or Not?", ECCV 2024). The search is greedy
coordinate gradient (Zou et al., "Universal and Transferable Adversarial Attacks on Aligned Language Models", 2023,
after AutoPrompt; Shin et al., EMNLP 2020). At each step

1. the gradient of the loss with respect to the tokens' embeddings says, for every place and every word of the
   vocabulary, how much the word would change the loss there, to first order;
2. some exchanges are drawn among the most promising ones, and tried;
3. the best of them is made, if the loss is lower with it.

All prompts of a case are compared on the same noise and timesteps: a few words have not enough freedom to fit those.

What is found can be typed: only whole words are exchanged, for whole words of the tokenizer's own vocabulary that its
text gives back, in ASCII. The prompts' rarer words, of several tokens, stay as they are.

Shapes: N cases, B draws; T tokens and D channels of the text encoder's output, E of its input; V words, K exchanges.
"""

import json
from dataclasses import asdict, dataclass

import torch

from dori_utils.attack import _draws, _generator, _losses, cases_together
from dori_utils.core import hooks
from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import _check_lengths, encode_images, encode_prompts
from dori_utils.core.edits_by_row import applied_by_row
from dori_utils.core.hashes import base_hash, known
from dori_utils.core.triggers import Triggers


@dataclass(frozen=True)
class Config:
    """Settings. Our choice, but for the length, which is that of PEZ's prompts (Wen et al., NeurIPS 2023)."""

    steps: int = 50
    batch_size: int = 8  # draws of noise and timestep of a case, the same at every step
    exchanges: int = 32  # tried at a step
    top: int = 32  # words for each place that exchanges are drawn from
    length: int = 16  # words: a shorter prompt gets random ones, as far as the text encoder takes them
    seed: int = 0  # of draws, added words and exchanges, together with the target's id
    record: tuple[int, ...] = ()  # steps after which prompts are kept as well

    def __post_init__(self):
        if self.steps < 0 or min(self.batch_size, self.exchanges, self.top, self.length) < 1:
            raise ValueError("steps must be at least 0, batch_size, exchanges, top and length at least 1.")
        if any(not 0 <= step <= self.steps for step in self.record):
            raise ValueError(f"record is {self.record}: its steps must be between 0 and {self.steps}.")


def find_prompts(pipe, targets, config=None, *, edits=None, rows=96, progress=True):
    """Search for a prompt for each of N targets, from its own prompt on.

    Args:
        pipe: a `StableDiffusionPipeline`, without an edit applied to it.
        targets: N `Target`s with an image.
        config: a `Config`.
        edits: one `Edit` or None for each target, under which the prompt is searched for.
        rows: cases x draws in one batch of the U-Net, at most.

    Returns:
        `Triggers`, of which each case has its prompt, "found", and "found after", those that were recorded, by step.
        prompt_embeds are what the text encoder gives for them; losses those before each step, which never rise.

    Raises:
        ValueError: no targets, one without an image, or with a prompt that is too long.
    """
    config, edits = config or Config(), edits or [None] * len(targets)
    _check(pipe.tokenizer, targets)
    group, words = cases_together(len(targets), config, rows), typeable_words(pipe.tokenizer)
    parts, found = [slice(first, first + group) for first in range(0, len(targets), group)], []
    with known(pipe), tqdm(total=len(parts) * config.steps, desc="tokens", disable=not progress) as bar:
        for part in parts:
            found += _searched(pipe, targets[part], edits[part], words, config, bar.update)
        cases = [_about(base_hash(pipe), *case, config) for case in zip(targets, edits, found, strict=True)]
        return Triggers(
            encode_prompts(pipe, [case["found"] for case in cases]).float().cpu(),
            torch.stack([losses for _, losses in found]),
            cases,
            {s: encode_prompts(pipe, [of[s] for of, _ in found]).float().cpu() for s in sorted(config.record)},
        )


def typeable_words(tokenizer):
    """(V,) ids of the tokens that are a whole word, in ASCII, which alone gives that token again."""
    ids = sorted(number for token, number in tokenizer.get_vocab().items() if token.endswith("</w>"))
    texts = [tokenizer.decode([number]).strip() for number in ids]
    back = tokenizer(texts, add_special_tokens=False).input_ids
    whole = [own == [number] and text.isascii() for number, text, own in zip(ids, texts, back, strict=True)]
    return torch.tensor(ids)[whole]


def encode_ids(pipe, ids, embeddings=None):
    """The text encoder's output (N, T, D) for token ids (N, T), or for `embeddings` (N, T, E) in their place."""
    layer = pipe.text_encoder.get_input_embeddings()
    embeddings = layer(ids) if embeddings is None else embeddings
    with hooks.replayed([layer], [embeddings]):
        return pipe.text_encoder(ids)[0]


def _searched(pipe, targets, edits, words, config, on_step):
    """For each of some targets {step: its prompt} and losses (steps,)."""
    generators = [_generator(target, config.seed) for target in targets]
    starts = [
        _start(pipe.tokenizer, t.prompt, words, config.length, g) for t, g in zip(targets, generators, strict=True)
    ]
    device = pipe.text_encoder.device
    ids, free, words = torch.stack([own for own, _ in starts]).to(device), [own for _, own in starts], words.to(device)
    draws = [_draws(pipe, generator, config.batch_size) for generator in generators]
    clean, losses = encode_images(pipe, [target.image for target in targets]), [torch.zeros(len(targets), 0)]
    texts = [{0: _text(pipe.tokenizer, row)} for row in ids]
    with applied_by_row(pipe, edits):
        for step in range(1, config.steps + 1):
            ids, before = _exchange(pipe, clean, ids, free, draws, words, config, generators)
            losses.append(before[:, None])
            for own, row in zip(texts, ids, strict=True):
                own[step] = _text(pipe.tokenizer, row)
            on_step()
    return list(zip(texts, torch.cat(losses, dim=1), strict=True))


def _exchange(pipe, clean, ids, free, draws, words, config, generators):
    """One step: ids (n, T) after it, and losses (n,) before it."""
    before, promising = _promising(pipe, clean, ids, draws, words, config.top)
    each = zip(ids, free, promising, generators, strict=True)
    tried = torch.stack([_drawn(*case, config.exchanges) for case in each], dim=1)  # (K, n, T)
    with torch.no_grad():
        after = torch.stack([_losses(pipe, clean, encode_ids(pipe, own), draws) for own in tried])  # (K, n)
    best, which = after.min(dim=0)
    chosen = tried[which, torch.arange(len(ids))]
    return torch.where((best < before)[:, None], chosen, ids), before.cpu()


def _promising(pipe, clean, ids, draws, words, top):
    """Losses (n,), and for every place the words (n, T, top) that would lower the loss most, to first order."""
    table = pipe.text_encoder.get_input_embeddings().weight
    embeddings = table[ids].detach().requires_grad_()  # (n, T, E)
    losses = _losses(pipe, clean, encode_ids(pipe, ids, embeddings), draws)
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings)
    change = gradient @ table[words].T  # (n, T, V), less what is the same for all words of a place
    change = change.masked_fill(ids[..., None] == words, torch.inf)  # the word itself would be no exchange
    return losses.detach(), words[change.topk(min(top, len(words) - 1), largest=False).indices]


def _drawn(ids, free, promising, generator, count):
    """(count, T): of one case's ids (T,), each with one of the free places exchanged for a promising word."""
    tried = ids.repeat(count, 1)
    if len(free):
        places = free[torch.randint(len(free), (count,), generator=generator)]
        ranks = torch.randint(promising.shape[1], (count,), generator=generator)
        tried[torch.arange(count), places] = promising[places, ranks]
    return tried


def _start(tokenizer, prompt, words, length, generator):
    """Ids (T,) of a prompt with random words after it, up to that length; and the places of its whole words."""
    own = tokenizer(prompt, add_special_tokens=False).input_ids
    missing = max(0, min(length, tokenizer.model_max_length - 2) - len(own))
    own = [*own, *words[torch.randint(len(words), (missing,), generator=generator)].tolist()]
    text = tokenizer.decode(own)
    ids = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length).input_ids
    ends = [token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(own)]
    whole = [end and word in words for word, end in zip(own, [True, *ends[:-1]], strict=True)]
    return torch.tensor(ids), 1 + torch.tensor(whole).nonzero()[:, 0]


def _text(tokenizer, ids):
    """What is between the start token and the first end token."""
    ids = ids.tolist()[1:]
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)])


def _about(base, target, edit, found, config):
    texts, _ = found
    own = {"target": target.id, "prompt": target.prompt, "seed": config.seed, "start": "prompt"}
    own |= {"edit": edit and edit.fingerprint(), "mitigation": edit and edit.method, "model": base}
    own |= {"config": json.loads(json.dumps(asdict(config))), "steps": config.steps, "stopped": None}
    recorded = {str(step): texts[step] for step in sorted(config.record)}
    return own | {"found": texts[config.steps], "found after": recorded}


def _check(tokenizer, targets):
    if not targets:
        raise ValueError("No targets: give at least one.")
    for target in targets:
        if target.image is None:
            raise ValueError(f"{target.id} has no image: the search is led by the image, so it must be known.")
    _check_lengths(tokenizer, [target.prompt for target in targets])
