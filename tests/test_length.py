"""The study of text length, judged by an evaluator that shares nothing with `longva.needle`: transformers' own CLIP
tower and Qwen2, one plain forward pass per trial, everything else written here from the definitions."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, Qwen2ForCausalLM

from longva.mini import cards as C
from longva.mini.arm_tests import caption_tokens, card_pictures, find_cards, picture_tokens
from longva.mini.arms import ARMS, ArmRecipe, blank_arm
from longva.mini.recipe import look_back
from longva.needle.trials import Trial
from longva.study.length import difference

FRAMES = 10
VIDEOS = range(40, 65)  # 25 videos of 12 needles, read and seen: 600 trials
DEPTHS = [0, 0.25, 0.5, 0.75, 1]


@pytest.fixture(scope="module")
def model():
    model = look_back(blank_arm(3, 1e9), (0, 1, 2, 3))
    with torch.no_grad():  # sharper than first weights are, so that answers differ between trials
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
        for weight in model.model.mm_projector.parameters():
            weight.mul_(4)
    return model.eval()


class Plain:
    """Transformers' classes with a model's weights."""

    def __init__(self, model):
        weights = model.state_dict()
        config = model.config
        self.language = Qwen2ForCausalLM(config.text_config).eval()
        names = self.language.state_dict()
        self.language.load_state_dict({name: weights[name] for name in names})
        self.tower = CLIPVisionModel(config.vision_config).eval()
        loaded = {}
        for name, value in self.tower.state_dict().items():
            (full,) = [n for n in weights if "vision_tower" in n and n.endswith(name)] or [None]
            loaded[name] = value if full is None else weights[full]
        self.tower.load_state_dict(loaded)
        self.projector = [weights[f"model.mm_projector.{k}"] for k in ("0.weight", "0.bias", "2.weight", "2.bias")]

    def see(self, pictures):  # [N,28,28,3] -> [N,4,D]
        pixels = (pictures.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        patches = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        first, bias, second, end = self.projector
        patches = torch.nn.functional.gelu(patches @ first.T + bias) @ second.T + end
        grid = patches.reshape(len(patches), 2, 2, 2, 2, -1)  # rows, within, columns, within
        return grid.mean((2, 4)).flatten(1, 2)

    def read(self, cards):  # [N,4] -> [N,4,D]
        words = [[name[number] for name, number in zip(C.WORDS, card)] for card in cards]
        ids = torch.tensor([[C.VOCABULARY.index(word) for word in four] for four in words])
        return self.language.model.embed_tokens(ids)

    def answer(self, hay, needle, frame, key, first_word):
        words = [C.VOCABULARY.index(word) for word in ("find", *key, first_word)]
        rows = [hay[:frame].flatten(0, 1), needle, hay[frame:].flatten(0, 1)]
        rows.append(self.language.model.embed_tokens(torch.tensor(words)))
        logits = self.language(inputs_embeds=torch.cat(rows)[None]).logits[0]
        return logits[-2:].argmax(-1).tolist()


@torch.no_grad()
def test_an_independent_evaluator_gives_the_same_answer_in_each_of_600_trials(model):
    plain = Plain(model)
    answers = set()
    asked = 0
    for video in VIDEOS:
        hay = C.video_cards(FRAMES, video)
        needles = C.needle_cards(video)
        seen = plain.see(card_pictures(hay, video)), plain.see(card_pictures(needles, video + 1)), picture_tokens
        written = plain.read(hay), plain.read(needles), caption_tokens
        for frames, hidden, tokens in (seen, written):
            for k, trial in enumerate(find_cards(model, "m", FRAMES, video, tokens)):
                words = [names[number] for names, number in zip(C.WORDS, needles[k])]
                frame = int(DEPTHS[k % 5] * FRAMES)
                assert trial.answer_ids == [C.VOCABULARY.index(word) for word in words[2:]]
                assert trial.argmax_ids == plain.answer(frames, hidden[k], frame, words[:2], words[2])
                answers.add(tuple(trial.argmax_ids))
                asked += 1
    assert asked == 600 and len(answers) > 20


def test_arms_of_a_base_have_equal_steps_and_tokens():
    recipe = ArmRecipe()
    short, long = (
        [(phase.size[0] * phase.size[1]) for phase in phases for _ in range(phase.steps)]
        for phases in (recipe.short, recipe.long)
    )
    assert short == long  # step by step
    assert len(ARMS) == 4 and {(arm.base, arm.long) for arm in ARMS} == {(b, x) for b in (1e4, 1e9) for x in (0, 1)}


def test_a_needle_is_in_no_video_of_its_seed_and_its_neighbours_are():
    for seed in range(20):
        cards = C.video_cards(2048, seed)
        keys = cards[:, 0] * 8 + cards[:, 1]
        for thing, colour in C.needle_cards(seed)[:, :2]:
            assert thing * 8 + colour not in keys
            assert thing in cards[:, 0] and colour in cards[:, 1]


def test_training_texts_and_pictures_leave_their_groups_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids, _ = C.needles_document(512, rng, C.NO_TEXT)
        words = [C.VOCABULARY[i] for i in ids]
        things, paints = C.WORDS[0], C.WORDS[1]
        objects = np.array([things.index(word) if word in things else -1 for word in words])
        colours = np.array([paints.index(word) if word in paints else -1 for word in words])
        pairs = (objects[:-1] >= 0) & (colours[1:] >= 0)
        assert pairs.sum() > 50
        assert (C.group(8 * objects[:-1][pairs] + colours[1:][pairs]) != C.NO_TEXT).all()


def _trial(needle, right, seed=1):
    return Trial("m", needle, 8, 0.5, 4, [1], [1], bool(right), 1.0, 0.0, seed)


@pytest.mark.parametrize("way", ["object", "video", "training seed"])
def test_the_interval_is_that_of_the_widest_clustering(way):
    pairs = []
    for seed in range(4):
        for video in range(4):
            for thing in range(4):
                hard = {"object": thing, "video": video, "training seed": seed}[way] % 2
                pairs.append((seed, _trial(f"0_{thing}", True, video), _trial(f"0_{thing}", hard, video)))
    mean, low, high, named = difference(pairs)
    assert mean == 0.5 and named == way
    # four clusters at 0, 1, 0, 1: standard error sqrt(1/3)/2, Student's t of three degrees 3.182
    assert high - mean == pytest.approx(3.182446 * (1 / 3) ** 0.5 / 2, rel=1e-5)
    assert mean - low == pytest.approx(high - mean)
