"""Skipped positions: the original's draw, what it does to distances, and whether a model attends across the gap."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
import train_toy as toy
from original import PARITY
from typer.testing import CliRunner

from longva.cli import app
from longva.context.loss import last_hidden
from longva.train.batch import TokenLoss
from longva.train.extend import extend
from longva.train.recipe import TrainError
from longva.train.skip import Skipped, skip_positions


def test_the_originals_draws():
    cases = json.loads((PARITY / "losses" / "position_skipping.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        drawn = []

        def draw(a, b):
            drawn.append(generator.randint(a, b))
            return drawn[-1]

        generator = random.Random(case["python_random_seed"])
        positions = skip_positions(case["length"], case["range"], draw)
        assert positions.tolist() == case["position_ids"]
        assert drawn == [case["split"], case["left_add"], case["right_add"]]


def test_distances_of_all_draws_together():
    """Every draw of a small window, with its probability: the mean distance is (j - i)(1 + R / 4(L + 1))."""
    L, R = 5, 6
    mean = np.zeros(L)
    total = 0.0
    for split, left in itertools.product(range(L + 1), range(R + 1)):
        for right in range(left, R + 1):
            chance = 1 / (L + 1) / (R + 1) / (R + 1 - left)
            values = iter([split, left, right])
            positions = skip_positions(L, R, lambda a, b: next(values)).numpy()
            gap = np.diff(positions)
            assert (gap > 0).all() and 0 <= positions[0] and positions[-1] <= L - 1 + R
            assert [i for i in range(L - 1) if gap[i] != 1] == ([split - 1] if 0 < split < L and right > left else [])
            mean += chance * positions
            total += chance
    assert total == pytest.approx(1, abs=1e-12)
    distances = mean[None, :] - mean[:, None]
    steps = np.arange(L)[None, :] - np.arange(L)[:, None]
    assert np.allclose(distances, steps * (1 + R / (4 * (L + 1))), atol=1e-12)


class Rows:
    length = 24

    def __call__(self, step, row):
        ids = torch.randint(64, (self.length,), generator=torch.Generator().manual_seed(100 * step + row))
        return dict(input_ids=ids, position_ids=torch.arange(self.length))


def by_hand(model, ids, positions):  # [L,V]
    """Logits of a Qwen2 in float64 with every attention weight written out: RoPE of the positions, causal by place."""
    body, x = model.model, model.model.embed_tokens(ids)
    config, L = model.config, len(ids)
    dim = config.hidden_size // config.num_attention_heads
    angles = positions[:, None].double() / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones_like(angles), angles)  # [L,dim/2]

    def turned(states):  # [H,L,dim]
        pair = torch.complex(*states.chunk(2, -1)) * turn
        return torch.cat([pair.real, pair.imag], -1)

    def heads(states):
        return states.view(L, -1, dim).transpose(0, 1)

    for layer in body.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = turned(heads(a.q_proj(h))), turned(heads(a.k_proj(h))), heads(a.v_proj(h))
        k, v = (states.repeat_interleave(len(q) // len(k), 0) for states in (k, v))
        scores = q @ k.mT / dim**0.5 + torch.full((L, L), -torch.inf).triu(1)
        x = x + a.o_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(L, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(body.norm(x))


def test_the_loss_attends_across_the_gap():
    """The loss of a step of skipped rows, from all logits by hand; without the mask transformers sees two documents."""
    model = toy.tiny().double().eval()
    loss = TokenLoss(model)
    samples = [Skipped(Rows(), 500, seed=3)(0, row) for row in range(4)]
    batch = loss.collate(samples)
    assert (batch["position_ids"].diff() > 1).any(1).sum() >= 2
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:]), "no token loses its label at the gap"
    wanted = []
    for sample in samples:
        chances = by_hand(model, sample["input_ids"], sample["position_ids"]).log_softmax(-1)
        wanted.append(-chances[:-1].gather(1, sample["input_ids"][1:, None]))
    with torch.no_grad():
        found = loss(batch, loss.count(batch))
        assert abs(found - torch.cat(wanted).mean()) < 1e-6  # RoPE's angles are in float32
        apart = loss({k: v for k, v in batch.items() if k != "attention_mask"}, loss.count(batch))
    assert abs(found - apart) > 1e-4


def test_moving_all_positions_changes_nothing():
    model = toy.tiny().double().eval()
    ids = Rows()(0, 0)["input_ids"][None]
    whole = skip_positions(24, 30, lambda a, b: b)[None]  # split after the last token, and both moved by 30
    assert whole[0, 0] == 30 and (whole.diff() == 1).all()
    with torch.no_grad():
        a, b = (last_hidden(model, input_ids=ids, position_ids=p) for p in (whole, whole - 30))
    assert (a - b).abs().max() < 1e-5


def test_extend_with_skipped_positions_resumes_to_the_same_weights(tmp_path):
    from longva.mini.reader import short_reader

    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("find owl . red rings . " * 200)
    reader = short_reader(tmp_path / "reader")
    given = dict(model=reader, length=16, corpus=dict(separator=2), rows=2, save_every=1, skip_positions=1000)

    def go(out, steps, **more):
        return extend("mini", tmp_path / "text", tmp_path / out, steps=steps, **given | more)

    whole = go("whole", 4, schedule="constant")
    go("halves", 2, schedule="constant")
    shutil.rmtree(tmp_path / "halves/model")
    halves = go("halves", 4, schedule="constant")
    a, b = toy.weights(whole), toy.weights(halves)
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = go("plain", 4, schedule="constant", skip_positions=0)
    assert any(not torch.equal(a[name], weight) for name, weight in toy.weights(plain).items())
    with pytest.raises(TrainError, match="skipped positions 1000 .now none"):
        go("whole", 4, schedule="constant", skip_positions=0)


def test_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["extend", "--preset", "mini", "--skip-positions", "700", "--dry-run"]
    done = CliRunner().invoke(app, words)
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    assert done.exit_code == 0 and "skip_positions 700" in lines, done.output
    done = CliRunner().invoke(app, [*words, "--cp", "2"])
    assert done.exit_code == 1 and "Ranks can't share a sequence with skipped positions" in done.output
    done = CliRunner().invoke(app, ["extend", "--preset", "mini", "--skip-positions", "-1"])
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())
