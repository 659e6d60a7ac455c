# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from cts_hf import CtsConfig, CtsForSemanticSegmentation, CtsPolicyConfig
from cts_hf.hub.normalization import HALF, IMAGENET

from ..helpers.models import tiny_config, tiny_model, tiny_policy


def test_defaults_are_the_small_model_of_the_paper():
    config = CtsConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert config.policy_config.superpatch_size == 2 * config.patch_size
    assert config.decoder_num_attention_heads == 6


def test_round_trip(tmp_path):
    labels = {0: "road", 1: "sky"}
    config = tiny_config(token_reduction=0.4375, num_labels=2, id2label=labels)
    config.save_pretrained(tmp_path)
    loaded = CtsConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.policy_config, CtsPolicyConfig)
    assert loaded.policy_config.width_coefficient == 0.1
    assert loaded.num_labels == 2


def test_policy_config_follows_the_patch_size():
    assert CtsConfig(patch_size=8, image_size=64).policy_config.superpatch_size == 16
    assert (
        CtsConfig(patch_size=8, image_size=64, policy_config={"output_stride": 16}).policy_config.output_stride == 16
    )


def test_the_normalization_is_one_number_per_channel(tmp_path):
    assert (CtsConfig().image_mean, CtsPolicyConfig().image_std) == ([0.5] * 3, [0.5] * 3)
    config = CtsConfig(num_channels=2, image_mean=0, image_std=(1, 0.25))
    assert (config.image_mean, config.image_std) == ([0.0, 0.0], [1.0, 0.25])
    assert all(type(value) is float for value in [*config.image_mean, *config.image_std])
    # What was set when `from_pretrained` has made the configuration is completed by the model.
    CtsForSemanticSegmentation(tiny_config()).save_pretrained(tmp_path)
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path, image_mean=0.25)
    assert (model.config.image_mean, model.config.policy_config.image_mean) == ([0.25] * 3, [0.5] * 3)


def test_a_policy_inherits_the_normalization_unless_it_names_its_own(tmp_path):
    for given in (None, {}, {"output_stride": 16}):
        policy_config = CtsConfig(**IMAGENET._asdict(), policy_config=given).policy_config
        assert (policy_config.image_mean, policy_config.image_std) == IMAGENET
    for given in ({"image_mean": 0.5, "image_std": 0.5}, CtsPolicyConfig()):
        config = CtsConfig(**IMAGENET._asdict(), policy_config=given)
        assert (config.policy_config.image_mean, config.policy_config.image_std) == HALF
        # Saved although these are its defaults: it would inherit otherwise.
        config.save_pretrained(tmp_path)
        again = CtsConfig.from_pretrained(tmp_path)
        assert (again.image_mean, again.image_std) == IMAGENET
        assert (again.policy_config.image_mean, again.policy_config.image_std) == HALF


def test_a_config_that_records_no_normalization_has_half(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for part in (values, values["policy_config"]):
        del part["image_mean"], part["image_std"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert CtsConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def changed(model, name, value):
    """Sets an option, `policy_config.NAME` one of the policy, of a model that exists."""
    *part, name = name.split(".")
    setattr(model.config.policy_config if part else model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_reduction", 0.9),
        ("token_reduction", float("nan")),
        ("image_std", [0.5, 0.5, 0.0]),
        ("num_hidden_layers", 0),
        ("policy_config.image_mean", [0.5]),
        ("policy_config.width_coefficient", float("nan")),
        ("policy_config.superpatch_size", 32),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(name, value, tmp_path):
    changed(tiny_model(), "token_reduction", 0.5).save_pretrained(tmp_path)
    model = changed(tiny_model(), name, value)
    for part in (model, model.config):
        with pytest.raises(ValueError, match=name.split(".")[-1]):
            part.save_pretrained(tmp_path)
    assert CtsForSemanticSegmentation.from_pretrained(tmp_path).config.token_reduction == 0.5


def test_a_policy_that_could_not_be_loaded_is_not_saved(tmp_path):
    policy = tiny_policy()
    policy.config.output_stride = 4
    with pytest.raises(ValueError, match="8, 16 or 32, got 4"):
        policy.save_pretrained(tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.suffix in (".json", ".safetensors")]


@pytest.mark.parametrize("name", ["decoder_num_attention_heads", "decoder_layer_norm_eps", "image_mean"])
def test_what_is_completed_can_be_saved(name, tmp_path):
    model = tiny_model()
    expected = model.config.to_dict()
    changed(model, name, None).save_pretrained(tmp_path)
    assert getattr(CtsForSemanticSegmentation.from_pretrained(tmp_path).config, name) == expected[name]


@pytest.mark.parametrize("config_class", [CtsConfig, CtsPolicyConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, r"`image_mean` must be finite numbers, one for each of 3 .* got \[0\.5, 0\.5\]"),
        ({"image_mean": []}, r"`image_mean` must be .* got \[\]"),
        ({"image_mean": float("nan")}, r"`image_mean` must be .* got nan"),
        ({"image_std": [0.5, 0.5, 0]}, r"`image_std` must be numbers above 0, .* got \[0\.5, 0\.5, 0\]"),
        ({"image_std": float("inf")}, r"`image_std` must be .* got inf"),
        ({"image_mean": "imagenet"}, "'image_mean' with value 'imagenet'"),
        ({"image_std": ["0.5", "0.5", "0.5"]}, r"'image_std' with value \['0\.5', '0\.5', '0\.5'\]"),
        ({"image_std": [True, True, True]}, "'image_std' with value .True, True, True."),
    ],
)
def test_what_is_no_normalization_is_refused_by_name(config_class, options, message):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        config_class(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_reduction": 0.8}, r"token_reduction.*0\.75 .*, got 0\.8"),
        ({"token_reduction": -0.1}, r"token_reduction.*-0\.1"),
        ({"token_reduction": (0.3, 0.3)}, r"`token_reduction` must be a number .* got \(0\.3, 0\.3\)"),
        ({"token_reduction": (0.5, 0.5), "superpatch_levels": (2, 4)}, r"levels \(2, 4\), .* got \(0\.5, 0\.5\)"),
        ({"token_reduction": 0.94, "superpatch_levels": (2, 4)}, r"0\.9375 .*, got 0\.94"),
        ({"sharing_threshold": 1.5}, r"`sharing_threshold` must be a probability .* got 1\.5"),
        ({"superpatch_levels": (2, 3)}, r"`superpatch_levels` must be sides .* got \(2, 3\): give for example \(2,\)"),
        ({"superpatch_levels": ()}, r"`superpatch_levels` must be sides .* got \(\)"),
        (
            {"policy_config": {"superpatch_levels": [2, 4]}},
            r"`policy_config.superpatch_levels` must be among those of the model, \(2,\), .* got \(2, 4\): give",
        ),
        ({"hiden_size": 64}, r"no option 'hiden_size'.*hidden_size"),
        ({"image_size": 100}, r"image_size.*16.*100"),
        ({"image_size": [64, 64, 64]}, r"image_size.*64, 64, 64"),
        ({"hidden_size": 100, "num_attention_heads": 3}, r"100.*num_attention_heads.*3"),
        ({"decoder_type": "fcn"}, r"mask_transformer.*linear.*fcn"),
        ({"unsharing": "mean"}, "`unsharing` must be one of 'copy', 'residual', got 'mean': choose one of them"),
        (
            {"superpatch_embedding": "own"},
            "`superpatch_embedding` must be one of 'projection', 'multiscale', got 'own'",
        ),
        (
            {"superpatch_embedding": "multiscale", "backbone_config": {"model_type": "dinov2"}},
            "`superpatch_embedding` must be 'projection' with a `backbone_config`, got 'multiscale': .* own weights",
        ),
        ({"policy_config": {"superpatch_size": 48}}, r"superpatch_size.*32.*48"),
        ({"policy_config": {"output_strid": 16}}, r"no option 'output_strid'"),
        ({"policy_loss_weight": -1}, r"policy_loss_weight.*-1"),
        ({"policy_loss_weight": float("nan")}, "policy_loss_weight. must be a finite number from 0 on, got nan"),
        ({"policy_loss_weight": float("inf")}, "policy_loss_weight. must be a finite number from 0 on, got inf"),
        ({"token_reduction": float("nan")}, r"token_reduction.*got nan"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps. must be a finite number from 0 on, got nan"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps. must be a finite number from 0 on, got -1e-05"),
        (
            {"decoder_layer_norm_eps": float("inf")},
            "decoder_layer_norm_eps. must be a finite number from 0 on, got inf",
        ),
        ({"initializer_range": float("nan")}, "initializer_range. must be a finite number from 0 on, got nan"),
        ({"initializer_range": -0.02}, r"initializer_range. must be a finite number from 0 on, got -0\.02"),
        ({"hidden_dropout_prob": float("nan")}, r"hidden_dropout_prob.*got nan"),
        ({"drop_path_rate": 2}, r"drop_path_rate.*2"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers.*0"),
        ({"intermediate_size": 0}, r"intermediate_size.*0"),
        ({"decoder_num_attention_heads": 0}, r"decoder_num_attention_heads.*0"),
        ({"decoder_num_hidden_layers": -1}, r"decoder_num_hidden_layers.*-1"),
        ({"auxiliary_loss_weight": float("nan")}, "auxiliary_loss_weight. must be a finite number from 0 on, got nan"),
        ({"decoder_type": "setr_pup", "decoder_num_upsampling_layers": 0}, r"decoder_num_upsampling_layers.*got 0"),
        ({"decoder_type": "setr_pup", "auxiliary_num_upsampling_layers": 0}, r"auxiliary_num_upsampling.*got 0"),
        ({"decoder_type": "setr_mla", "decoder_hidden_size": 9}, r"decoder_hidden_size. must be an even.* got 9"),
        ({"decoder_type": "setr_mla", "decoder_layer_indices": [3, 5]}, r"end with the last, 11, got \[3, 5\]"),
        ({"decoder_type": "setr_mla", "decoder_layer_indices": [5, 3, 11]}, r"in their order, .* got \[5, 3, 11\]"),
        ({"decoder_type": "setr_mla", "decoder_layer_indices": [-1, 11]}, r"from 0 on, .* got \[-1, 11\]"),
        ({"decoder_type": "setr_mla", "decoder_layer_indices": []}, r"decoder_layer_indices. must be .* got \[\]"),
    ],
)
def test_refusals_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        CtsConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 4}, "8, 16 or 32, got 4"),
        ({"superpatch_size": 15}, "`superpatch_size` must be a multiple of 2 pixels, .* got 15: give"),
        ({"superpatch_levels": [4, 2]}, r"`superpatch_levels` must be sides of superpatches .* got \[4, 2\]"),
        ({"superpatch_levels": (3,)}, "`superpatch_size` must be a multiple of 3 pixels, .* got 32: give"),
        ({"width_coefficient": 0}, "width_coefficient"),
        ({"width_coefficient": float("nan")}, "width_coefficient. must be a finite number above 0, got nan"),
        ({"depth_coefficient": float("inf")}, "depth_coefficient. must be a finite number above 0, got inf"),
        ({"batch_norm_eps": float("nan")}, "batch_norm_eps. must be a finite number from 0 on, got nan"),
        ({"initializer_range": float("inf")}, "initializer_range. must be a finite number from 0 on, got inf"),
        ({"strid": 16}, "no option 'strid'"),
    ],
)
def test_policy_refusals_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        CtsPolicyConfig(**options)


def test_a_linear_decoder_has_no_heads_that_could_not_fit():
    config = CtsConfig(hidden_size=200, num_attention_heads=4, decoder_type="linear")
    assert config.hidden_size == 200


def test_an_epsilon_that_is_a_whole_number_serves_the_decoder_too():
    assert CtsConfig(layer_norm_eps=1).decoder_layer_norm_eps == 1


@pytest.mark.parametrize(
    ("decoder_type", "num_hidden_layers", "expected"),
    [
        ("setr_naive", 24, [9, 14, 19, 23]),
        ("setr_pup", 12, [4, 7, 9, 11]),
        ("setr_mla", 24, [5, 11, 17, 23]),
        ("setr_mla", 12, [2, 5, 8, 11]),
        ("setr_mla", 1, [0, 0, 0, 0]),
    ],
)
def test_setr_sees_layers_in_proportion(decoder_type, num_hidden_layers, expected):
    config = CtsConfig(decoder_type=decoder_type, num_hidden_layers=num_hidden_layers)
    assert config.decoder_layer_indices == expected


def test_options_of_setr_are_saved_with_its_decoders_alone(tmp_path):
    CtsConfig(decoder_type="setr_pup", decoder_hidden_size=64, auxiliary_loss_weight=0.1).save_pretrained(tmp_path)
    loaded = CtsConfig.from_pretrained(tmp_path)
    assert (loaded.decoder_hidden_size, loaded.auxiliary_loss_weight) == (64, 0.1)
    assert (loaded.decoder_num_upsampling_layers, loaded.decoder_layer_indices) == (4, [4, 7, 9, 11])
    assert not [name for name in CtsConfig(decoder_type="linear").to_dict() if "auxiliary" in name]


def test_options_of_sharing_are_saved_where_they_are_not_the_default(tmp_path):
    added = {"unsharing": "residual", "superpatch_embedding": "multiscale"}
    new = {"superpatch_levels", "sharing_threshold", *added}
    tiny_config().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert not new & (values.keys() | values["policy_config"].keys() | tiny_policy().config.to_dict().keys())
    options = {"superpatch_levels": [2, 4], "token_reduction": (0.2, 0.3), "sharing_threshold": 0.9, **added}
    for policy_config, expected in (({}, (2, 4)), ({"superpatch_levels": (2,)}, (2,)), (CtsPolicyConfig(), (2,))):
        config = CtsConfig(**options, policy_config=policy_config)
        config.save_pretrained(tmp_path)
        for again in (config, CtsConfig.from_pretrained(tmp_path)):
            assert (again.superpatch_levels, again.token_reduction, again.sharing_threshold) == (
                (2, 4),
                (0.2, 0.3),
                0.9,
            )
            assert {name: getattr(again, name) for name in added} == added
            assert again.policy_config.superpatch_levels == expected
    assert CtsConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(("levels", "superpatch_size"), [((2, 4), 32), ((2, 4, 8), 32), ((3, 6), 48), ((4,), 64)])
def test_the_policy_has_the_levels_of_the_model(levels, superpatch_size):
    config = CtsConfig(superpatch_levels=levels)
    assert config.superpatch_size == config.policy_config.superpatch_size == superpatch_size
    assert config.superpatch_levels == config.policy_config.superpatch_levels == levels
