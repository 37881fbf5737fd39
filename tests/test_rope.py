"""Rotary embeddings: the papers' formulas in float64, every kind of decoder, and settings that transformers ignores."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import transformers as tf

from longva.context.rope import DETAILS, base_search, exact_rope, extend_rope, inverse_frequencies, unseen_pairs
from longva.context.rope_files import write_both_spellings
from longva.context.rope_report import logits_moved, rope_report

tf.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()
SIZE = dict(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    pad_token_id=0,
)


def qwen(theta=1e4, **more):
    return tf.Qwen2Config(**SIZE | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}} | more)


def gemma(**more):
    return tf.Gemma3TextConfig(
        **SIZE | dict(head_dim=32, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]) | more
    )


def build(config):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tf.AutoModelForCausalLM.from_config(config).eval()


def yarn(**more):
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16} | more


# ---- formulas -------------------------------------------------------------------------------------------------------

I = np.arange(16)
PLAIN = 1e4 ** (-2.0 * I / 32)


def yarn_oracle(s, length, fast=32, slow=1):
    """The authors' code, in three lines: the ramp over pairs between floor and ceil of the two boundaries."""

    def boundary(turns):
        return 32 * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(1e4))

    low, high = max(math.floor(boundary(fast)), 0), min(math.ceil(boundary(slow)), 31)
    keep = 1 - np.clip((I - low) / max(high - low, 1e-3), 0, 1)
    return PLAIN * keep + PLAIN / s * (1 - keep)


LONG = [1 + i / 2 for i in range(16)]
ORACLE = {  # method: (arguments, frequencies, factor on cos and sin, length of a call)
    "base": (dict(theta=1e9), 1e9 ** (-2.0 * I / 32), 1, None),
    "ntk": (dict(factor=8), (1e4 * 8 ** (32 / 30)) ** (-2.0 * I / 32), 1, None),
    "dynamic": (dict(factor=8), (1e4 * (8 * 1000 / 64 - 7) ** (32 / 30)) ** (-2.0 * I / 32), 1, 1000),
    "linear": (dict(factor=8), PLAIN / 8, 1, None),
    "yarn": (dict(factor=8, original_max_position_embeddings=4096), yarn_oracle(8, 4096), 0.1 * math.log(8) + 1, None),
    "longrope": (
        dict(factor=8, long_factor=LONG),
        PLAIN / np.array(LONG),
        math.sqrt(1 + math.log(8) / math.log(64)),
        1000,
    ),
}


@pytest.mark.parametrize("method", ORACLE)
def test_formula_config_and_live_model_agree(method):
    settings, frequencies, warmth, length = ORACLE[method]
    config = extend_rope(qwen(), method, **settings)
    ours = inverse_frequencies(config, length=length, dtype=torch.float64).numpy()
    np.testing.assert_allclose(ours, frequencies, rtol=1e-13)
    model = extend_rope(build(qwen()), method, **settings)
    with torch.no_grad():
        model(torch.zeros(1, length or 8, dtype=torch.long))  # dynamic and longrope go by the length of the call
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.double().numpy(), frequencies, rtol=1e-6)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(warmth)
    report = rope_report(model)
    assert not report.ignored and report.equal_to_config and report.survives_save and report.logits_moved > 0, report
    assert report.attention_factor == pytest.approx(warmth) and report.rope_type == (
        method if method not in ("base", "ntk") else "default"
    )


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """The paper (3.2): over 32 turns in training nothing changes, under one turn all is divided by the factor."""
    f = inverse_frequencies(
        extend_rope(qwen(), "yarn", factor=8, original_max_position_embeddings=4096), dtype=torch.float64
    ).numpy()
    turns = 4096 * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(
        f[turns > 45], PLAIN[turns > 45], rtol=1e-13
    )  # floor moves the boundary by up to one pair
    np.testing.assert_allclose(f[turns < 0.7], PLAIN[turns < 0.7] / 8, rtol=1e-13)
    share = f / PLAIN
    assert (np.diff(share) <= 1e-12).all() and ((share > 1 / 8 - 1e-12) & (share < 1 + 1e-12)).all()


def test_ntk_stretches_the_last_pair_by_the_factor_and_the_first_not_at_all():
    f = inverse_frequencies(extend_rope(qwen(), "ntk", factor=8), dtype=torch.float64).numpy()
    assert f[0] == 1 and f[-1] == pytest.approx(PLAIN[-1] / 8, rel=1e-12)


@pytest.mark.parametrize(
    "parameters",
    [
        yarn(),
        yarn(truncate=False),
        yarn(mscale=0.7, mscale_all_dim=1.2),
        yarn(attention_factor=1.5),
        yarn(beta_fast=16, beta_slow=2),
        dict(
            rope_type="llama3",
            rope_theta=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=[1.0] * 16,
            long_factor=LONG,
            original_max_position_embeddings=16,
        ),
    ],
    ids=lambda p: "-".join(map(str, list(p.values())[:1] + list(p)[4:])),
)
def test_our_float64_formulas_equal_transformers(parameters):
    config = qwen(rope_parameters=parameters)
    for length in (None, 64):
        theirs, warmth = tf.modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
            qwen(rope_parameters=dict(parameters)), "cpu", seq_len=length
        )
        torch.testing.assert_close(inverse_frequencies(config, length=length), theirs, rtol=2e-6, atol=0)
    assert rope_report(build(config), logits=False).attention_factor == pytest.approx(warmth)


def test_unseen_pairs_against_a_count_by_hand():
    seen, asked = 1000 * PLAIN, 8000 * (1e5 ** (-2.0 * I / 32))
    expected = (seen < 2 * np.pi) & (asked > seen)
    assert 0 < expected.sum() < 16
    np.testing.assert_array_equal(unseen_pairs(qwen(), qwen(1e5), 1000, 8000).numpy(), expected)


# ---- settings that are ignored --------------------------------------------------------------------------------------
# Each case gives a model, a configuration that has the same rotary embedding WITHOUT the setting (the test compares the
# two: transformers does ignore it), the name that the report must say, and what was asked for where it left no trace.


def attribute(name, value):
    def make(folder):
        config = qwen()
        setattr(config, name, value)
        return build(config), qwen()

    return make


def built_from(config, same=None):
    return lambda folder: (build(config()), (same or qwen)())


def parameters(**more):
    return built_from(lambda: qwen(rope_parameters={"rope_type": "default", "rope_theta": 1e4} | more))


def after_building(change, start=qwen):
    def make(folder):
        model = build(start())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model)
        return model, start()

    return make


def from_file(**more):
    def make(folder):
        qwen().save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
        return build(tf.AutoConfig.from_pretrained(folder)), qwen()

    return make


def from_pretrained_override(folder):
    qwen().save_pretrained(folder)
    return build(tf.AutoConfig.from_pretrained(folder, rope_theta=1e9)), qwen()


def around(set_it):
    """On the configuration around a text configuration."""

    def make(folder):
        text = qwen()
        outer = tf.LlavaConfig(
            text_config=text,
            vision_config=tf.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_it(outer)
        return tf.LlavaForConditionalGeneration(outer).eval(), qwen()

    return make


def replaced(model):
    model.config = qwen(1e9)


def only_frequencies(model):
    """What many scripts do to a live model: new frequencies, old factor on cos and sin."""
    other = build(qwen(rope_parameters=yarn()))
    model.config.rope_parameters = yarn()
    model.model.rotary_emb.inv_freq.copy_(other.model.rotary_emb.inv_freq)


LIN = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
IGNORED = {
    # nobody reads the place
    "rope_theta set on the configuration": (attribute("rope_theta", 1e9), "rope_theta"),
    "rope_parameters misspelt": (attribute("rope_paramters", LIN), "rope_paramters"),
    "rotary_base set on the configuration": (attribute("rotary_base", 1e6), "rotary_base"),
    "original_max_position_embeddings beside a type without it": (
        attribute("original_max_position_embeddings", 16),
        "original_max_position_embeddings",
    ),
    "rotary_emb_base in config.json": (from_file(rotary_emb_base=1e6), "rotary_emb_base"),
    "rope_parameters around text_config": (around(lambda c: setattr(c, "rope_parameters", LIN)), "rope_parameters"),
    "rope_scaling around text_config": (around(lambda c: setattr(c, "rope_scaling", LIN)), "rope_"),
    "rope_theta around text_config": (around(lambda c: setattr(c, "rope_theta", 1e9)), "rope_theta"),
    # the type doesn't read the key
    "factor without a type": (parameters(factor=4.0), "factor"),
    "theta for rope_theta": (parameters(theta=1e9), "theta"),
    "rope_teta": (built_from(lambda: qwen(rope_parameters={"rope_type": "default", "rope_teta": 1e9})), "rope_teta"),
    "rope_scaling inside rope_parameters": (parameters(rope_scaling={"type": "linear", "factor": 4.0}), "rope_scaling"),
    "partial_rotary_factor for a model that turns all": (
        parameters(partial_rotary_factor=0.5),
        "partial_rotary_factor",
    ),
    "type beside rope_type": (parameters(type="linear"), "type"),
    "attention_factor in linear": (
        built_from(
            lambda: qwen(rope_parameters=LIN | {"attention_factor": 1.3}), lambda: qwen(rope_parameters=dict(LIN))
        ),
        "attention_factor",
    ),
    "original_max_position_embeddings in dynamic": (
        built_from(
            lambda: qwen(rope_parameters=LIN | {"rope_type": "dynamic", "original_max_position_embeddings": 16}),
            lambda: qwen(rope_parameters=LIN | {"rope_type": "dynamic"}),
        ),
        "original_max_position_embeddings",
    ),
    "low_freq_factor in yarn": (
        built_from(lambda: qwen(rope_parameters=yarn(low_freq_factor=1.0)), lambda: qwen(rope_parameters=yarn())),
        "low_freq_factor",
    ),
    "flat settings for Gemma 3": (built_from(lambda: gemma(rope_parameters=dict(LIN)), gemma), "factor"),
    "truncate in one kind of layers": (
        built_from(
            lambda: gemma(rope_parameters={"full_attention": yarn(truncate=False)}),
            lambda: gemma(rope_parameters={"full_attention": yarn()}),
        ),
        "full_attention.truncate",
    ),
    # read, without effect
    "beta_slow = 0": (
        built_from(lambda: qwen(rope_parameters=yarn(beta_slow=0)), lambda: qwen(rope_parameters=yarn())),
        "beta_slow",
    ),
    "mscale alone": (
        built_from(lambda: qwen(rope_parameters=yarn(mscale=2.0)), lambda: qwen(rope_parameters=yarn())),
        "mscale",
    ),
    "mscale beside attention_factor": (
        built_from(
            lambda: qwen(rope_parameters=yarn(mscale=2.0, mscale_all_dim=1.0, attention_factor=1.2)),
            lambda: qwen(rope_parameters=yarn(attention_factor=1.2)),
        ),
        "mscale",
    ),
    "trained length missing": (
        built_from(
            lambda: qwen(max_position_embeddings=256, rope_parameters={k: v for k, v in yarn().items() if k[0] != "o"}),
            lambda: qwen(max_position_embeddings=256, rope_parameters=yarn(original_max_position_embeddings=256)),
        ),
        "original_max_position_embeddings",
    ),
    "max_position_embeddings in yarn": (
        built_from(
            lambda: qwen(max_position_embeddings=512, rope_parameters=yarn()), lambda: qwen(rope_parameters=yarn())
        ),
        "max_position_embeddings",
    ),
    # too late, or by hand
    "rope_parameters replaced on a live model": (
        after_building(lambda m: setattr(m.config, "rope_parameters", {"rope_type": "default", "rope_theta": 1e9})),
        "rope_parameters",
    ),
    "rope_theta changed on a live model": (
        after_building(lambda m: m.config.rope_parameters.update(rope_theta=1e9)),
        "rope_parameters",
    ),
    "rope_scaling set on a live model": (
        after_building(lambda m: setattr(m.config, "rope_scaling", {"rope_type": "linear", "factor": 4.0})),
        "rope_parameters",
    ),
    "full_attention changed on a live Gemma 3": (
        after_building(lambda m: m.config.rope_parameters["full_attention"].update(rope_theta=1e9), gemma),
        "rope_parameters",
    ),
    "configuration replaced": (after_building(replaced), "configuration"),
    # swallowed
    "rope_theta beside rope_parameters": (built_from(lambda: qwen(rope_theta=1e9)), "rope_theta", {"rope_theta": 1e9}),
    "rope_theta given to AutoConfig": (from_pretrained_override, "rope_theta", {"rope_theta": 1e9}),
    "rope_theta in config.json beside rope_parameters": (from_file(rope_theta=1e9), "rope_theta", {"rope_theta": 1e9}),
    "rope_parameters beside rope_scaling": (
        built_from(
            lambda: qwen(1e6, rope_scaling=dict(rope_type="linear", factor=4.0)),
            lambda: qwen(rope_parameters=dict(LIN)),
        ),
        "rope_theta",
        {"rope_parameters": {"rope_theta": 1e6}},
    ),
    "max_position_embeddings raised": (
        built_from(lambda: qwen(max_position_embeddings=256)),
        "max_position_embeddings",
        {"max_position_embeddings": 256},
    ),
}
IGNORED["factor beside attention_factor in longrope"] = (
    built_from(
        *(
            lambda f=f: qwen(
                rope_parameters=dict(
                    rope_type="longrope",
                    rope_theta=1e4,
                    factor=f,
                    attention_factor=1.1,
                    short_factor=[1.0] * 16,
                    long_factor=LONG,
                    original_max_position_embeddings=16,
                )
            )
            for f in (4.0, 32.0)
        )
    ),
    "factor",
)


def rotary(model):
    return next(m for n, m in model.named_modules() if n.endswith("rotary_emb") and "vision" not in n)


@pytest.mark.parametrize("case", IGNORED)
def test_an_ignored_setting_is_named(case, tmp_path):
    make, name, *asked = IGNORED[case]
    model, same = make(tmp_path)
    other = rotary(build(same))  # the same model without the setting: transformers ignores it
    for key, value in rotary(model).named_buffers():
        assert torch.equal(value, other.get_buffer(key)), "transformers does read this setting"
    for key in [k for k in vars(other) if k.endswith("attention_scaling")]:
        assert getattr(rotary(model), key) == getattr(other, key), "transformers does read this setting"
    report = rope_report(model, *asked)
    assert any(name in sentence.split(" ")[:2][-1] or sentence.startswith(name) for sentence in report.ignored), report
    assert name in repr(report)


def by_hand(model):
    model.model.rotary_emb.inv_freq.div_(4)


def cast(model):
    model.to(torch.bfloat16)


def cast_and_back(model):
    model.to(torch.float16).float()


@pytest.mark.parametrize(
    "change, words",
    [
        (by_hand, "by hand"),
        (cast, "rounded to bfloat16"),
        (cast_and_back, "rounded to 16 bits"),
        (only_frequencies, "attention_factor"),
    ],
)
def test_a_live_model_off_its_configuration(change, words):
    model = build(qwen())
    change(model)
    report = rope_report(model, logits=False)
    assert not report.equal_to_config and not report.survives_save and any(words in s for s in report.ignored), report
    assert not rope_report(extend_rope(model, theta=1e6)).ignored  # and extend_rope mends it


def test_dynamic_goes_back_to_an_old_setting():
    model = build(qwen(rope_parameters=LIN | {"rope_type": "dynamic"}))
    with torch.no_grad():
        model(torch.zeros(1, 200, dtype=torch.long))
        assert not rope_report(model).ignored  # grown, as it should
        model(torch.zeros(1, 8, dtype=torch.long))
    assert not rope_report(model).ignored  # and back
    model.config.rope_parameters["rope_theta"] = 1e6
    model.model.rotary_emb.inv_freq = inverse_frequencies(model.config)
    assert any(s.startswith("original_inv_freq") for s in rope_report(model).ignored)


def test_settings_that_cannot_be_built():
    model = build(qwen())
    model.config.rope_parameters = {"rope_type": "linera", "rope_theta": 1e4, "factor": 4.0}
    report = rope_report(model)
    assert (
        report.survives_save is None
        and "no model can be built" in report.ignored[0]
        and abs(report.theta / 1e4 - 1) < 1e-4
    )


@pytest.mark.parametrize(
    "settings",
    [None, {"rope_type": "mrope", "mrope_section": [2, 3, 3]}, {"rope_type": "linear", "factor": "2"}, {"factor": []}],
)
@pytest.mark.parametrize("asked", [None, {"rope_theta": "x", "rope_scaling": [1], "type": None}])
def test_a_report_never_breaks_off(settings, asked):
    """What breaks a model is what a report is asked about."""
    for model in (build(qwen()), build(gemma()), around(lambda outer: None)(None)[0]):
        text = model.config.get_text_config()
        text.rope_parameters = settings
        assert repr(rope_report(model, asked)) and rope_report(model, asked).ignored
    model = around(lambda outer: setattr(outer, "rope_parameters", {"type": "yarn", "factor": 4.0}))(None)[0]
    assert "rope" in rope_report(model, asked).ignored[0]
    tiny = build(qwen(head_dim=2))  # one pair: no base can be read from it
    assert rope_report(tiny).theta is None


def version_4(raw):
    """The frequencies that transformers 4.57 computes with for a Qwen2, a Llama or a Gemma 3: it knows no
    rope_parameters."""
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if kind == "longrope":  # whose trained length it takes from the top
        trained = raw.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        scaling["original_max_position_embeddings"] = trained
    text = qwen(raw.get("rope_theta", 1e4), head_dim=raw.get("head_dim") or 32)
    text.max_position_embeddings = raw["max_position_embeddings"]
    text.rope_parameters = text.rope_parameters | scaling | {"rope_type": kind}
    return inverse_frequencies(text)


@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma3", "mistral", "olmo2"])
@pytest.mark.parametrize("method", ["base", "yarn", "linear", "dynamic"])
def test_both_versions_of_transformers_read_one_base(name, method, tmp_path):
    model = build(FAMILIES[name]())
    how = {"theta": 1e9} if method == "base" else {"theta": 1e6, "factor": 4.0}
    extend_rope(model, method, **how)
    model.save_pretrained(tmp_path)
    alone = json.loads((tmp_path / "config.json").read_text())
    assert version_4(alone).min() > 2 * inverse_frequencies(model.config).min()
    write_both_spellings(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(version_4(raw), inverse_frequencies(model.config))
    assert raw.get("rope_local_base_freq") == (1e4 if name == "gemma3" else None)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_dict()["rope_parameters"] == model.config.to_dict()["rope_parameters"]
    assert torch.equal(last_logits(again), last_logits(model))


def last_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 30)[None]).logits


# ---- every kind of decoder ------------------------------------------------------------------------------------------

TEXT = dict(head_dim=32)
FAMILIES = {
    "qwen2": qwen,
    "gemma3": gemma,
    "llama3": lambda: tf.LlamaConfig(
        **SIZE,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=5e5,
            factor=2.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral": lambda: tf.MistralConfig(**SIZE),
    "cohere": lambda: tf.CohereConfig(**SIZE),
    "olmo2": lambda: tf.Olmo2Config(**SIZE),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZE),
    "stablelm": lambda: tf.StableLmConfig(**SIZE),
    "glm": lambda: tf.GlmConfig(**SIZE | TEXT),
    "phi3 longrope": lambda: tf.Phi3Config(
        **SIZE,
        original_max_position_embeddings=16,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, factor=4.0, short_factor=[1.0] * 16, long_factor=LONG
        ),
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SIZE | TEXT | dict(num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=131072)
    ),
    "llama4": lambda: tf.Llama4TextConfig(**SIZE | TEXT | dict(intermediate_size_mlp=64, num_local_experts=1)),
    "qwen2_vl": lambda: tf.Qwen2VLTextConfig(
        **SIZE, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])
    ),
}


def family(name):
    if name != "qwen2_vl":
        return build(FAMILIES[name]())
    torch.manual_seed(0)
    return tf.Qwen2VLTextModel(FAMILIES[name]()).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = family(name)
    report = rope_report(model)
    assert not report.ignored and report.equal_to_config and report.survives_save, report
    ids = torch.randint(32, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, exact = model(ids)[0], exact_rope(model)(ids)[0]
        torch.testing.assert_close(exact, plain, rtol=1e-4, atol=1e-5)
        assert rope_report(model).exact and not rope_report(model).ignored
        extend_rope(model, theta=1e8)
        moved, report = model(ids)[0], rope_report(model)
        assert (
            not report.ignored and abs(report.theta / 1e8 - 1) < 1e-3 and report.exact and report.survives_save
        ), report
        assert not torch.allclose(moved, plain, atol=1e-5)
        torch.testing.assert_close(exact_rope(model, exact=False)(ids)[0], moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "cohere", "llama4", "gemma3", "qwen2_vl"])
def test_exact_at_four_million(name):
    model = exact_rope(family(name))
    table = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    positions = torch.arange(3_999_000, 4_000_000)[None]
    kind = ("full_attention",) if name == "gemma3" else ()
    out = table(torch.zeros(1), positions.expand(3, -1, -1) if name == "qwen2_vl" else positions, *kind)
    theta = (model.config.rope_parameters["full_attention"] if kind else model.config.rope_parameters)["rope_theta"]
    f = theta ** (-2.0 * I / 32)
    true = np.exp(1j * positions[0].double().numpy()[:, None] * f)
    cos, sin = (out.real[0], out.imag[0]) if isinstance(out, torch.Tensor) else (out[0][0], out[1][0])
    layout = (
        (lambda t: t)
        if name == "llama4"
        else (lambda t: np.repeat(t, 2, -1)) if name == "cohere" else (lambda t: np.concatenate([t, t], -1))
    )
    assert cos.dtype == torch.float32
    assert (
        abs(cos.double().numpy() - layout(true.real)).max() < 1e-6
        and abs(sin.double().numpy() - layout(true.imag)).max() < 1e-6
    )


def test_exact_needs_a_live_model_in_order():
    model = build(qwen())
    by_hand(model)
    with pytest.raises(ValueError, match="not those of the configuration"):
        exact_rope(model)
    assert type(model.model.rotary_emb).__name__ == "Qwen2RotaryEmbedding"  # nothing half done
    with pytest.raises(ValueError, match="live model"):
        extend_rope(qwen(), theta=1e6, exact=True)


def test_exact_in_bfloat16_and_after_a_cast():
    model = exact_rope(build(qwen())).to(torch.bfloat16)
    positions = torch.arange(999_000, 1_000_000)[None]
    cos, _ = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    true = np.cos(positions[0].double().numpy()[:, None] * PLAIN)
    assert (
        cos.dtype == torch.bfloat16 and abs(cos[0, :, :16].double().numpy() - true).max() < 2e-3
    )  # rounding alone: 2 ** -9


def test_longva_and_save(tmp_path):
    from longva.mini import load

    model = load("mini-longva")[0]
    assert not rope_report(model).ignored
    extend_rope(model, "yarn", factor=4, exact=True)
    report = rope_report(model)
    assert not report.ignored and report.exact and report.survives_save and report.rope_type == "yarn", report
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    report = rope_report(again)
    assert not report.ignored and not report.exact and report.rope_type == "yarn"


def test_going_round_all_methods_ends_where_it_began():
    model, config = build(qwen()), qwen()
    before = config.to_dict()
    for method in DETAILS:
        for thing in (model, config):
            extend_rope(thing, method, **{k: v for k, v in ORACLE[method][0].items() if k[0] != "o"})
        extend_rope(model, theta=1e4), extend_rope(config, theta=1e4)
        assert config.to_dict() == before
    assert torch.equal(model.model.rotary_emb.inv_freq, build(qwen()).model.rotary_emb.inv_freq)


def test_logits_moved_puts_everything_back():
    model = build(qwen()).train()
    table = model.model.rotary_emb
    assert logits_moved(model, 1e4) == 0 < logits_moved(model, 1e7)
    with pytest.raises(KeyError):
        logits_moved(model, {"rope_type": "nonsense", "rope_theta": 1e4})
    assert model.model.rotary_emb is table and model.training


def test_base_search_restores_and_refuses():
    model, seen = build(qwen(rope_parameters=yarn())), []
    frequencies = model.model.rotary_emb.inv_freq.clone()

    def stop(m):
        if m.model.rotary_emb.inv_freq[-1] < 1e-8:
            raise KeyboardInterrupt
        return float(m.model.rotary_emb.inv_freq[-1])

    with pytest.raises(KeyboardInterrupt):
        base_search(model, stop, on_row=lambda *row: seen.append(row))
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies) and model.config.rope_parameters == yarn() and seen
    for wrong in (
        dict(score=[]),
        dict(score=stop, candidates=()),
        dict(score=stop, candidates=(0.5,)),
        dict(score=lambda m: math.nan),
    ):
        with pytest.raises(ValueError):
            base_search(model, **wrong)
    assert base_search(model, lambda m: math.nan if m.model.rotary_emb.rope_type == "yarn" else 1.0).best == 3e6


def test_not_a_rotary_model():
    model = build(tf.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    for call in (rope_report, lambda m: extend_rope(m, theta=1e6), exact_rope, lambda m: inverse_frequencies(m.config)):
        with pytest.raises(ValueError, match="rotary"):
            call(model)


def test_what_is_no_model_at_all():
    for wrong in ("x", None, torch.nn.Linear(2, 2), {"rope_theta": 1e6}):
        for call in (rope_report, exact_rope, lambda m: extend_rope(m, theta=1e6), lambda m: base_search(m, len)):
            needed = f"transformers model.* is needed, not a {type(wrong).__name__}: load one with from_pretrained\\.$"
            with pytest.raises(ValueError, match=needed):
                call(wrong)
    with pytest.raises(ValueError, match="transformers model is needed, not a Qwen2Config"):
        rope_report(tf.Qwen2Config())
