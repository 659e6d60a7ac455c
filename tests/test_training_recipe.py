import re

import pytest
import yaml

from cts_hf.training import (
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicyOptimizationArguments,
    PolicySourceArguments,
    SuperpatchArguments,
    build_policy,
    build_segmenter,
    parse_recipe,
    save_recipe,
)

from .training_runs import EXAMPLES, TINY_MODEL, TINY_POLICY, write_scenes


SEGMENTER = (DataArguments, ModelArguments, PolicyArguments, PolicySourceArguments, OptimizationArguments)
POLICY = (DataArguments, SuperpatchArguments, PolicyArguments, PolicyOptimizationArguments)
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
@pytest.mark.parametrize("flag", [["--recipe"], []])
def test_the_command_line_overrides_the_recipe(tmp_path, name, flag):
    recipe = write(tmp_path / name, '{"learning_rate": 0.5, "hidden_size": 64, "photometric_distortion": false}')
    data, model, _, _, args = parse_recipe(
        SEGMENTER, [*flag, recipe, "--hidden_size", "32", "--scale_range", "1", "2"]
    )
    assert (args.learning_rate, model.hidden_size, data.photometric_distortion) == (0.5, 32, False)
    assert data.scale_range == [1.0, 2.0]
    assert model.num_hidden_layers == ModelArguments().num_hidden_layers


def test_every_effective_value_is_saved_and_repeats_the_run(tmp_path):
    argv = ["--dataset", "ade20k", "--data_dir", "there", "--learning_rate", "1e-4", "--classes", "a b", "c"]
    arguments = parse_recipe(SEGMENTER, [*argv, "--no_photometric_distortion"])
    save_recipe(tmp_path, arguments)
    assert parse_recipe(SEGMENTER, ["--recipe", str(tmp_path / "train.yaml")]) == arguments


def test_the_default_recipe_is_for_runs_that_name_nothing(tmp_path):
    default = write(tmp_path / "default.yaml", "hidden_size: 48")
    other = write(tmp_path / "other.yaml", "num_hidden_layers: 3")
    assert parse_recipe(SEGMENTER, ["--seed", "1"], default)[1].hidden_size == 48
    for argv in (["--data_dir", "folder"], ["--dataset=ade20k"], [other]):
        assert parse_recipe(SEGMENTER, argv, default)[1].hidden_size == ModelArguments().hidden_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", r"unknown options \['hiden_size'\]. There are .*hidden_size"),
        ("- hidden_size", "must map options to values, it is a list"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])


def test_a_recipe_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"There is no recipe nowhere.yaml"):
        parse_recipe(SEGMENTER, ["--recipe", "nowhere.yaml"])


def test_values_in_a_recipe_are_checked_as_those_of_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", "optimizer: sdg")])
    assert "invalid choice: 'sdg'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: many", "argument --batch_size: invalid value: 'many' in the recipe"),
        ("batch_size: [1, 2]", r"argument --batch_size: expected one value in the recipe .*, got \[1, 2\]"),
        ("batch_size: {a: 1}", "argument --batch_size: invalid value: {'a': 1}"),
        ("flip: [1", "cannot be read as YAML or JSON in UTF-8"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, capsys, text, message):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])
    assert re.search(message, capsys.readouterr().err + str(refusal.value))


def test_values_never_become_options(tmp_path):
    text = "data_dir: --overwrite_output_dir\nclasses: [a, --push_to_hub, 'true', -x, '--', '@file']"
    data, *_, run = parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])
    assert data.data_dir == "--overwrite_output_dir"
    assert data.classes == ["a", "--push_to_hub", "true", "-x", "--", "@file"]
    assert (run.push_to_hub, run.overwrite_output_dir) == (False, False)


def test_what_a_run_saves_is_a_recipe_of_the_same_options(tmp_path):
    data = DataArguments(classes=["-a", "--push_to_hub", "null", "1"], scale_range=[0.5, 1], streaming=True)
    run = OptimizationArguments(output_dir="-o", learning_rate=1e-7, min_lr=0)
    arguments = (data, ModelArguments(), PolicyArguments(), PolicySourceArguments(), run)
    save_recipe(tmp_path, arguments)
    assert parse_recipe(SEGMENTER, ["--recipe", str(tmp_path / "train.yaml")]) == arguments


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_only_options_that_there_are(recipe):
    arguments = parse_recipe(POLICY if recipe.stem.startswith("policy") else SEGMENTER, [str(recipe)])
    for group in arguments:
        for name, value in vars(group).items():
            assert yaml.safe_load(recipe.read_text()).get(name, value) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, it must be at least 1"),
        ({"learning_rate": 0, "min_lr": 0}, "learning_rate is 0, it must be above 0"),
        ({"num_epochs": 0}, "num_epochs is 0 and max_steps 0: one must be above 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizationArguments(**options)


def test_policies_that_are_trained_twice_or_never_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is trained already and policy_epochs is 1"):
        PolicySourceArguments(policy="folder", policy_epochs=1)
    data = DataArguments(data_dir=str(write_scenes(tmp_path, 1, 1))).load()
    policy = build_policy(PolicyArguments(**TINY_POLICY), 8)
    args, source = ModelArguments(**TINY_MODEL, token_reduction=0), PolicySourceArguments(policy_loss_weight=1)
    with pytest.raises(ValueError, match="policy_loss_weight is 1 and token_reduction 0"):
        build_segmenter(args, policy, source, data, 64)
