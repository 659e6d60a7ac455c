# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

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
    check_hub_name,
    parse_recipe,
    refuse_another_recipe,
    save_recipe,
)

from ..helpers.training_runs import EXAMPLES, TINY_MODEL, TINY_POLICY, write_scenes


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
    for argv in (["--data_dir", "folder"], ["--data-dir", "folder"], ["--dataset=ade20k"], [other]):
        assert parse_recipe(SEGMENTER, argv, default)[1].hidden_size == ModelArguments().hidden_size


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data_d", "data"], "unrecognized arguments: --data_d data"),
        (["--recipe", "a.yaml", "--recipe", "b.yaml"], "expected one recipe, got a.yaml, b.yaml"),
        (["a.yaml", "--recipe", "b.yaml"], "expected one recipe, got a.yaml, b.yaml"),
    ],
)
def test_command_lines_that_may_mean_two_things_are_refused(tmp_path, capsys, argv, message):
    default = write(tmp_path / "default.yaml", "hidden_size: 48")
    with pytest.raises(SystemExit):
        parse_recipe(SEGMENTER, argv, default)
    assert message in capsys.readouterr().err


def test_help_shows_the_values_of_the_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", "hidden_size: 4321"), "--help"])
    assert "(default: 4321)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", r"unknown options \['hiden_size'\]. There are .*hidden_size"),
        ("- hidden_size", "must map options to values, it is a list"),
        ("5", "must map options to values, it is a int"),
        ("no: 3", r"unknown options \['no'\]"),
        ("<<: {seed: 3}", r"unknown options \['<<'\]"),
        ("seed: 1\nbatch_size: 2\nseed: 3", "each option must be given once, got 'seed' again: delete one"),
        ("seed: 1\n'seed': 3", "each option must be given once, got 'seed' again: delete one"),
        ("classes: &names [a, b]", "anchors .* are not allowed"),
        ("a: &a [x]\nb: &b [*a, *a]\nclasses: *b", "anchors .* are not allowed"),
        ("classes: [*]", "cannot be read as YAML"),
        ("data_dir: !!binary aGk=", "tags .* are not allowed: write the value, text in quotes"),
        ("photometric_distortion: !!bool maybe", "tags .* are not allowed"),
        ("classes: " + 100_000 * "[", "is nested too deeply"),
        (f"learning_rate: {'1:' * 400}1.5", "cannot be read as YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "batch_size": 2, "seed": 3}', "each option must be given once, got 'seed' again: delete one"),
        ('{"classes": ' + 100_000 * "[", "is nested too deeply"),
        ("[1]", "must map options to values, it is a list"),
        ("null", "must map options to values, it is a NoneType"),
    ],
)
def test_bad_recipes_in_json_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.json", text)])


@pytest.mark.parametrize(
    ("option", "value"),
    [("overwrite_output_dir", "true"), ("resume_from_checkpoint", "latest"), ("push_to_hub", "true")],
)
def test_recipes_neither_replace_nor_go_on_nor_upload(tmp_path, option, value):
    recipe = write(tmp_path / "recipe.yaml", f"{option}: {value}")
    with pytest.raises(ValueError, match=f"`{option}` must be given on the command line, got '?{value}'? in the rec"):
        parse_recipe(SEGMENTER, [recipe])
    *_, run = parse_recipe(SEGMENTER, [f"--{option}", value])
    save_recipe(tmp_path, [run])
    assert option not in yaml.safe_load((tmp_path / "train.yaml").read_text())
    *_, repeated = parse_recipe(SEGMENTER, [str(tmp_path / "train.yaml")])
    assert getattr(repeated, option) == getattr(OptimizationArguments(), option)
    refuse_another_recipe(tmp_path, [run])
    refuse_another_recipe(tmp_path, [repeated])


def test_recipes_that_hold_the_defaults_of_what_is_for_the_command_line_are_read(tmp_path):
    text = "overwrite_output_dir: false\nresume_from_checkpoint: null\npush_to_hub: false\nhub_model_id: me/model"
    *_, run = parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])
    assert run == OptimizationArguments(hub_model_id="me/model")


def test_a_train_yaml_that_is_no_recipe_is_refused(tmp_path):
    write(tmp_path / "train.yaml", "[]")
    with pytest.raises(ValueError, match=r"train.yaml cannot be read .*it is a list"):
        refuse_another_recipe(tmp_path, [OptimizationArguments()])


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
        *(
            (
                f"{name}: {value}",
                f"argument --{name}: invalid value: {value} in .*must be a string: write it in quotes",
            )
            for name, value in [
                ("data_dir", "010"),
                ("dataset", "2024_10"),
                ("dataset", "2024-10-01"),
                ("mixed_precision", "no"),
                ("hub_model_id", "1.0"),
            ]
        ),
        *(
            (
                f"classes: [a, {value}]",
                f"argument --classes: invalid value: {re.escape(shown)} in .*: write it in quotes",
            )
            for value, shown in [
                *((word, word) for word in ("no", "yes", "null", "010", "1.0", "1:30")),
                ("[a, b]", "['a', 'b']"),
                ("{a: b}", "{'a': 'b'}"),
            ]
        ),
        *(
            (f"seed: {value}", f"argument --seed: invalid value: {value} in the recipe .*it must be a whole number")
            for value in ("010", "1:30", "0x10", "0b1", "true", "1.0", "2024-10-01")
        ),
        *(
            (f"learning_rate: {value}", f"--learning_rate: invalid value: {value} in .*it must be a decimal number")
            for value in ("010", "1:30", "1:30.5", "yes", "0x" + 20 * "f")
        ),
        *(
            (f"push_to_hub: {value}", f"--push_to_hub: invalid value: {value} in .*must be true or false, without")
            for value in ("'true'", "1", "0", "'no'")
        ),
        *(
            (f"{name}: {value}", rf"--{name}: expected a value in the recipe .*, got {shown}: .* for its default, ")
            for name, value, shown in [
                ("batch_size", "", "null"),
                ("learning_rate", "null", "null"),
                ("learning_rate", "~", "~"),
                ("scale_range", "[]", r"\[\]"),
                ("base_size", "[]", r"\[\]"),
                ("report_to", "null", "null"),
                ("overwrite_output_dir", "null", "null"),
            ]
        ),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, capsys, text, message):
    with pytest.raises((SystemExit, ValueError)) as refusal:
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])
    assert re.search(message, capsys.readouterr().err + str(refusal.value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data_dir": 10}', "--data_dir: invalid value: 10 in .*: write it in quotes"),
        ('{"classes": ["a", null]}', "--classes: invalid value: null in .*: write it in quotes"),
        ('{"seed": true}', "--seed: invalid value: true in .*must be a whole number"),
        ('{"push_to_hub": 1}', "--push_to_hub: invalid value: 1 in .*must be true or false"),
        ('{"seed": null}', "--seed: expected a value in .*got null"),
        ('{"learning_rate": NaN}', "--learning_rate: invalid value: NaN"),
        ('{"learning_rate": 1' + 400 * "0" + "}", "--learning_rate: invalid value: 1.*0 in "),
    ],
)
def test_values_of_another_type_in_json_are_refused(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit):
        parse_recipe(SEGMENTER, [write(tmp_path / "recipe.json", text)])
    assert re.search(message, capsys.readouterr().err)


def test_values_are_taken_as_they_are_written(tmp_path):
    text = """
    classes: ["no", 'null', "010", plain, =, <<]
    mixed_precision: "no"
    batch_size: 1_0
    max_steps: "7"
    learning_rate: 1e-3
    min_lr: 1.0e-5
    weight_decay: 1
    photometric_distortion: no
    cpu_threads: null
    report_to: []
    """
    data, *_, run = parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])
    assert data == DataArguments(classes=["no", "null", "010", "plain", "=", "<<"], photometric_distortion=False)
    assert run == OptimizationArguments(
        mixed_precision="no", batch_size=10, max_steps=7, learning_rate=1e-3, min_lr=1e-5, weight_decay=1.0
    )


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


@pytest.mark.parametrize("types", [SEGMENTER, POLICY])
def test_budgets_of_several_levels_are_in_recipes_as_on_the_command_line(tmp_path, types):
    text = "superpatch_levels: [2, 4]\ntoken_reduction: 0.2,0.3"
    arguments = parse_recipe(types, [write(tmp_path / "recipe.yaml", text)])
    assert (arguments[1].levels, arguments[1].token_reduction) == ((2, 4), (0.2, 0.3))
    save_recipe(tmp_path, arguments)
    assert "\ntoken_reduction: 0.2,0.3\n" in (tmp_path / "train.yaml").read_text()
    assert parse_recipe(types, ["--recipe", str(tmp_path / "train.yaml")]) == arguments
    refuse_another_recipe(tmp_path, arguments)
    other = parse_recipe(types, ["--recipe", str(tmp_path / "train.yaml"), "--token_reduction", "0.2,0.3017578125"])
    with pytest.raises(ValueError, match=r"token_reduction '0\.2,0\.3' -> '0\.2,0\.3017578125'"):
        refuse_another_recipe(tmp_path, other)
    save_recipe(tmp_path, other)
    assert parse_recipe(types, ["--recipe", str(tmp_path / "train.yaml")]) == other


def test_budgets_that_are_no_words_are_refused(tmp_path, capsys):
    for text in ("token_reduction: [0.2, 0.3]", "token_reduction: 0.2;0.3", "token_reduction: true"):
        with pytest.raises(SystemExit):
            parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", text)])
        assert "--token_reduction: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [ModelArguments, SuperpatchArguments])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_reduction": 0.8}, r"`token_reduction` must be a number between 0 \(no sharing\) and 0.75"),
        ({"token_reduction": (0.2, 0.3)}, r"`token_reduction` must be a number between 0 \(no sharing\) and 0.75"),
        ({"superpatch_levels": [2, 4], "token_reduction": 0.95}, r"`token_reduction` must be .* and 0.9375"),
        ({"superpatch_levels": [2, 4], "token_reduction": (0.5, 0.5)}, r"`token_reduction` must be .* one for each"),
        ({"superpatch_levels": [2, 3]}, r"`superpatch_levels` must be sides of superpatches .* got \[2, 3\]"),
    ],
)
def test_budgets_that_the_levels_do_not_allow_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


def test_options_of_sharing_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"`token_reduction` must be above 0 .*, got 0 and 0\.9"):
        ModelArguments(token_reduction=0, sharing_threshold=0.9)
    with pytest.raises(ValueError, match="`sharing_threshold` must be a probability between 0 and 1"):
        ModelArguments(sharing_threshold=1.5)
    with pytest.raises(ValueError, match="`superpatch_levels` must be 2 for a model of transformers"):
        SuperpatchArguments(superpatch_levels=[2, 4], for_model="facebook/dinov2-small")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_only_options_that_there_are(recipe):
    arguments = parse_recipe(POLICY if recipe.stem.startswith("policy") else SEGMENTER, [str(recipe)])
    for group in arguments:
        for name, value in vars(group).items():
            assert yaml.safe_load(recipe.read_text()).get(name, value) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` must be at least 1.*, got 0"),
        ({"learning_rate": 0, "min_lr": 0}, r"`learning_rate` must be above 0.*, got 0"),
        ({"num_epochs": 0}, "`num_epochs` or `max_steps` must be above 0, got 0 and 0: set one"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizationArguments(**options)


LONG = "9" * 400


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_steps", LONG], rf"`max_steps` must be at least 0 and at most 1000000000.*, got {LONG}"),
        (["--seed", LONG], rf"`seed` must be between 0 and 4294967295.*, got {LONG}"),
        (
            ["--ignore_index", f"-{LONG}"],
            r"`ignore_index` must be a finite number of at most 1000000000 in magn.*, got .*",
        ),
        (["--num_epochs", "1e308"], r"`num_epochs` must be between 0 and 1000000.*, got 1e\+308"),
        (["--num_epochs", "nan"], r"`num_epochs` must be between 0 and 1000000.*, got nan"),
        (
            ["--learning_rate", "1e38"],
            r"`learning_rate` must be a finite number of at most 1000 in m.*, got 1e\+38",
        ),
        (["--policy_learning_rate", "1e38"], r"`policy_learning_rate` must be .* of at most 1000 in magn"),
        (["--policy_epochs", "1e308"], r"`policy_epochs` must be between 0 and 1000000.*, got .*"),
        (
            ["--scale_range", "1e9", "1e9"],
            r"`scale_range` must be a finite number of at most 100 in magnitude.*, got .*",
        ),
        (["--crop_size", "1000000"], r"`crop_size` must be between 1 and 100000.*, got 1000000"),
        (["--base_size", "512", LONG], r"`base_size` must be between 1 and 100000.*, got .*"),
        (["--eval_window", LONG], r"`eval_window` must be between 1 and 100000.*, got .*"),
        (["--num_hidden_layers", "1000000"], r"`num_hidden_layers` must be between 0 and 1000.*, got 1000000"),
        (["--hidden_size", LONG], r"`hidden_size` must be between 1 and 100000.*, got .*"),
        (["--policy_depth_coefficient", "1e9"], r"`policy_depth_coefficient` must be between 0 and 10.*, got .*"),
        (["--policy_width_coefficient", "1e9"], r"`policy_width_coefficient` must be between 0 and 10.*, got .*"),
        (["--cpu_threads", "100000"], r"`cpu_threads` must be between 1 and 1024.*, got 100000"),
        (["--num_workers", "100000"], r"`num_workers` must be between 0 and 1024.*, got 100000"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_numbers_beyond_any_use_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(SEGMENTER, argv)


def test_no_trackers_are_an_empty_list(tmp_path):
    assert parse_recipe(SEGMENTER, ["--report_to", "none"])[-1] == OptimizationArguments()
    assert parse_recipe(SEGMENTER, [write(tmp_path / "recipe.yaml", "report_to: none")])[-1] == OptimizationArguments()
    with pytest.raises(ValueError, match=r"`report_to` must be 'none' alone or without it.*, got \['none', 'wandb'\]"):
        parse_recipe(SEGMENTER, ["--report_to", "none", "wandb"])


def test_names_that_no_repository_can_have_are_refused(tmp_path, monkeypatch):
    folder = str(tmp_path / "my model")
    with pytest.raises(
        ValueError, match=r"must be a name that a repository .*, got 'my model' .*: pass --hub_model_id"
    ):
        check_hub_name(OptimizationArguments(output_dir=folder, push_to_hub=True))
    check_hub_name(OptimizationArguments(output_dir=folder, push_to_hub=True, hub_model_id="me/my-model"))
    check_hub_name(OptimizationArguments(output_dir=folder))
    # The name of a relative folder is that of the folder itself.
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    check_hub_name(OptimizationArguments(output_dir=".", push_to_hub=True))


def test_policies_that_are_trained_twice_or_never_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is trained already and policy_epochs is 1"):
        PolicySourceArguments(policy="folder", policy_epochs=1)
    data = DataArguments(data_dir=str(write_scenes(tmp_path, 1, 1))).load()
    policy = build_policy(PolicyArguments(**TINY_POLICY), 8)
    args, source = ModelArguments(**TINY_MODEL, token_reduction=0), PolicySourceArguments(policy_loss_weight=1)
    with pytest.raises(ValueError, match="policy_loss_weight is 1 and token_reduction 0"):
        build_segmenter(args, policy, source, data, 64)
