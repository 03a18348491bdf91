"""Parameters and moments of another model: copied where they fit, and refused as a whole where they do not."""

import io

import pytest
import torch as th
from checkpoint_files import BASES, VARIANTS, assert_predicts_alike, content, edited, load, members, small, task, trained
from helpers import assert_identical, collected, state_tensors
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_klip import KLipPPO


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_parameters_in_both_directions(ours, name, tmp_path):
    for source, target in ((ours, BASES[ours]), (BASES[ours], ours)):
        model, checkpoint = trained(source, name)
        (tmp_path / "model.zip").write_bytes(checkpoint)
        for parameters in (model.get_parameters(), str(tmp_path / "model"), io.BytesIO(checkpoint)):
            other = small(target, task(name)).learn(32)
            before = {key: tensor.clone() for key, tensor in state_tensors(other).items()}
            other.set_parameters(parameters)
            assert_identical(other, model)
            assert any(not th.equal(tensor, before[key]) for key, tensor in state_tensors(other).items())


def assert_parameters_are_refused(model, parameters, message, **kwargs):
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    with pytest.raises(ValueError, match=message):
        model.set_parameters(parameters, **kwargs)
    assert state_tensors(model).keys() == before.keys()
    assert all(th.equal(tensor, before[name]) for name, tensor in state_tensors(model).items())


@pytest.mark.parametrize("exact_match", [True, False])
def test_parameters_of_another_architecture(tmp_path, exact_match):
    model, other = (small(KLipPPO, task("box"), policy_kwargs={"net_arch": [size]}).learn(32) for size in (8, 12))
    other.save(tmp_path / "other")
    message = r"mlp_extractor\.policy_net\.0\.weight is \(12, 3\) and should be \(8, 3\)"
    for parameters, name in ((other.get_parameters(), "load_path_or_dict"), (str(tmp_path / "other"), r"other\.zip")):
        assert_parameters_are_refused(model, parameters, rf"{name}.*{message}", exact_match=exact_match)


def test_parameters_that_are_too_many_or_too_few():
    shallow, deep = (small(KLipPPO, task("box"), policy_kwargs={"net_arch": arch}) for arch in ([], [8]))
    assert_parameters_are_refused(
        shallow, deep.get_parameters(), r"mlp_extractor\.policy_net\.0\.weight is not known to the model"
    )
    assert_parameters_are_refused(deep, shallow.get_parameters(), r"mlp_extractor\.policy_net\.0\.weight is missing")


def test_moments_of_another_architecture():
    """The weights fit, but the optimizer's state does not: nothing is changed."""
    model, other = (small(KLipPPO, task("box"), policy_kwargs={"net_arch": arch}).learn(32) for arch in ([8], [8, 8]))
    weights = {name: tensor + 1 for name, tensor in model.policy.state_dict().items()}
    parameters = {**other.get_parameters(), "policy": weights}
    assert_parameters_are_refused(model, parameters, "optimizer|parameter group")


# -- policies that were compiled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "ours", "name"), [*((v[0], *v) for v in VARIANTS), *((BASES[v[0]], *v) for v in VARIANTS)])
def test_parameters_of_a_policy_that_was_compiled(source, ours, name, tmp_path):
    """Older versions of SB3 saved the names that torch.compile gives to parameters."""
    model, checkpoint = trained(source, name)
    state = th.load(io.BytesIO(members(checkpoint)["policy.pth"]), weights_only=True)
    renamed = io.BytesIO()
    th.save({f"_orig_mod.{key}": tensor for key, tensor in state.items()}, renamed)
    old = edited(checkpoint, files={"policy.pth": renamed.getvalue()})
    (tmp_path / "model.zip").write_bytes(old)

    with collected() as messages:
        loaded = load(old, ours, env=task(name))
    assert messages == []
    assert_identical(loaded, model)
    assert not any(key.startswith("_orig_mod.") for key in loaded.policy.state_dict())
    loaded.learn(32)
    assert_predicts_alike(load(content(loaded), ours), loaded)

    parameters = model.get_parameters()
    parameters["policy"] = {f"_orig_mod.{key}": tensor for key, tensor in parameters["policy"].items()}
    for source_of in (str(tmp_path / "model"), parameters):
        other = small(ours, task(name)).learn(32)
        before = {key: tensor.clone() for key, tensor in state_tensors(other).items()}
        other.set_parameters(source_of)
        assert_identical(other, model)
        assert any(not th.equal(tensor, before[key]) for key, tensor in state_tensors(other).items())
    assert all(key.startswith("_orig_mod.") for key in parameters["policy"])  # the caller's own is as it was


def test_parameters_of_a_policy_that_was_compiled_and_is_another():
    """The names that are compared are those without what torch.compile adds."""
    model = small(KLipPPO, task("box"))
    parameters = small(KLipPPO, task("box"), policy_kwargs={"net_arch": [9]}).get_parameters()
    parameters["policy"] = {f"_orig_mod.{key}": tensor for key, tensor in parameters["policy"].items()}
    before = {key: tensor.clone() for key, tensor in state_tensors(model).items()}
    with pytest.raises(ValueError, match=r"mlp_extractor\.policy_net\.0\.weight") as caught:
        model.set_parameters(parameters)
    assert "_orig_mod" not in str(caught.value)
    assert all(th.equal(tensor, before[key]) for key, tensor in state_tensors(model).items())


class OneMomentPerTensor(th.optim.Optimizer):
    """An optimizer of a user's own, whose second moment is a number."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["exp_avg_sq"] = parameter.grad.square().mean() + 0.9 * state.get("exp_avg_sq", 0)
                parameter.data -= 1e-3 * parameter.grad / (state["exp_avg_sq"].sqrt() + 1e-8)


class Renaming(ActorCriticPolicy):
    """A policy that also loads what it called otherwise once."""

    def load_state_dict(self, state_dict, *args, **kwargs):
        return super().load_state_dict({key.removeprefix("old."): value for key, value in state_dict.items()}, *args, **kwargs)


def test_an_optimizer_whose_moments_have_shapes_of_their_own(tmp_path):
    kwargs = {"net_arch": [8], "optimizer_class": OneMomentPerTensor}
    model = small(KLipPPO, task("box"), policy_kwargs=kwargs).learn(32)
    model.save(tmp_path / "model")
    assert_identical(KLipPPO.load(tmp_path / "model"), model)


def test_a_policy_that_renames_what_it_loads():
    model, other = (small(KLipPPO, task("box"), policy=Renaming, policy_kwargs={"net_arch": [8]}).learn(32) for _ in range(2))
    parameters = model.get_parameters()
    parameters["policy"] = {f"old.{key}": value + 1 for key, value in parameters["policy"].items()}
    other.set_parameters(parameters)
    assert all(th.equal(value, parameters["policy"][f"old.{key}"]) for key, value in other.policy.state_dict().items())
