"""Tokens: what is found can be typed, its loss falls, and cases do not know of each other."""

import pytest
import torch

from dori_utils.attack import _draws, _generator, _losses
from dori_utils.core.diffusion import encode_images, encode_prompts
from dori_utils.core.edits import Edit, applied
from dori_utils.core.hashes import model_hash
from dori_utils.core.targets import Target
from dori_utils.tokens import Config, _promising, _start, encode_ids, find_prompts, typeable_words

CONFIG = Config(steps=3, batch_size=2, exchanges=4, top=8, length=8)
PROMPTS = ["a cat on a car", "the red dog", "a photography of Grapes, é"]


@pytest.fixture
def targets(random_picture):
    return [Target(f"t{i}", prompt, random_picture(i, 64), "VM") for i, prompt in enumerate(PROMPTS)]


def values_off(pipe, number):
    names = [f"down_blocks.{number}.attentions.{i}.transformer_blocks.0.attn2.to_v.weight" for i in (0, 1)]
    masks = {name: torch.ones(len(pipe.unet.get_parameter(name)), 1, dtype=torch.bool) for name in names}
    return Edit("off", model_hash(pipe), masks=masks)


def texts(found):
    return [case["found"] for case in found.cases]


def test_typeable_words_are_whole_words_that_give_their_token_again(sd1):
    words = typeable_words(sd1.tokenizer)
    assert len(words) == len(set(words.tolist())) > 20
    named = sd1.tokenizer.convert_ids_to_tokens(words.tolist())
    assert {"cat</w>", "violin</w>", "a</w>"} <= set(named) and all(token.endswith("</w>") for token in named)
    for word in words.tolist():
        text = sd1.tokenizer.decode([word])
        assert text.isascii() and sd1.tokenizer(text, add_special_tokens=False).input_ids == [word]


def test_ids_give_what_their_text_gives(pipe):
    prompts = ["a cat on a car", ""]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    torch.testing.assert_close(encode_ids(pipe, ids), encode_prompts(pipe, prompts), atol=1e-5, rtol=1e-4)
    embeddings = pipe.text_encoder.get_input_embeddings().weight[ids]
    torch.testing.assert_close(encode_ids(pipe, ids.flip(0), embeddings), encode_ids(pipe, ids))
    assert "forward" not in vars(pipe.text_encoder.get_input_embeddings())


def test_what_is_found_can_be_typed_and_is_what_was_tried(pipe, targets):
    found = find_prompts(pipe, targets, CONFIG, progress=False)
    torch.testing.assert_close(found.prompt_embeds, encode_prompts(pipe, texts(found)))
    for text, prompt in zip(texts(found), PROMPTS, strict=True):
        ids = pipe.tokenizer(text).input_ids
        assert pipe.tokenizer(pipe.tokenizer.decode(ids[1:-1])).input_ids == ids  # decode and type again: the same
        assert len(ids) == 2 + max(8, len(pipe.tokenizer(prompt).input_ids) - 2) and text.isascii() or "é" in text


def test_only_whole_words_are_exchanged_and_added_words_are_whole(sd1):
    words, prompt = typeable_words(sd1.tokenizer), "a dogma, a cat"
    ids, free = _start(sd1.tokenizer, prompt, words, 10, torch.Generator().manual_seed(0))
    own = sd1.tokenizer(prompt).input_ids[1:-1]
    assert ids.shape == (16,) and ids[1 : 1 + len(own)].tolist() == own and len(own) < 10
    assert ids[11] == sd1.tokenizer.eos_token_id and ids[10] in words
    place, expected = 1, []
    for word in sd1.tokenizer.decode(ids[1:11]).split():
        tokens = len(sd1.tokenizer(word, add_special_tokens=False).input_ids)
        expected += [place] if tokens == 1 else []
        place += tokens
    assert free.tolist() == expected and place == 11 and len(expected) < 10


def test_long_prompts_keep_their_length_and_short_ones_stop_at_what_the_encoder_takes(sd1):
    words, generator = typeable_words(sd1.tokenizer), torch.Generator().manual_seed(0)
    ids, _ = _start(sd1.tokenizer, "a cat " * 6, words, 4, generator)
    assert ids[:14].tolist() == sd1.tokenizer("a cat " * 6).input_ids
    ids, free = _start(sd1.tokenizer, "a cat", words, 100, generator)
    assert ids[-1] == sd1.tokenizer.eos_token_id and ids[-2] != ids[-1] and len(free) == 14


def test_the_loss_falls_and_never_rises(pipe, targets):
    config = Config(steps=6, batch_size=2, exchanges=8, length=8)
    found = find_prompts(pipe, targets, config, progress=False)
    assert found.losses.shape == (3, 6)
    falls = found.losses.diff(dim=1)
    assert (falls <= 1e-5).all() and (falls.sum(dim=1) < -1e-4).all()


def test_the_losses_are_dori_s_on_draws_that_stay(sd1, targets):
    config = Config(steps=1, batch_size=2, exchanges=1, length=1)
    found = find_prompts(sd1, targets[:1], config, progress=False)
    draws = [_draws(sd1, _generator(targets[0], 0), 2)]
    clean = encode_images(sd1, [targets[0].image])
    with torch.no_grad():
        expected = _losses(sd1, clean, encode_prompts(sd1, PROMPTS[:1]), draws)
    torch.testing.assert_close(found.losses[:, 0], expected)


def test_the_gradient_names_the_words_that_lower_the_loss_most_to_first_order(sd1, targets):
    """Against finite differences along the way from the word at hand to another one."""
    words, clean = typeable_words(sd1.tokenizer), encode_images(sd1, [targets[0].image])
    draws = [_draws(sd1, _generator(targets[0], 0), 2)]
    ids = sd1.tokenizer(PROMPTS[0], padding="max_length", max_length=16, return_tensors="pt").input_ids
    losses, promising = _promising(sd1, clean, ids, draws, words, 5)
    table, place = sd1.text_encoder.get_input_embeddings().weight.double(), 2
    changes = {}
    sd1.text_encoder.double(), sd1.unet.double()
    try:
        for word in words.tolist():
            moved = table[ids].clone()
            moved[0, place] += 1e-3 * (table[word] - table[ids[0, place]])
            with torch.no_grad():
                after = _losses(sd1, clean.double(), encode_ids(sd1, ids, moved), draws)
            changes[word] = (after - losses).item()
    finally:
        sd1.text_encoder.float(), sd1.unet.float()
    del changes[ids[0, place].item()]
    best = sorted(changes, key=changes.get)[:5]
    assert len(set(best) & set(promising[0, place].tolist())) >= 4
    assert ids[0, place] not in promising[0, place]


def test_a_case_is_the_same_alone_beside_others_and_every_time(pipe, targets):
    together = find_prompts(pipe, targets, CONFIG, progress=False)
    assert texts(together) == texts(find_prompts(pipe, targets, CONFIG, progress=False))
    assert texts(together) == texts(find_prompts(pipe, targets, CONFIG, rows=4, progress=False))
    for i, target in enumerate(targets):
        alone = find_prompts(pipe, [target], CONFIG, progress=False)
        assert texts(alone) == [texts(together)[i]]
        torch.testing.assert_close(alone.losses[0], together.losses[i], rtol=1e-3, atol=1e-4)


def test_another_seed_is_another_search(sd1, targets):
    other = Config(steps=3, batch_size=2, exchanges=4, top=8, length=8, seed=1)
    found, others = (find_prompts(sd1, targets[:1], config, progress=False) for config in (CONFIG, other))
    assert texts(found) != texts(others) and others.cases[0]["seed"] == 1


def test_each_case_is_searched_for_under_its_own_edit(pipe, targets):
    same = [targets[0]] * 3
    edits = [values_off(pipe, 0), None, values_off(pipe, 1)]
    together = find_prompts(pipe, same, CONFIG, edits=edits, progress=False)
    for i, edit in enumerate(edits):
        with applied(pipe, edit):
            alone = find_prompts(pipe, same[:1], CONFIG, progress=False)
        torch.testing.assert_close(alone.losses[0], together.losses[i], rtol=1e-3, atol=1e-4)
        assert texts(alone) == [texts(together)[i]]
    assert (together.losses[0] - together.losses[1]).abs().max() > 1e-5
    assert [case["mitigation"] for case in together.cases] == ["off", None, "off"]


def test_prompts_on_the_way_are_kept(sd1, targets):
    config = Config(steps=2, batch_size=2, exchanges=4, length=5, record=(0, 1))
    found = find_prompts(sd1, targets[:1], config, progress=False)
    after = found.cases[0]["found after"]
    assert after["0"].startswith(PROMPTS[0]) and list(found.by_step()) == [0, 1, 2]
    torch.testing.assert_close(found.recorded[1], encode_prompts(sd1, [after["1"]]))


def test_without_steps_or_exchanges_left_the_prompt_is_what_it_was(sd1, targets):
    none = find_prompts(sd1, targets[:1], Config(steps=0, length=1), progress=False)
    assert texts(none) == PROMPTS[:1] and none.losses.shape == (1, 0)
    rare = Target("rare", "é", targets[0].image, "VM")  # no word that may be exchanged
    assert texts(find_prompts(sd1, [rare], Config(steps=1, length=1, batch_size=1), progress=False)) == ["é"]


def test_what_cannot_be_searched_for_is_refused(sd1, targets):
    with pytest.raises(ValueError, match="No targets"):
        find_prompts(sd1, [])
    with pytest.raises(ValueError, match="lost has no image"):
        find_prompts(sd1, [Target("lost", "a dog", None, "VM")])
    with pytest.raises(ValueError, match="Prompt too long"):
        find_prompts(sd1, [Target("long", "a cat " * 20, targets[0].image, "VM")], CONFIG)
    for change in (dict(steps=-1), dict(exchanges=0), dict(record=(60,))):
        with pytest.raises(ValueError, match="must be"):
            Config(**change)
