import pytest

from cts_hf import CtsConfig, CtsPolicyConfig

from .models import tiny_config


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_reduction": 0.8}, r"token_reduction.*0\.75, got 0\.8"),
        ({"token_reduction": -0.1}, r"token_reduction.*-0\.1"),
        ({"hiden_size": 64}, r"no option 'hiden_size'.*hidden_size"),
        ({"image_size": 100}, r"image_size.*16.*100"),
        ({"image_size": [64, 64, 64]}, r"image_size.*64, 64, 64"),
        ({"hidden_size": 100, "num_attention_heads": 3}, r"100.*num_attention_heads.*3"),
        ({"decoder_type": "fcn"}, r"mask_transformer.*linear.*fcn"),
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
    ],
)
def test_refusals_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        CtsConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 4}, "8, 16 or 32, got 4"),
        ({"superpatch_size": 15}, "15"),
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
