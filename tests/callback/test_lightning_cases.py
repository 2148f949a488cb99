"""Cases that Lightning tests of its own checkpoints, asked of ours, in one process."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lora_lightning import AdapterError, LoraCallback, LoraConfig, load_from_checkpoint, lora_parameters
from lora_lightning.adapters.checkpoint import read_checkpoint

CONFIG = LoraConfig(r=2, lora_alpha=4)


@pytest.fixture
def saved(module_class, make_trainer, tmp_path):
    """A run of two epochs: its trainer and the checkpoints ``best.ckpt`` and ``last.ckpt``."""
    saver = ModelCheckpoint(tmp_path / "saved", filename="best", monitor="val_loss", save_last=True)
    trainer = make_trainer(LoraCallback(CONFIG), saver, max_epochs=2)
    trainer.fit(module_class())
    return trainer, tmp_path / "saved"


def _rewritten(path, change):
    """A checkpoint beside another, after ``change`` of its content."""
    content = torch.load(path, weights_only=True)
    change(content)
    other = path.with_name("changed.ckpt")
    torch.save(content, other)
    return other


# ---- strict loading


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("net.0.lora_A"), r"missing: net\.0\.lora_A"),
        (lambda state: state.update({"net.9.lora_A": torch.ones(2, 2)}), r"not expected: net\.9\.lora_A"),
        (lambda state: state.update({"net.0.lora_A": torch.ones(2, 7)}), r"net\.0\.lora_A is \(2, 7\), the model's is"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_strict_loading(saved, module_class, make_trainer, strict, change, message):
    """test_strict_loading, test_strict_model_load_more_params and …_less_params: names must fit, whatever is asked."""
    _, folder = saved
    path = _rewritten(folder / "last.ckpt", lambda content: change(content["state_dict"]))
    module = module_class()
    module.strict_loading = strict
    trainer = make_trainer(LoraCallback(CONFIG), max_epochs=3)
    with pytest.raises(AdapterError, match=message):
        trainer.fit(module, ckpt_path=path)
    assert not any(p.any() for name, p in lora_parameters(module).items() if name.endswith("lora_B"))  # none was set


@pytest.mark.parametrize("strict", [None, False])
def test_a_base_that_is_in_no_checkpoint_is_not_missed(saved, module_class, make_trainer, strict):
    """test_strict_loading: a module that loads strictly takes a checkpoint that holds nothing of the base."""
    _, folder = saved
    module = module_class()
    module.strict_loading = strict
    make_trainer(LoraCallback(CONFIG)).validate(module, ckpt_path=folder / "last.ckpt", verbose=False)
    state = read_checkpoint(folder / "last.ckpt")["state_dict"]
    assert state.keys() == lora_parameters(module).keys()
    assert all(torch.equal(p, state[name]) for name, p in lora_parameters(module).items())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_checkpoint_without_an_adapter_is_refused(module_class, make_trainer, tmp_path, stage, weights_only):
    """test_load_standard_checkpoint_into_distributed_model: what a plain Trainer has written is told as such."""
    plain = make_trainer()
    plain.fit(module_class())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    trainer = make_trainer(LoraCallback(CONFIG), max_epochs=2)
    with pytest.raises(AdapterError, match="was not written with a LoraCallback"):
        getattr(trainer, stage)(module_class(), ckpt_path=tmp_path / "plain.ckpt", weights_only=weights_only)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_trainer_without_the_callback_does_not_take_a_checkpoint_of_it(saved, module_class, make_trainer, stage):
    """test_strict_loading: a forgotten callback ends in an error, since the names of the base are missing."""
    _, folder = saved
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"net\.0\.weight"):
        getattr(make_trainer(max_epochs=3), stage)(module_class(), ckpt_path=folder / "last.ckpt")


def test_a_trainer_without_the_callback_and_without_strictness(saved, module_class, make_trainer):
    """test_strict_loading with False: the base would be trained with fresh moments, which the optimizer refuses."""
    _, folder = saved
    module = module_class()
    module.strict_loading = False
    with pytest.raises((ValueError, KeyError)):
        make_trainer(max_epochs=3).fit(module, ckpt_path=folder / "last.ckpt")


@pytest.mark.parametrize("form", ["none", "empty folder", "text"])
def test_what_is_no_checkpoint_at_all(module_class, make_trainer, tmp_path, form):
    """test_try_resume_from_non_existing_checkpoint and test_load_unknown_checkpoint_type."""
    path = tmp_path / "there.ckpt"
    if form == "empty folder":
        path.mkdir()
    if form == "text":
        path.write_text("weights")
    with pytest.raises((AdapterError, FileNotFoundError), match=r"there\.ckpt"):
        make_trainer(LoraCallback(CONFIG)).fit(module_class(), ckpt_path=path)


def test_a_folder_of_other_files_is_not_written_over(saved, tmp_path):
    """test_save_checkpoint_path_exists: a checkpoint takes the place of a checkpoint, not of somebody's files."""
    trainer, _ = saved
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("long work")
    with pytest.raises(AdapterError, match="there is a folder that holds no checkpoint but other files"):
        trainer.save_checkpoint(tmp_path / "there")
    assert (tmp_path / "there" / "thesis.txt").read_text() == "long work"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["thesis.txt"]


# ---- states of callbacks


class Counter(Callback):
    """Keeps a state, under a key of its own."""

    def __init__(self, name="one"):
        self.name, self.batches = name, 0

    @property
    def state_key(self):
        return f"Counter[{self.name}]"

    def on_train_batch_end(self, *_):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


def test_state_keys_tell_callbacks_apart(two_networks, make_trainer, tmp_path):
    """test_model_checkpoint_state_key: two of this callback, and others beside them, each find their own state."""
    loras = [LoraCallback(CONFIG, module="net", name="a"), LoraCallback({"r": 1}, module="other", name="b")]
    assert [callback.state_key for callback in loras] == ["LoraCallback[a]", "LoraCallback[b]"]
    trainer = make_trainer(Counter(), *loras, Counter("two"), ModelCheckpoint(tmp_path, filename="x"))
    trainer.fit(two_networks)
    content = read_checkpoint(tmp_path / "x.ckpt")
    assert {"Counter[one]", "Counter[two]"} <= content["callbacks"].keys()
    assert content["lora_lightning"]["adapters"].keys() == {"a", "b"}
    again = [Counter("two"), Counter()]
    # In another order, the adapters too.
    others = [LoraCallback({"r": 1}, module="other", name="b"), LoraCallback(CONFIG, module="net", name="a")]
    before = {name: p.detach().clone() for name, p in lora_parameters(two_networks).items()}
    make_trainer(*others, *again, max_epochs=1).fit(two_networks, ckpt_path=tmp_path / "x.ckpt")
    assert [counter.batches for counter in again] == [5, 5]
    assert all(torch.equal(p, before[name]) for name, p in lora_parameters(two_networks).items())


def test_callbacks_find_their_state_on_resume(module_class, make_trainer, tmp_path):
    """test_callbacks_state_fit_ckpt_path: ModelCheckpoint and EarlyStopping go on from where they were."""

    def callbacks():
        saver = ModelCheckpoint(tmp_path / "x", monitor="val_loss", save_last=True, save_top_k=2)
        return saver, EarlyStopping("val_loss", patience=7)

    first, stopping = callbacks()
    make_trainer(LoraCallback(CONFIG), first, stopping, max_epochs=3).fit(module_class())
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(deepcopy(again.state_dict() | {"stopping": stopped.state_dict()}))

    again, stopped = callbacks()
    make_trainer(Look(), again, stopped, LoraCallback(CONFIG), max_epochs=4).fit(
        module_class(), ckpt_path=tmp_path / "x" / "last.ckpt"
    )
    for key in ("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "last_model_path"):
        assert seen[key] == first.state_dict()[key], key
    assert seen["stopping"] == stopping.state_dict()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_callbacks_find_their_state_in_other_stages(module_class, make_trainer, tmp_path, stage):
    """test_restore_callbacks_in_non_fit_phases: hooks on load see the whole checkpoint, in every stage."""
    make_trainer(LoraCallback(CONFIG), Counter(), ModelCheckpoint(tmp_path, filename="x")).fit(module_class())
    seen = {}

    class Look(Counter):
        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            seen.update(checkpoint["callbacks"])

    getattr(make_trainer(LoraCallback(CONFIG), Look()), stage)(module_class(), ckpt_path=tmp_path / "x.ckpt")
    assert seen["Counter[one]"] == {"batches": 5}


def test_a_callback_that_is_no_longer_there(module_class, make_trainer, tmp_path):
    """test_resume_incomplete_callbacks_list_warning: the missing one is named, and never ours, which has no state."""
    make_trainer(LoraCallback(CONFIG), Counter(), ModelCheckpoint(tmp_path, filename="x")).fit(module_class())
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \[.*Counter\[one\]") as told:
        make_trainer(LoraCallback(CONFIG), max_epochs=2).fit(module_class(), ckpt_path=tmp_path / "x.ckpt")
    assert not any("LoraCallback[" in str(warning.message) for warning in told)


# ---- what a checkpoint is read for


def test_nothing_but_plain_values_is_in_a_checkpoint(saved, module_class, make_trainer):
    """test_load_full_checkpoint_remote_honors_explicit_weights_only: every way to ask reads the same."""
    _, folder = saved
    states = []
    for weights_only in (None, True, False):
        module = module_class()
        trainer = make_trainer(LoraCallback(CONFIG), max_epochs=3)
        torch.manual_seed(0)
        trainer.fit(module, ckpt_path=folder / "last.ckpt", weights_only=weights_only)
        assert trainer.global_step == 15
        states.append({name: p.detach() for name, p in lora_parameters(module).items()})
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_weights_alone_are_enough_to_evaluate(module_class, make_trainer, tmp_path, stage):
    """test_model_checkpoint_saveload_ckpt with save_weights_only: every stage but training takes it."""
    module = module_class()
    saver = ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)
    make_trainer(LoraCallback(CONFIG), saver).fit(module)
    other = module_class()
    getattr(make_trainer(LoraCallback(CONFIG)), stage)(other, ckpt_path=tmp_path / "w.ckpt")
    for name, p in lora_parameters(module).items():
        assert torch.equal(lora_parameters(other)[name], p)


def test_weights_alone_are_not_enough_to_resume(module_class, make_trainer, tmp_path):
    """test_model_checkpoint_saveload_ckpt with save_weights_only: a resume says what is missing and why."""
    saver = ModelCheckpoint(tmp_path, filename="w", save_weights_only=True)
    make_trainer(LoraCallback(CONFIG), saver).fit(module_class())
    with pytest.raises((AdapterError, KeyError), match="save_weights_only"):
        make_trainer(LoraCallback(CONFIG), max_epochs=2).fit(module_class(), ckpt_path=tmp_path / "w.ckpt")


def test_best_and_last_in_the_same_trainer_and_by_their_paths(saved, module_class, make_trainer):
    """test_running_test_pretrained_model_cpu and test_stateful_trainer_ckpt_path_support: one value, however named."""
    trainer, folder = saved
    module = trainer.lightning_module
    for kind in ("best", "last"):
        path = folder / f"{kind}.ckpt"
        loaded = load_from_checkpoint(module_class, path)
        expected = sum(loaded.loss(batch).item() for batch in loaded.val_dataloader()) / 5
        fresh = make_trainer(LoraCallback(CONFIG))
        fresh.ckpt_path = path
        for losses in (
            trainer.validate(module, ckpt_path=kind, verbose=False),
            make_trainer(LoraCallback(CONFIG)).test(module_class(), ckpt_path=path, verbose=False),
            fresh.validate(module_class(), verbose=False),
        ):
            assert losses[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert Path(trainer.ckpt_path) == path
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, ckpt_path="last")
    assert trainer.current_epoch == 3
    assert trainer.global_step == 15


def test_last_where_there_is_none_yet_begins_anew(module_class, make_trainer, tmp_path):
    """test_save_last_…: ``ckpt_path="last"`` may be written down before the first run, and finds the last later."""

    def fit(epochs):
        saver = ModelCheckpoint(tmp_path / "x", save_last=True)
        trainer = make_trainer(LoraCallback(CONFIG), saver, max_epochs=epochs)
        trainer.fit(module_class(), ckpt_path="last")
        return trainer

    with pytest.warns(UserWarning, match="no last checkpoint available"):
        assert fit(1).global_step == 5
    assert fit(3).global_step == 15
    assert read_checkpoint(tmp_path / "x" / "last.ckpt")["global_step"] == 15


def test_save_top_k_keeps_so_many_and_each_is_whole(module_class, make_trainer, tmp_path):
    """test_top_k and test_model_checkpoint_topk_all: those that are no longer among the best are gone."""
    saver = ModelCheckpoint(tmp_path / "x", filename="{epoch}", monitor="val_loss", save_top_k=2, save_last="link")
    make_trainer(LoraCallback(CONFIG), saver, max_epochs=5).fit(module_class())
    names = {path.name for path in (tmp_path / "x").glob("*.ckpt")}
    assert names == {Path(path).name for path in saver.best_k_models} | {"last.ckpt"}
    assert len(names) == 3
    for name in names:
        read_checkpoint(tmp_path / "x" / name)
    best = min(saver.best_k_models, key=saver.best_k_models.get)
    assert saver.best_model_path == best
    assert {path.name for path in (tmp_path / "x").iterdir()} - names == {f"{Path(best).stem}-adapter"}


def test_a_resumed_run_leaves_the_checkpoints_of_the_first(saved, module_class, make_trainer, tmp_path):
    """test_resume_training_preserves_old_ckpt_last and test_resume_and_old_checkpoint_files_remain."""
    _, folder = saved
    before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}
    saver = ModelCheckpoint(tmp_path / "new", filename="best", monitor="val_loss", save_last=True)
    make_trainer(LoraCallback(CONFIG), saver, max_epochs=4).fit(module_class(), ckpt_path=folder / "last.ckpt")
    assert {path.name: path.read_bytes() for path in folder.glob("*.ckpt")} == before
    assert read_checkpoint(tmp_path / "new" / "last.ckpt")["epoch"] == 3


# ---- what a run finds right after a resume


def test_steps_epochs_optimizers_and_schedulers_right_after_resume(saved, module_class, make_trainer):
    """test_correct_step_and_epoch and test_trainer_properties_restore_ckpt_path."""
    _, folder = saved
    content = read_checkpoint(folder / "last.ckpt")
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["position"] = trainer.current_epoch, trainer.global_step, pl_module.current_epoch
            seen["stepped"] = trainer.fit_loop.epoch_loop._batches_that_stepped
            (optimizer,) = trainer.optimizers
            seen["rate"] = optimizer.param_groups[0]["lr"]
            seen["scheduler"] = trainer.lr_scheduler_configs[0].scheduler.state_dict()
            names = {id(p): name for name, p in lora_parameters(pl_module).items()}
            seen["moments"] = {names[id(p)]: state["exp_avg"].clone() for p, state in optimizer.state.items()}

    trainer = make_trainer(Look(), LoraCallback(CONFIG), max_epochs=4)
    assert (trainer.current_epoch, trainer.global_step) == (0, 0)
    trainer.fit(module_class(), ckpt_path=folder / "last.ckpt")
    assert seen["position"] == (2, 10, 2)
    assert seen["stepped"] == 10
    assert seen["rate"] == pytest.approx(1e-2 * 0.9**2)
    assert seen["scheduler"] == content["lr_schedulers"][0]
    saved_moments = content["optimizer_states"][0]["state"]
    assert seen["moments"].keys() == saved_moments.keys() == lora_parameters(trainer.lightning_module).keys()
    assert all(torch.equal(value, saved_moments[name]["exp_avg"]) for name, value in seen["moments"].items())
    assert (trainer.current_epoch, trainer.global_step) == (4, 20)


def test_fit_twice_with_one_trainer(module_class, make_trainer):
    """test_fit_twice: the second call goes on with the next epoch, and with another module."""
    trainer = make_trainer(LoraCallback(CONFIG), max_epochs=2)
    trainer.fit(module_class())
    trainer.fit_loop.max_epochs = 3
    module = module_class()
    with pytest.warns(UserWarning, match="holds an adapter already"):
        trainer.fit(module)
    assert (trainer.current_epoch, trainer.global_step) == (3, 15)
    assert module.net[0].lora_B.abs().max() > 0


def test_a_checkpoint_made_by_hand_before_and_after_fit(module_class, make_trainer, tmp_path):
    """test_model_saving_loading: before a run there is nothing to save, after it the whole state."""
    trainer = make_trainer(LoraCallback(CONFIG))
    with pytest.raises(AttributeError, match="Saving a checkpoint is only possible if a model is attached"):
        trainer.save_checkpoint(tmp_path / "before.ckpt")
    module = module_class()
    trainer.validate(module, verbose=False)
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fresh, after = (read_checkpoint(tmp_path / f"{name}.ckpt") for name in ("validated", "after"))
    assert not any(value.any() for name, value in fresh["state_dict"].items() if name.endswith("lora_B"))
    assert all(torch.equal(p, after["state_dict"][name]) for name, p in lora_parameters(module).items())
    assert (fresh["global_step"], after["global_step"]) == (0, 5)
    again = make_trainer(LoraCallback(CONFIG), max_epochs=2)
    again.fit(module_class(), ckpt_path=tmp_path / "after.ckpt")
    assert again.global_step == 10


def test_a_module_loads_into_another_process_without_a_trainer(saved, module_class, tmp_path):
    """test_load_model_from_checkpoint and test_model_saving_loading: same outputs, from the file alone."""
    trainer, folder = saved
    shutil.copy(folder / "last.ckpt", tmp_path / "moved.ckpt")
    shutil.rmtree(folder)
    x = torch.randn(6, 8)
    loaded = load_from_checkpoint(module_class, tmp_path / "moved.ckpt")
    assert torch.equal(loaded.net(x), trainer.lightning_module.eval().net(x))


def test_several_optimizers_by_hand_resume_to_the_bit(module_class, make_trainer, tmp_path):
    """test_strategy_load_optimizer_states_multiple: manual optimization, each optimizer and scheduler its own state."""

    class Two(module_class):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            first = torch.optim.AdamW(self.net[0].parameters(), lr=1e-2)
            second = torch.optim.SGD(self.net[3].parameters(), lr=1e-1, momentum=0.9)
            return [first, second], [torch.optim.lr_scheduler.StepLR(second, 3, 0.5)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
            self.lr_schedulers().step()

    def run(ckpt_path=None):
        module = Two()
        saver = ModelCheckpoint(tmp_path / "x", filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(LoraCallback(CONFIG), saver, max_epochs=3)
        torch.manual_seed(2)
        trainer.fit(module, ckpt_path=ckpt_path)
        return module, trainer

    whole, trainer = run()
    resumed, again = run(tmp_path / "x" / "epoch=0.ckpt")
    assert trainer.global_step == again.global_step == 30
    assert all(torch.equal(p, lora_parameters(resumed)[name]) for name, p in lora_parameters(whole).items())
    assert [o.param_groups[0]["lr"] for o in again.optimizers] == [o.param_groups[0]["lr"] for o in trainer.optimizers]


def test_other_groups_than_were_saved_are_told(saved, module_class, make_trainer):
    """test_strategy_load_optimizer_states_multiple: a checkpoint's groups do not go into others without a word."""
    _, folder = saved

    class Grouped(module_class):
        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[3].parameters(), "lr": 1e-3}]
            return torch.optim.AdamW(groups, lr=1e-2)

    class More(module_class):
        def configure_optimizers(self):
            return [torch.optim.AdamW(self.net[i].parameters(), lr=1e-2) for i in (0, 3)]

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(AdapterError, match="has 1 parameter groups, this run's has 2"):
        make_trainer(LoraCallback(CONFIG), max_epochs=3).fit(Grouped(), ckpt_path=folder / "last.ckpt")
    with pytest.raises(AdapterError, match="the states of 1 optimizers, this run has 2"):
        make_trainer(LoraCallback(CONFIG), max_epochs=3).fit(More(), ckpt_path=folder / "last.ckpt")


class Stops(RuntimeError):
    """Ends a run in the middle of an epoch."""


def test_going_on_in_the_middle_of_an_epoch_after_an_exception(module_class, make_trainer, tmp_path):
    """test_restarting_mid_epoch_raises_warning: what a stopped trainer saves by hand goes on with the batches left."""

    class Module(module_class):
        def __init__(self, stop=None):
            super().__init__()
            self.stop, self.seen = stop, []

        def training_step(self, batch, batch_idx):
            if self.stop == batch_idx:
                raise Stops
            self.seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    def trainer(epochs):
        return make_trainer(LoraCallback(CONFIG), max_epochs=epochs)

    torch.manual_seed(6)
    whole = Module()
    trainer(2).fit(whole)
    torch.manual_seed(6)
    stopped = Module(stop=3)
    before = trainer(2)
    with pytest.raises(Stops):
        before.fit(stopped)
    before.save_checkpoint(tmp_path / "stopped.ckpt")
    rest = Module()
    after = trainer(2)
    after.fit(rest, ckpt_path=tmp_path / "stopped.ckpt")
    assert stopped.seen + rest.seen == whole.seen
    assert after.global_step == 10
    assert all(torch.equal(p, lora_parameters(rest)[name]) for name, p in lora_parameters(whole).items())
