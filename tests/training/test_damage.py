"""A checkpoint is data, and all of it is guarded: it restores as it was saved, or an error names it; no code runs."""

import json
import logging
import random
import shutil
import subprocess

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_checkpoints import HEAD, X, contents, older, redescribe, save, sums

from flax_hmog import DifferentiableHMoG
from flax_hmog.networks.encoders import Clusterer
from flax_hmog.training import CheckpointError, CheckpointWriter, restore
from flax_hmog.training.files import saved_steps

CALLED = []


def leave_a_mark(**arguments):
    """What no checkpoint may bring anybody to call."""
    CALLED.append(arguments)


class Marking:
    """A class that is no linen module."""

    def __init__(self, **arguments):
        CALLED.append(arguments)


class Own(nn.Module):
    """A user's encoder."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


class Other(Own):
    """Not the encoder of a checkpoint."""


Alias = Own


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save(folder)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "saved")


FILES = ("SHA256SUMS", "_CHECKPOINT_METADATA", "description/metadata", "arrays/manifest.ocdbt", "arrays/_METADATA")


def step_files(folder):
    return sorted(path for path in (folder / "2").rglob("*") if path.is_file())


def refused(folder, said=None):
    """Whether a restore of the latest is an error that names it and what else there is."""
    with pytest.raises(CheckpointError, match=said) as raised:
        restore(folder)
    message = str(raised.value)
    return message.startswith(f"restore: checkpoint {folder}/2 must be readable, and as it was saved") and (
        f"Restore another step: [1]; a run goes on from there once {folder}/2 is deleted." in message
    )


def test_every_missing_file_is_noticed(saved):
    files = step_files(saved)
    assert {str(path.relative_to(saved / "2")) for path in files} >= set(FILES)
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        assert refused(saved, path.name), path
        path.write_bytes(whole)
    assert restore(saved).step == 2


def test_every_changed_bit_and_cut_is_noticed(saved):
    """Of any file, the description and the list of digests too."""
    rng = random.Random(0)
    for path in step_files(saved):
        whole = path.read_bytes()
        for _ in range(12 if whole else 0):
            position, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
            path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            assert refused(saved), (path, position, bit)
        path.write_bytes(whole[: len(whole) // 2])
        assert refused(saved) or not whole, path
        path.write_bytes(whole)
    assert restore(saved).step == 2


def test_a_list_whose_lines_end_otherwise_is_another_list(saved):
    """A newline with one bit changed is a vertical tab, at which Python splits lines too."""
    path = saved / "2" / "SHA256SUMS"
    whole = path.read_bytes()
    for position in (whole.index(b"\n"), len(whole) - 1):
        path.write_bytes(whole[:position] + b"\v" + whole[position + 1 :])
        assert refused(saved)


def test_a_list_that_is_cut_off_covers_nothing(saved):
    path = saved / "2" / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_text("".join(lines[:kept]))
        assert refused(saved)


def test_the_list_is_that_of_sha256sum(saved):
    assert (saved / "2" / "SHA256SUMS").read_text() == sums(saved / "2")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=saved / "2", check=True)


def test_no_older_step_stands_in_for_a_damaged_one(saved):
    """Not even for one of which nothing is left but its name."""
    (saved / "2" / "_CHECKPOINT_METADATA").unlink()
    assert refused(saved, "no file _CHECKPOINT_METADATA")
    shutil.rmtree(saved / "2")
    (saved / "2").mkdir()
    assert refused(saved, "description")
    assert restore(saved, step=1).step == 1
    (saved / "2").rmdir()
    assert restore(saved).step == 1


def test_names_that_are_no_steps_do_not_count(saved):
    for name in ("3.unfinished", "4.orbax-checkpoint-tmp", "5.unfinished.orbax-checkpoint-tmp", "1.deleted", "07", "²"):
        (saved / name).mkdir()
    (saved / "9").touch()
    assert saved_steps(saved) == [1, 2]
    assert restore(saved).step == 2
    with CheckpointWriter(saved, head=HEAD) as writer:
        writer.save(3, HEAD.init(jax.random.key(3), X))
    assert {path.name for path in saved.iterdir()} == {"2", "3", "07", "²", "9"}


def test_a_step_under_another_name_is_refused(saved):
    (saved / "2").rename(saved / "3")
    with pytest.raises(CheckpointError, match="got step 2 under another name"):
        restore(saved)


def test_the_best_is_not_chosen_without_a_damaged_one(tmp_path):
    with CheckpointWriter(tmp_path, head=HEAD, best="nmi") as writer:
        for step, nmi in ((1, 0.5), (2, 0.9)):
            writer.save(step, HEAD.init(jax.random.key(0), X), metrics={"nmi": nmi})
    (tmp_path / "2" / "description" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"checkpoint {tmp_path}/2 must be readable"):
        restore(tmp_path, step="best")


def test_damaged_steps_are_not_deleted(saved, caplog):
    with CheckpointWriter(saved, head=HEAD, best="nmi", keep=1) as writer:
        (saved / "1" / "description" / "metadata").write_text("{}")
        writer.save(3, HEAD.init(jax.random.key(3), X), metrics={"nmi": 0.5})
    assert saved_steps(saved) == [1, 3]
    assert f"{saved}/1 is kept" in caplog.text


def test_what_a_library_says_of_damage_is_not_printed(saved, capfd, caplog):
    """Damage that is found while arrays are read, as in checkpoints without a list of files: the message, and no more."""
    for path in (saved / "2" / "arrays" / "d").iterdir():
        path.unlink()
    older(saved / "2")
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="format 4"):
        assert refused(saved, "NOT_FOUND")
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
    assert not caplog.records


def test_checkpoints_of_the_format_before_restore_with_a_warning(saved):
    wanted = contents(restore(saved))
    older(saved / "2")
    with pytest.warns(UserWarning, match=f"{saved}/2 has format 4, which has digests of arrays only"):
        assert contents(restore(saved)) == wanted
    path = saved / "2" / "description" / "metadata"
    description = json.loads(path.read_text())
    description["arrays"]["variables/params/means"]["sha256"] = "0" * 64
    path.write_text(json.dumps(description))
    with pytest.warns(UserWarning, match="format 4"):
        assert refused(saved, "leaf `variables/params/means` as")


ENCODER = {"class": "MLP", "arguments": {"features": 4}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format=7), "got format 7, this version reads 4 to 6"),
        (lambda d: d.update(format=4), "got format 4 with SHA256SUMS, which it did not have"),
        (lambda d: d.update(module=ENCODER), r"the head must offer .*got MLP.*The checkpoint is .*/2\."),
        (lambda d: d["module"].update({"class": "Else"}), "`class` must be an import path or one of .*got 'Else'"),
        (lambda d: d["module"]["arguments"].update(parent=None), "got no field parent"),
        (lambda d: d["module"]["arguments"].update(param_dtype={"dtype": "b"}), r"HMoG must take .*got ValueError"),
        (lambda d: d.pop("clusters"), r"checkpoint .*/2 must be of a known structure; got KeyError: 'clusters'"),
        (lambda d: d.update(preprocessing={"obs_dim": 6, "steps": ["eval"]}), "must be of a known structure"),
    ],
    ids=["newer", "older", "encoder as head", "unknown", "argument", "dtype", "without a part", "step"],
)  # fmt: skip
def test_what_this_version_cannot_rebuild_is_named(change, said, saved):
    """Descriptions that are as they were saved, by something else."""
    redescribe(saved / "2", change)
    with pytest.raises(CheckpointError, match=said) as raised:
        restore(saved)
    assert f"{saved}/2" in str(raised.value)


@pytest.fixture
def with_encoder(tmp_path):
    """A checkpoint of an encoder, and a function that gives its encoder another class."""
    module = Clusterer(Own(4), DifferentiableHMoG(2, 3))
    with CheckpointWriter(tmp_path, head=module.head, encoder=module.encoder) as writer:
        writer.save(1, module.init(jax.random.key(0), X))
    CALLED.clear()

    def renamed(name):
        redescribe(tmp_path / "1", lambda d: d["module"]["arguments"]["encoder"].update({"class": name}))
        return tmp_path

    return renamed


@pytest.mark.parametrize("name", ["leave_a_mark", "Marking"])
def test_no_callable_of_a_checkpoint_is_called(name, with_encoder):
    """What runs do: arrays come back, and no module of the checkpoint is even imported. And with leave to import."""
    path = f"{__name__}:{name}"
    folder = with_encoder(path)
    restored = restore(folder)
    assert restored.encoder is None
    assert set(restored.module_variables["params"]) == {"encoder", "head"}
    for allowed in (True, path):
        with pytest.raises(CheckpointError, match=f"must be a linen module; got {path}, which is none") as raised:
            restore(folder, allow_import=allowed)
        assert str(folder / "1") in str(raised.value)
    assert CALLED == []


def test_only_the_encoder_that_is_named_is_imported(with_encoder):
    path = f"{__name__}:Own"
    folder = with_encoder(path)
    want = restore(folder, allow_import=True)
    assert want.encoder == Own(4)
    np.testing.assert_array_equal(restore(folder, allow_import=path)(X).log_density, want(X).log_density)
    assert restore(folder, allow_import=f"{__name__}:Alias").encoder == Own(4)
    for other in (f"{__name__}:Other", "mlp"):
        with pytest.raises(CheckpointError, match=f"the module must be {other}, as `allow_import` says; got {path}"):
            restore(folder, allow_import=other)
    with_encoder(f"{__name__}:nowhere")
    with pytest.raises(CheckpointError, match="must be importable; got AttributeError"):
        restore(folder, allow_import=True)
