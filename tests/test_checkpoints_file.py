"""What a checkpoint is told to be before anything in it is unpickled, and with which words it is refused."""

import io
import json
import pathlib
import pickle
import zipfile

import gymnasium
import pytest
import torch as th
from checkpoint_files import (
    BASES,
    ERAS,
    TASKS,
    VARIANTS,
    assert_genuine,
    assert_predicts_alike,
    content,
    edited,
    entry,
    gym_era,
    load,
    members,
    small,
    task,
    trained,
    without,
    zipped,
)
from helpers import assert_identical, collected, state_tensors
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.checkpoints.file import Checkpoint


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("ours", "name"), [*VARIANTS, *((KLipPPO, name) for name in without(TASKS, "box"))])
def test_checkpoints_from_the_days_of_gym(ours, name, era):
    model, checkpoint = trained(BASES[ours], name)
    old = gym_era(checkpoint, era)
    with pytest.raises(ModuleNotFoundError, match="gym"), collected():
        load(old, BASES[ours])
    with pytest.warns(UserWarning, match="cannot be restored"):
        loaded = load(old, ours)
    assert type(loaded) is ours
    assert_genuine(loaded.observation_space, model.observation_space)
    assert_genuine(loaded.action_space, model.action_space)
    assert_identical(loaded, model)
    assert_predicts_alike(loaded, model)
    with pytest.warns(UserWarning, match="cannot be restored"):
        load(old, ours, env=task(name)).learn(32)


def test_our_own_checkpoint_with_the_coefficient_and_old_spaces():
    model = small(KLipPPO, task("box"), beta="linear_ramp", beta_kwargs={"width": 0.3})
    with pytest.warns(UserWarning, match="cannot be restored"):
        loaded = load(gym_era(content(model), "0.19"))
    assert repr(loaded.beta) == "linear_ramp(width=0.3)"


# -- paths -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder_beside", [False, True])
@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_paths(tmp_path, kind, suffix, folder_beside):
    model, checkpoint = trained(KLipPPO, "box")
    (tmp_path / "Env-v3.zip").write_bytes(checkpoint)
    if folder_beside:
        (tmp_path / "Env-v3").mkdir()
    path = kind(tmp_path / f"Env-v3{suffix}")
    assert_predicts_alike(KLipPPO.load(path), model)
    assert KLipPPO.load(path, trusted=False).gamma == 0.97
    other = small(KLipPPO, task("box"))
    other.set_parameters(path)
    assert_predicts_alike(other, model)


def test_a_relative_path(tmp_path, monkeypatch):
    model, checkpoint = trained(KLipPPO, "box")
    (tmp_path / "model.zip").write_bytes(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert_predicts_alike(KLipPPO.load("model"), model)


def test_open_files(tmp_path):
    model, checkpoint = trained(KLipPPO, "box")
    path = tmp_path / "a file of any name"
    path.write_bytes(checkpoint)
    buffer = io.BytesIO(checkpoint)
    with path.open("rb") as file:
        for opened in (buffer, buffer, file, file):  # each twice, as it is left at its end
            assert_predicts_alike(KLipPPO.load(opened), model)
            assert_predicts_alike(KLipPPO.load(opened, trusted=False), model)
            small(KLipPPO, task("box")).set_parameters(opened)
            assert not opened.closed


def test_an_open_file_is_what_it_holds_and_not_its_name(tmp_path):
    """What was checked is what is loaded, although a file of that name is gone, or is another."""
    model, checkpoint = trained(KLipPPO, "box")
    path = tmp_path / "model.zip"
    path.write_bytes(checkpoint)
    with path.open("rb") as file:
        path.rename(tmp_path / "renamed.zip")
        assert_predicts_alike(KLipPPO.load(file), model)
        path.write_bytes(content(small(KLipPPO, task("box"), gamma=0.5)))
        assert KLipPPO.load(file, trusted=False).gamma == 0.97
    buffer = io.BytesIO(checkpoint)
    buffer.name = str(path)  # uploads have names
    assert KLipPPO.load(buffer).gamma == 0.97


@pytest.mark.parametrize("name", ["missing", "missing.zip", "no_folder/missing", "folder", "folder/"])
def test_a_missing_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for path in (f"{tmp_path}/{name}", tmp_path / name):
        with pytest.raises(FileNotFoundError, match=r"missing|folder\.zip"):
            KLipPPO.load(path)
        with pytest.raises(FileNotFoundError):
            trained(KLipPPO, "box")[0].set_parameters(path)


def test_print_system_info(tmp_path, capsys):
    (tmp_path / "model.zip").write_bytes(gym_era(trained(PPO, "discrete")[1], "0.19", schedules=()))
    KLipPPO.load(tmp_path / "model", print_system_info=True)
    printed = capsys.readouterr().out
    assert "Gym: 0.19.0" in printed
    assert f"Gymnasium: {gymnasium.__version__}" in printed


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_off(tmp_path):
    checkpoint = trained(KLipPPO, "box")[1]
    path = tmp_path / "cut.zip"
    for length in (0, 1, 4, 30, *range(100, len(checkpoint), 500), len(checkpoint) - 22, len(checkpoint) - 1):
        path.write_bytes(checkpoint[:length])
        # Where the weights were the last that was written, what is left ends with a whole zip file: theirs.
        with pytest.raises(ValueError, match=r"cut\.zip' is no(t a checkpoint, or was cut off| checkpoint)"):
            KLipPPO.load(path)
    with pytest.raises(ValueError, match=r"cut\.zip' is not a checkpoint, or was cut off"):
        trained(KLipPPO, "box")[0].set_parameters(path)


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
@pytest.mark.parametrize("part", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"hello"])
def test_weights_that_were_cut_off_in_a_whole_file(member, part):
    """As where a checkpoint was unpacked, copied in part, and zipped again."""
    inside = members(trained(KLipPPO, "box")[1])
    broken = zipped({**inside, member: part(inside[member])}, zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match=f"BytesIO is damaged: {member} in it cannot be read"):
        load(broken)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("member", ["data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "system_info.txt"])
def test_a_flipped_byte(member, compression):
    """In a file as SB3 writes it, and in one that was unpacked and zipped again."""
    checkpoint = bytearray(zipped(members(trained(KLipPPO, "box")[1]), compression))
    info = zipfile.ZipFile(io.BytesIO(checkpoint)).getinfo(member)
    start = info.header_offset + 30 + len(member)
    if compression == zipfile.ZIP_STORED:
        checkpoint[start + info.compress_size // 2] ^= 0xFF
    else:
        checkpoint[start] |= 0b110  # a kind of block that there is not
    with pytest.raises(ValueError, match=r"damaged|cut off"):
        load(bytes(checkpoint))


def test_no_flipped_bit_goes_unseen():
    """Every bit of a file, its directory included: it is refused, or changes nothing that matters."""
    data = {"clip_range": 0.2, "policy_class": {"__module__": "stable_baselines3.common.policies"}}
    files = {"data": json.dumps(data), "policy.pth": b"weights", "policy.optimizer.pth": b"moments"}
    checkpoint = zipped(files)
    refused = 0
    for place in range(8 * len(checkpoint)):
        damaged = bytearray(checkpoint)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = Checkpoint.read(io.BytesIO(damaged))
        except ValueError:
            refused += 1
            continue
        assert found.data == data
    assert refused > 1000


DAMAGE = {
    "policy": ({}, {"policy.pth": None}, "no policy.pth"),
    "optimizer": ({}, {"policy.optimizer.pth": None}, r"no policy\.optimizer\.pth"),
    "data": ({}, {"data": None}, "no data"),
    "no JSON": ({}, {"data": b"{'policy_class'"}, "not a checkpoint, or was cut off"),
    "no text": ({}, {"data": b"\xff\xfe"}, "not a checkpoint, or was cut off"),
    "a list": ({}, {"data": b"[1, 2]"}, "data in it is a list"),
    "nothing": ({}, {"data": b"{}"}, "an unknown algorithm"),
    **{name: ({name: None}, {}, name) for name in ("policy_class", "observation_space", "action_space", "policy_kwargs")},
    "text for a policy": ({"policy_class": "MlpPolicy"}, {}, "its data has no policy_class"),
    "garbled space": ({"observation_space": entry(b"garbled")}, {}, "its observation_space cannot be restored"),
    "garbled base64": ({"action_space": {":serialized:": "?"}}, {}, "its action_space cannot be restored"),
    "newer": ({"klip_format": 2}, {}, r"klip_format 2.*[Uu]pgrade"),
    "much newer": ({"klip_format": "2027.1"}, {}, r"klip_format.*2027\.1.*[Uu]pgrade"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_whole(damage, tmp_path):
    entries, files, message = DAMAGE[damage]
    path = tmp_path / "model.zip"
    path.write_bytes(edited(trained(KLipPPO, "box")[1], entries, files))
    for kwargs in ({}, {"env": task("box")}, {"trusted": False}):
        with pytest.raises(ValueError, match=rf"model\.zip.*{message}"):
            KLipPPO.load(path, **kwargs)


@pytest.mark.parametrize(
    "data", [b"", b"not a zip file\n" * 100, pickle.dumps({"policy": 1}), zipped({}), zipped({"folder/": b""})]
)
def test_another_kind_of_file(data, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.zip' is no"):
        KLipPPO.load(path)


def test_a_file_of_torch(tmp_path):
    """It is a zip file, too."""
    th.save({"policy": th.zeros(3)}, tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"no checkpoint of Stable-Baselines3.*no data"):
        KLipPPO.load(tmp_path / "model.zip")


MEMORY = {"buffer_size": 100}
OTHERS = [
    *[(algorithm, "Pendulum-v1", MEMORY) for algorithm in (SAC, TD3, TQC, CrossQ)],
    *[(algorithm, "CartPole-v1", MEMORY) for algorithm in (DQN, QRDQN)],
    *[(algorithm, "CartPole-v1", {}) for algorithm in (A2C, TRPO, ARS)],
]


@pytest.mark.parametrize(("algorithm", "env", "kwargs"), OTHERS)
def test_another_algorithm_is_named(algorithm, env, kwargs):
    checkpoint = content(algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu", **kwargs))
    for ours, base in BASES.items():
        with pytest.raises(
            ValueError, match=rf"checkpoint of {algorithm.__name__}\b.*{ours.__name__} loads those of {base.__name__}"
        ):
            load(checkpoint, ours)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ours, base) for ours in BASES for base in BASES.values() if base is not BASES[ours]]
)
def test_another_variant_is_named(ours, theirs):
    """With the class to use."""
    model, _ = trained(ours, "discrete")
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    checkpoint = trained(theirs, "discrete")[1]
    expected = rf"{ours.__name__} loads those of {BASES[ours].__name__}; KLip{theirs.__name__} does"
    message = rf"checkpoint of {theirs.__name__}, .*{expected}"
    with pytest.raises(ValueError, match=message):
        load(checkpoint, ours)
    with pytest.raises(ValueError, match=message):
        model.set_parameters(io.BytesIO(checkpoint))
    assert all(th.equal(tensor, before[name]) for name, tensor in state_tensors(model).items())


class OwnPolicy(ActorCriticPolicy):
    pass


class OwnMaskablePolicy(MaskableActorCriticPolicy):
    pass


class OwnRecurrentPolicy(RecurrentActorCriticPolicy):
    pass


OWN = {KLipPPO: OwnPolicy, KLipMaskablePPO: OwnMaskablePolicy, KLipRecurrentPPO: OwnRecurrentPolicy}


@pytest.mark.parametrize("ours", BASES)
def test_a_policy_of_the_users_own(ours):
    """Its module does not tell the algorithm."""
    for algorithm in (ours, BASES[ours]):
        model = small(algorithm, task("discrete"), policy=OWN[ours])
        loaded = load(content(model), ours)
        assert type(loaded.policy) is OWN[ours]
        assert_predicts_alike(loaded, model)
