# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle
import threading

import pytest
import torch
import transformers

from cts_hf import CtsPolicyConfig, CtsPolicyModel, apply_cts, remove_cts

from ..helpers.existing_models import ENCODER_KINDS, KINDS, PATCH_SIZE, build_existing, call_existing, sizes, tensors
from ..helpers.models import random_images, tiny_config, tiny_model, tiny_policy


def random_scores(height, width, batch_size=2, seed=1):
    shape = (batch_size, height // PATCH_SIZE // 2, width // PATCH_SIZE // 2)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def differences(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    return {name: (first[name].float() - second[name].float()).abs().max().item() for name in first}


def states(outputs):
    """What a model gives in the end, of any kind."""
    for name in ("logits", "masks_queries_logits", "predicted_depth", "last_hidden_state"):
        if outputs.get(name) is not None:
            return outputs[name]
    return outputs.feature_maps[-1]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_nothing_changes_without_sharing(name, attn_implementation):
    if attn_implementation == "sdpa" and not getattr(transformers, KINDS[name].model)._supports_sdpa:
        pytest.skip("upstream has no such attention")
    model = build_existing(name, attn_implementation)
    for height, width in sizes(name):
        images = random_images(2, height, width)
        options = {"output_hidden_states": True}
        expected = call_existing(model, name, images, **options)
        apply_cts(model)
        same = call_existing(model, name, images, token_reduction=0.0, **options)
        assert set(differences(expected, same).values()) == {0.0}
        assert isinstance(same, type(expected))
        assert not same.shared_superpatches.any()
        assert same.num_tokens.tolist() == 2 * [height // PATCH_SIZE * (width // PATCH_SIZE)]
        remove_cts(model)
        after = call_existing(model, name, images, **options)
        assert type(after) is type(expected)
        assert set(differences(expected, after).values()) == {0.0}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_shared_tokens_come_back_as_patches(name):
    model = build_existing(name)
    for height, width in sizes(name):
        images, scores = random_images(2, height, width), random_scores(height, width)
        options = {"output_hidden_states": True}
        plain = call_existing(model, name, images, **options)
        apply_cts(model)
        for token_reduction in (0.02, 0.3, 0.75):
            outputs = call_existing(
                model, name, images, superpatch_scores=scores, token_reduction=token_reduction, **options
            )
            shapes = {key: value.shape for key, value in tensors(outputs).items()}
            assert shapes == {key: value.shape for key, value in tensors(plain).items()}
            assert all(value.isfinite().all() for value in tensors(outputs).values())
            assert outputs.shared_superpatches.shape == scores.shape
            num_patches = height // PATCH_SIZE * (width // PATCH_SIZE)
            num_shared = outputs.shared_superpatches.sum((1, 2))
            assert (num_shared == min(round(token_reduction * num_patches / 3), scores[0].numel())).all()
            assert torch.equal(outputs.num_tokens, num_patches - 3 * num_shared)
            chosen = outputs.shared_superpatches
            if 0 < num_shared[0] < scores[0].numel():
                assert scores[0][chosen[0]].min() > scores[0][~chosen[0]].max()
                assert not torch.equal(states(outputs), states(plain))
        # Each image gets what it gets alone.
        alone = call_existing(model, name, images[1:], superpatch_scores=scores[1:], token_reduction=0.75, **options)
        largest = states(alone).abs().max().item()
        torch.testing.assert_close(states(outputs)[1:], states(alone), rtol=1e-3, atol=1e-3 * largest)
        remove_cts(model)


@pytest.mark.parametrize("name", [*ENCODER_KINDS, "eomt", "eomt_dinov3"])
@torch.no_grad()
def test_a_shared_token_of_equal_patches_is_the_mean_of_theirs(name):
    """The first hidden states: a patch's own, or the mean of four that look alike and differ in their positions."""
    model = build_existing(name)
    for height, width in sizes(name):
        patch = random_images(2, PATCH_SIZE, PATCH_SIZE)[:, :, :1, :1]
        images = patch.expand(-1, -1, height, width)
        plain = tensors(call_existing(model, name, images, output_hidden_states=True))["hidden_states.0"]
        apply_cts(model)
        outputs = call_existing(
            model,
            name,
            images,
            token_reduction=0.4,
            superpatch_scores=random_scores(height, width),
            output_hidden_states=True,
        )
        remove_cts(model)
        shared = outputs.shared_superpatches
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        patches, got = (
            value[:, -rows * columns :].unflatten(1, (rows, columns)).movedim(3, 1)
            for value in (plain, tensors(outputs)["hidden_states.0"])
        )
        whole = (..., slice(2 * shared.shape[1]), slice(2 * shared.shape[2]))
        means = torch.nn.functional.avg_pool2d(patches[whole], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = patches.clone()
        is_shared = shared[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected[whole] = torch.where(is_shared, means, patches[whole])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "beit", "eomt"])
@torch.no_grad()
def test_the_policy_chooses(name):
    """As it does by itself on the same images, for which they are renormalized and odd borders cut off."""
    model, policy = build_existing(name), tiny_policy(image_mean=0.5, image_std=0.5)
    for height, width in sizes(name):
        images = random_images(2, height, width)
        mean, std = (torch.tensor(values)[:, None, None] for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
        pixels = (images * std + mean)[..., : height // 16 * 16, : width // 16 * 16]
        logits = policy((pixels - 0.5) / 0.5).logits
        apply_cts(model, policy, 0.3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
        by_policy = call_existing(model, name, images)
        by_scores = call_existing(model, name, images, superpatch_scores=logits[:, 1] - logits[:, 0])
        assert torch.equal(by_policy.shared_superpatches, by_scores.shared_superpatches)
        assert by_policy.shared_superpatches.any()
        assert torch.equal(states(by_policy), states(by_scores))
        remove_cts(model)


@torch.no_grad()
def test_a_policy_of_several_levels_serves_with_its_first():
    policy, images = tiny_policy(superpatch_levels=(2, 4)), random_images(2, 48, 80)
    model = apply_cts(build_existing("dinov2"), policy, image_mean=0.5, image_std=0.5)
    policy.config.image_mean = policy.config.image_std = 0.5
    logits = policy(images).logits[0][:, :, :3, :5]
    outputs = model(images)
    scores = logits[:, 1] - logits[:, 0]
    for given in (scores, (scores,)):
        expected = model(images, superpatch_scores=given)
        assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)
        assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)


def test_the_normalization_is_that_of_the_image_processor(tmp_path):
    build_existing("dinov2").save_pretrained(tmp_path)
    options = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert apply_cts(model).token_sharing.image_mean == (0.485, 0.456, 0.406)
    transformers.BitImageProcessor(**options).save_pretrained(tmp_path)
    sharing = apply_cts(transformers.AutoModel.from_pretrained(tmp_path)).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    sharing = apply_cts(transformers.AutoModel.from_pretrained(tmp_path), image_mean=0.5).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6))
    transformers.BitImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    sharing = apply_cts(transformers.AutoModel.from_pretrained(tmp_path)).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert apply_cts(build_existing("beit")).token_sharing.image_mean == (0.5, 0.5, 0.5)


def test_the_policy_stays_frozen_and_in_evaluation_mode():
    model = apply_cts(build_existing("dinov2"), tiny_policy())
    before = copy.deepcopy(model.token_sharing.policy.state_dict())
    model.train()
    call_existing(model, "dinov2", random_images()).last_hidden_state.sum().backward()
    after = model.token_sharing.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.token_sharing.policy.parameters())
    assert not model.token_sharing.policy.training


def test_the_state_dict_is_upstreams(tmp_path):
    model = build_existing("dinov2")
    expected = model.state_dict()
    apply_cts(model, tiny_policy())
    assert model.state_dict().keys() == expected.keys()
    model.load_state_dict(expected)
    torch.nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{name}": value for name, value in expected.items()})
    model.save_pretrained(tmp_path)
    reloaded, info = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in expected.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ENCODER_KINDS)
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    """Also if another forward comes in between, with other tokens."""
    if use_reentrant and name == "beit_shared_bias":
        pytest.skip("upstream cannot do it: a bias that all layers share is backpropagated through by each")
    model = apply_cts(build_existing(name))
    images, scores = random_images(), random_scores(64, 64)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        outputs = call_existing(model, name, images, superpatch_scores=scores)
        call_existing(model, name, images, superpatch_scores=-scores, token_reduction=0.6)
        states(outputs).square().mean().backward()
        with_gradient = [(key, value) for key, value in model.named_parameters() if value.grad is not None]
        gradients.append({key: value.grad.clone() for key, value in with_gradient if value.numel()})
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys()
    for key, value in without.items():
        torch.testing.assert_close(with_checkpoints[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
    remove_cts(model)
    assert not any("_CheckpointInCall" in repr(vars(module)) for module in model.modules())


def test_gradient_checkpointing_where_only_layers_are_in_training_mode():
    """The rest may be in evaluation mode, as it is frozen."""
    model, gradients = apply_cts(build_existing("beit")), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.eval().zero_grad()
        for module in model.modules():
            if type(module).__name__ == "BeitLayer":
                module.train()
        model(random_images(), superpatch_scores=random_scores(64, 64)).last_hidden_state.square().mean().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "data2vec", "eomt", "eomt_dinov3"])
def test_training_with_dropout_and_drop_path(name):
    model = apply_cts(build_existing(name, hidden_dropout_prob=0.5, drop_path_rate=0.3))
    images, scores = random_images(), random_scores(64, 64)
    model.train()
    for seed in range(2):
        torch.manual_seed(seed)
        outputs = call_existing(model, name, images, superpatch_scores=scores)
        assert states(outputs).isfinite().all()
        states(outputs).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    # A dropped position of a token is 0 and no difference to the projection.
    embeddings = next(module for module in model.modules() if type(module).__name__.endswith("Embeddings"))
    seen = []
    if getattr(embeddings, "dropout", None) is not None:
        embeddings.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        call_existing(model, name, images, superpatch_scores=scores)
        ((before, after),) = seen
        assert before.shape[1] < 64
        assert ((after == 0) | torch.isclose(after, 2 * before)).all()


@torch.no_grad()
def test_rotary_positions_in_training_are_those_that_were_drawn():
    """DINOv3 shifts and scales positions at random in training: tokens of one size must follow."""
    model = build_existing("dinov3", pos_embed_shift=0.3, pos_embed_jitter=1.5, pos_embed_rescale=2.0).train()
    rotary = model.rope_embeddings
    seen = []
    rotary.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.manual_seed(3)
    call_existing(model, "dinov3", random_images())
    apply_cts(model)
    torch.manual_seed(3)
    scores = torch.zeros(2, 4, 4)
    call_existing(model, "dinov3", random_images(), superpatch_scores=scores, token_reduction=0.75)
    rotary.register_forward_hook(lambda module, args, output: seen.append(output))
    plain, *_ = seen
    torch.manual_seed(3)
    call_existing(model, "dinov3", random_images(), superpatch_scores=scores, token_reduction=0.75)
    cos, sin = seen[-1]
    # The slowest rotations turn little from patch to patch: their mean, renormalized, is the center's.
    grid = [values.unflatten(0, (4, 2, 4, 2)).mean((1, 3)).flatten(0, 1) for values in plain]
    length = (grid[0].square() + grid[1].square()).sqrt()
    for got, mean in zip((cos, sin), grid, strict=True):
        expected = mean / length
        is_slow = length > 0.9
        assert is_slow.any()
        torch.testing.assert_close(got[0, 0][is_slow], expected[is_slow], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_positions_keep_double_precision():
    model = build_existing("dinov2").double()
    images = random_images(1, 1, 1).double().expand(-1, -1, 64, 64)
    patches = model(images, output_hidden_states=True).hidden_states[0][:, 1:].unflatten(1, (4, 2, 4, 2))
    scores = torch.zeros(1, 4, 4)
    outputs = apply_cts(model)(images, superpatch_scores=scores, token_reduction=0.75, output_hidden_states=True)
    shared = outputs.hidden_states[0][:, 1:].unflatten(1, (4, 2, 4, 2))
    torch.testing.assert_close(shared, patches.mean((2, 4), keepdim=True).expand_as(shared), rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_the_relative_bias_is_upstreams_for_patches_and_the_mean_for_superpatches():
    model = build_existing("beit")
    bias = model.layers[0].relative_position_bias if hasattr(model, "layers") else None
    bias = bias or next(m for m in model.modules() if type(m).__name__ == "BeitRelativePositionBias")
    seen = []
    handle = bias.register_forward_hook(lambda module, args, output: seen.append(output))
    images = random_images(1, 48, 96)
    model(images)
    handle.remove()
    apply_cts(model)
    bias.register_forward_hook(lambda module, args, output: seen.append(output))
    scores = torch.zeros(1, 3, 6)
    scores[0, 1, 2] = 1
    model(images, superpatch_scores=scores, token_reduction=3 / 72)
    full, shared = seen[0][0], seen[-1][0]
    of_superpatch = [12 * row + column for row in (2, 3) for column in (4, 5)]
    others = [index for index in range(72) if index not in of_superpatch]
    kept = torch.tensor([0, *(1 + index for index in others)])
    four = torch.tensor([1 + index for index in of_superpatch])
    assert shared.shape == (2, 70, 70)
    torch.testing.assert_close(shared[:, :-1, :-1], full[:, kept][:, :, kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[:, -1, :-1], full[:, four][:, :, kept].mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[:, :-1, -1], full[:, kept][:, :, four].mean(2), rtol=1e-5, atol=1e-5)


def test_training_after_inference_mode():
    """Upstream keeps indices of relative positions, which inference mode makes unfit for training."""
    model, images, scores = apply_cts(build_existing("beit")), random_images(), random_scores(64, 64)
    with torch.inference_mode():
        model(images, superpatch_scores=scores)
    model(images, superpatch_scores=scores).last_hidden_state.sum().backward()


@torch.no_grad()
def test_mean_pooling_averages_patches():
    model = build_existing("beit", use_mean_pooling=True)
    images = random_images()
    outputs = apply_cts(model)(images, superpatch_scores=random_scores(64, 64))
    pooled = model.pooler.layernorm(outputs.last_hidden_state[:, 1:].mean(1))
    torch.testing.assert_close(outputs.pooler_output, pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("name", ["eomt", "eomt_dinov3"])
@torch.no_grad()
def test_hidden_states_of_queries(name, is_masked):
    """Those before the queries come in, with them, and the last: all of patches, whether queries are masked or not."""
    model = build_existing(name, num_hidden_layers=4, num_blocks=2)
    model.attn_mask_probs.fill_(1.0 if is_masked else 0.0)
    images, scores = random_images(), random_scores(64, 64)
    plain = model(images, output_hidden_states=True)
    apply_cts(model)
    outputs = model(images, superpatch_scores=scores, output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [state.shape for state in plain.hidden_states]
    assert outputs.last_hidden_state.shape == plain.last_hidden_state.shape


@torch.no_grad()
def test_calls_of_several_threads_do_not_meet():
    model = apply_cts(build_existing("beit"))
    images = random_images(1)
    cases = [(random_scores(64, 64, 1, seed), reduction) for seed in range(4) for reduction in (0.0, 0.3, 0.6)]
    expected = [model(images, superpatch_scores=s, token_reduction=r).last_hidden_state for s, r in cases]
    problems = []

    def run(first):
        for index in range(first, first + 40):
            scores, reduction = cases[index % len(cases)]
            got = model(images, superpatch_scores=scores, token_reduction=reduction)
            if not torch.equal(got.last_hidden_state, expected[index % len(cases)]):
                problems.append(index)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@torch.no_grad()
def test_an_error_in_a_call_leaves_the_next_one_alone():
    model = apply_cts(build_existing("dinov2"))
    images, scores = random_images(), random_scores(64, 64)
    expected = model(images, superpatch_scores=scores).last_hidden_state
    with pytest.raises(ValueError, match="without a policy"):
        model(images)
    handle = model.layernorm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images, superpatch_scores=scores)
    handle.remove()
    # A part of it, called by itself, is no call of the model.
    assert model.embeddings(images).shape[1] == 65
    assert torch.equal(model(images, superpatch_scores=scores).last_hidden_state, expected)


@torch.no_grad()
def test_copies_and_pickles():
    model = apply_cts(build_existing("beit"), tiny_policy(), 0.4)
    images = random_images()
    outputs = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images).last_hidden_state, outputs.last_hidden_state)
        remove_cts(other)
        assert "num_tokens" not in other(images)
        assert torch.equal(model(images).last_hidden_state, outputs.last_hidden_state)
    for other in (copy.deepcopy(outputs), pickle.loads(pickle.dumps(outputs))):
        assert type(other) is type(outputs)
        assert torch.equal(other.num_tokens, outputs.num_tokens)
        assert torch.equal(other.last_hidden_state, outputs.last_hidden_state)


@torch.no_grad()
def test_in_bfloat16():
    model = apply_cts(build_existing("dinov3"), tiny_policy())
    images, scores = random_images(), random_scores(64, 64)
    expected = model(images, superpatch_scores=scores).last_hidden_state
    model.to(torch.bfloat16)
    got = model(images.bfloat16(), superpatch_scores=scores).last_hidden_state
    assert (got.float() - expected).norm() < 0.05 * expected.norm()
    assert model(images).num_tokens.tolist() == [64 - 3 * 6] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "beit"])
@torch.no_grad()
def test_compiled_and_exported(name):
    model = apply_cts(build_existing(name, "sdpa"), tiny_policy())
    images = random_images()
    expected = call_existing(model, name, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    exported = torch.export.export(model, (images,), dict(KINDS[name].call)).module()
    for run in (compiled, exported):
        outputs = run(images, **KINDS[name].call)
        assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)
        assert torch.equal(outputs.num_tokens, expected.num_tokens)
        torch.testing.assert_close(states(outputs), states(expected), rtol=1e-3, atol=1e-4)


REFUSED_MODELS = {
    "swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    ),
    "segformer": lambda: transformers.SegformerModel(
        transformers.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1])
    ),
    "vitdet": lambda: transformers.VitDetModel(
        transformers.VitDetConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_without_plain_patches_are_refused(name):
    with pytest.raises(ValueError, match=r"`model` must have one vision transformer of plain patches.*got none"):
        apply_cts(REFUSED_MODELS[name]())


def test_refusals():
    model = build_existing("dinov2")
    state = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"for superpatches of two patches, which are 8 x 8 pixels here, got .* 32"):
        apply_cts(model, CtsPolicyModel(CtsPolicyConfig(width_coefficient=0.1, depth_coefficient=0.1)))
    with pytest.raises(ValueError, match="images of 3 channels, got one for 1"):
        apply_cts(model, tiny_policy(num_channels=1))
    with pytest.raises(ValueError, match=r"`policy` must be a CtsPolicyModel.*got <class 'int'>"):
        apply_cts(model, 3)
    for value in (-0.1, 0.76, "0.3", True, [0.3], torch.tensor(0.3), float("nan")):
        with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
            apply_cts(model, tiny_policy(), value)
    with pytest.raises(ValueError, match=r"`image_mean` must be finite numbers, one for each of 3 channels"):
        apply_cts(model, image_mean=[0.5, 0.5])
    for not_a_model in (torch.nn.Linear(2, 2), "dinov2", None):
        with pytest.raises(ValueError, match="`model` must be a model of transformers, got"):
            apply_cts(not_a_model)
    for own in (tiny_model(), tiny_model().cts):
        with pytest.raises(ValueError, match="must be one that does not share tokens by itself"):
            apply_cts(own)
    with pytest.raises(ValueError, match="must be one that `apply_cts` has changed"):
        remove_cts(model)
    # Nothing of it was left behind.
    assert not hasattr(model, "token_sharing")
    assert state == {name: dict(module._forward_hooks) for name, module in model.named_modules()}

    several = build_existing("dinov2")
    several.other = build_existing("vit")
    with pytest.raises(ValueError, match=r"got 2 of them in a Dinov2Model: give those .* by themselves"):
        apply_cts(several)
    assert apply_cts(several.other).token_sharing is not None

    without_plain_layers = build_existing("eomt", num_blocks=3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`config.num_blocks` must be below the number of layers"):
            apply_cts(without_plain_layers)

    apply_cts(model, tiny_policy())
    images = random_images()
    with pytest.raises(ValueError, match="must not share tokens yet"):
        apply_cts(model)
    with pytest.raises(ValueError, match="`return_dict` must be True"):
        model(images, return_dict=False)
    with pytest.raises(ValueError, match="`attention_mask` must be None where tokens are shared"):
        model(images, attention_mask=torch.ones(2, 65))
    with pytest.raises(ValueError, match="`bool_masked_pos` must be None where tokens are shared"):
        model(images, torch.ones(2, 64).bool())
    with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
        model(images, token_reduction=0.8)
    with pytest.raises(ValueError, match=r"must have shape .* = \(2, 4, 4\) for these images, got \(2, 4, 5\)"):
        model(images, superpatch_scores=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="NaN"):
        model(images, superpatch_scores=torch.full((2, 4, 4), torch.nan))
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="`pixel_values` must be finite"):
        model(images)


@torch.no_grad()
def test_a_users_model_whose_annotations_cannot_be_read():
    class UsersModel(transformers.ViTModel):
        def forward(self, pixel_values: "OnlyForTypeCheckers", **kwargs) -> "OnlyForTypeCheckers":  # noqa: F821
            return super().forward(pixel_values, **kwargs)

    plain = build_existing("vit")
    model = UsersModel(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    expected, images = plain(random_images()), random_images()
    assert apply_cts(model)(images, superpatch_scores=random_scores(64, 64)).num_tokens.tolist() == [46, 46]
    assert torch.equal(remove_cts(model)(images).last_hidden_state, expected.last_hidden_state)


def test_a_config_of_another_model_is_no_config_of_ours():
    assert tiny_config().model_type == "cts"  # by which own models are recognized
